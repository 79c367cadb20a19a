"""Rows that are no good: counted by reason, and how many of them a dataset may have."""

import re
from collections import Counter
from collections.abc import Iterable

from posttrain.data.rows import Fault
from posttrain.errors import DataError
from posttrain.recipe.types import Dataset

KINDS = 100
"""Reasons that are counted apart; further ones together."""
SHOWN = 5


class FaultyRows:
    """Counts into `reasons` and raises DataError once there are more than the dataset's share."""

    def __init__(self, dataset: Dataset, reasons: Counter[str]) -> None:
        self._dataset = dataset
        self._reasons = reasons
        self._first: list[str] = []

    def add(self, faults: Iterable[tuple[str, Fault]]) -> None:
        """Where none is allowed, the first one is raised at once."""
        for place, fault in faults:
            line = f"{place}: {fault}"
            if self._dataset.faulty_share == 0:
                raise DataError(
                    f"{line}. Rows of content {self._dataset.content!r} are expected in dataset {self._dataset.name}; "
                    "mend or remove the row, or let the recipe leave such rows out with faulty_share"
                )
            reason = kind_of(fault)
            known = reason in self._reasons or len(self._reasons) < KINDS
            self._reasons[reason if known else "other reasons"] += 1
            if len(self._first) < SHOWN:
                self._first.append(line)

    def check(self, rows: int) -> None:
        """With all `rows` read."""
        found, share = sum(self._reasons.values()), self._dataset.faulty_share
        if found > share * rows:
            by_reason = "\n".join(f"  {count} × {reason}" for reason, count in self._reasons.most_common(10))
            first = "\n".join(f"  {line}" for line in self._first)
            raise DataError(
                f"dataset {self._dataset.name}: {found} of {rows} rows are no good, faulty_share allows {share:.2%}:\n"
                f"{by_reason}\nThe first of them:\n{first}\nMend the rows, or raise faulty_share"
            )


def kind_of(fault: Fault) -> str:
    """Field and reason without what differs from row to row: numbers and quoted words."""
    return re.sub(r"'[^']*'|\d+", "…", f"{fault.field}: {fault.reason}")
