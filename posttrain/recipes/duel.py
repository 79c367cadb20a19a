"""Reinforcement learning on a card game whose optimal policy is known: the high-card duel."""

from typing import Annotated

from posttrain.recipe.types import Recipe
from posttrain.recipes.tes import curriculum, generated, tiny


def duel(
    seed: Annotated[int, "Seed of data, order, adapter and sampling"] = 0,
    cases: Annotated[int, "Held-out hands to evaluate on"] = 200,
) -> Recipe:
    """GRPO on the chips that were really won, on the tiny base, between two evaluations by majority vote."""
    sizes = tiny(grpo_steps=60)
    return curriculum(
        "duel", {"seed": seed, "cases": cases}, seed, "duel", generated("duel", seed, cases, sizes), sizes
    )
