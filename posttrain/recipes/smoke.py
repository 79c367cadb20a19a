"""Every phase in seconds: the quickstart's curriculum with almost nothing in it, for tests."""

from typing import Annotated

from posttrain.recipe.types import Recipe
from posttrain.recipes.quickstart import MERGE_GATES, Sizes, curriculum

SMALL = Sizes(
    tool_rows=48,
    tool_steps=4,
    agent_rows=32,
    agent_steps=4,
    pairs=16,
    preference_steps=3,
    tasks=16,
    grpo_steps=3,
    groups_per_step=2,
    group_size=2,
    samples_per_step=4,
    rank=2,
    held_out_steps=2,
    tool_loss=10.0,
    agent_loss=10.0,
    merge_gates=MERGE_GATES,
)


def smoke(
    seed: Annotated[int, "Seed of data, order, adapters and sampling"] = 0,
    cases: Annotated[int, "Held-out cases per evaluation set"] = 6,
) -> Recipe:
    """Every phase of the quickstart in about 15 seconds; learns nothing worth having."""
    return curriculum("smoke", {"seed": seed, "cases": cases}, seed, cases, SMALL)
