"""How an evaluation went: scores by dataset, category and difficulty, and against targets. No torch, no numpy."""

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from posttrain.report import words

Row = dict[str, Any]
GROUPS = ("category", "difficulty")
FACTS = ("turns", "new_tokens")
"""Numbers of an answer that are no part of its score."""
COMPARE: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Target:
    """What the mean of a part, or of a fact, is to reach."""

    metric: str
    comparison: Literal[">=", "<="]
    threshold: float


@dataclass(frozen=True)
class Line:
    """One group of a dataset's answers."""

    dataset: str
    group: str
    """`all`, `category`, `difficulty`, or `category, difficulty`."""
    value: str
    asked: int
    unscorable: int
    score: float | None
    """Mean over what could be scored."""
    full: int
    """Answers with a score of 1 or more."""
    parts: dict[str, float]

    def json(self) -> Row:
        return asdict(self)


@dataclass(frozen=True)
class Reached:
    target: Target
    value: float | None
    """None: nothing of the evaluation measures it."""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        met = COMPARE[self.target.comparison](self.value, self.target.threshold)
        return "met" if met else "missed"


def scorecard(answers: Iterable[Row]) -> list[Line]:
    """All of each dataset, then its categories, its difficulties and both together, where the rows name them."""
    by_dataset: dict[str, list[Row]] = {}
    for answer in answers:
        by_dataset.setdefault(answer["dataset"], []).append(answer)
    return [line for dataset, rows in by_dataset.items() for line in _lines(dataset, rows)]


def _lines(dataset: str, rows: list[Row]) -> Iterator[Line]:
    yield _line(dataset, "all", "", rows)
    present = [group for group in GROUPS if any(row.get(group) for row in rows)]
    for fields in [*((group,) for group in present), *([tuple(GROUPS)] if len(present) == len(GROUPS) else [])]:
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(str(row.get(field) or words.NOTHING) for field in fields), []).append(row)
        for values in sorted(groups, key=_easy_first):
            yield _line(dataset, ", ".join(fields), ", ".join(values), groups[values])


def _easy_first(values: tuple[str, ...]) -> list[tuple[int, str]]:
    order = ("easy", "medium", "hard")
    return [(order.index(value) if value in order else -1, value) for value in values]


def _line(dataset: str, group: str, value: str, rows: list[Row]) -> Line:
    scored = [row for row in rows if row["score"] is not None]
    names = dict.fromkeys(part for row in scored for part in row["parts"])
    parts = {name: _mean([row["parts"][name] for row in scored if name in row["parts"]]) for name in names}
    facts = {fact: _mean([row[fact] for row in rows if fact in row]) for fact in FACTS if any(fact in r for r in rows)}
    return Line(
        dataset=dataset,
        group=group,
        value=value,
        asked=len(rows),
        unscorable=len(rows) - len(scored),
        score=_mean([row["score"] for row in scored]) if scored else None,
        full=sum(row["score"] >= 1 for row in scored),
        parts=parts | facts,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def against_targets(lines: Iterable[Line], targets: Iterable[Target]) -> list[Reached]:
    """Targets are of a whole set; one that no part measures is said to be unmeasured, never met."""
    whole = next(line for line in lines if line.group == "all")
    return [Reached(target, whole.parts.get(target.metric)) for target in targets]
