"""Reinforcement learning on a card game whose optimal policy is known: the high-card duel."""

from typing import Annotated

from posttrain.recipe.types import Recipe
from posttrain.recipes.tes import curriculum, generated, tiny


def duel(
    seed: Annotated[int, "Seed of data, order, adapter and sampling"] = 0,
    cases: Annotated[int, "Held-out hands to evaluate on"] = 200,
) -> Recipe:
    """GRPO on the chips that were really won, on the tiny base, between two evaluations by majority vote."""
    # A group plays one deal, so it says little however large it is: many small ones.
    sizes = tiny(grpo_steps=80, groups_per_step=64, group_size=4, kl_weight=0.3)
    flags: dict[str, str | int | float | bool | None] = {"seed": seed, "cases": cases}
    return curriculum("duel", flags, seed, "duel", generated("duel", seed, cases, sizes), sizes, cases)
