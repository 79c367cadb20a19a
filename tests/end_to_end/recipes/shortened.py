"""Shipped recipes with almost nothing in them: the same phases on few rows, for few steps."""

from typing import Annotated, Any

from posttrain.recipe.load import find
from posttrain.recipe.types import EvaluatePhase, GrpoPhase, PreparePhase, Recipe, SftPhase


def shortened(recipe: Annotated[str, "Recipe on the tiny base"] = "tes") -> Recipe:
    """Every phase of the recipe in seconds."""
    whole = find(recipe).build({"cases": 12} | ({} if recipe == "duel" else {"quick_test": True}))
    phases = [phase.model_copy(update=fewer(phase)) for phase in whole.phases]
    return whole.model_copy(update={"name": "shortened", "flags": {"recipe": recipe}, "phases": tuple(phases)})


def fewer(phase: Any) -> dict[str, Any]:
    match phase:
        case PreparePhase():
            return {"datasets": tuple(dataset.model_copy(update=few_rows(dataset)) for dataset in phase.datasets)}
        case SftPhase():
            return {"steps": 12}
        case GrpoPhase():
            return {"steps": 2, "groups_per_step": 4, "group_size": 4}
        case EvaluatePhase():
            votes = None if phase.vote is None else phase.vote.model_copy(update={"samples": 3, "pass_at": (1, 3)})
            return {"vote": votes}
    return {}


def few_rows(dataset: Any) -> dict[str, Any]:
    count = {"conversations": 96, "tasks": 12}[dataset.content]
    return {"sources": tuple(source.model_copy(update={"count": count}) for source in dataset.sources)}
