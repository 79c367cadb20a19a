"""Data of `tes`: decision tables as tasks, with a table of its own to ask about afterwards."""

from posttrain.recipe.types import Dataset, DecisionTableSource
from posttrain.recipes._hub import dataset, take

TAU = 0.05
PROMPT_TOKENS = 1000


def tes_data(table: str, heldout_table: str, quick_test: bool) -> tuple[Dataset, ...]:
    """`decisions` and `heldout`; a table is a CSV file, or a pattern, with prompts and Q-values."""
    limit = 64 if quick_test else None
    return tuple(
        dataset(name, "tasks", (_decisions(path, limit),), PROMPT_TOKENS)
        for name, path in (("decisions", table), ("heldout", heldout_table))
    )


def _decisions(path: str, limit: int | None) -> DecisionTableSource:
    return DecisionTableSource(
        kind="decision_table", path=path, tau=TAU, filters=(), selection=take(limit, None), reasoning_effort=None
    )
