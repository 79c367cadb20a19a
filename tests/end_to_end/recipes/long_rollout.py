"""GRPO whose rollout takes minutes: to be stopped in the middle of it."""

from posttrain.recipe.types import NOTHING_SUGGESTED, FolderBase, Lora, Recipe
from posttrain.recipes.quickstart import CHAT, QUICK, curriculum, dataset


def long_rollout() -> Recipe:
    """One step of GRPO, with answers far longer than anybody waits for."""
    whole = curriculum("long_rollout", {}, 0, 4, QUICK)
    grpo = next(phase for phase in whole.phases if phase.kind == "grpo")
    sampling = grpo.sampling.model_copy(update={"max_new_tokens": 20000, "temperature": 1.5})
    changed = {"model": "base", "steps": 1, "sampling": sampling, "gates": (), "held_out": None}
    changed |= {"trainable": Lora(kind="lora", rank=2, alpha=4, targets=("q_proj",))}
    tasks = dataset("repair_tasks", "tasks", ("repair", 32), seed=0)
    data = whole.phases[0].model_copy(update={"datasets": (tasks,)})
    return Recipe(
        name="long_rollout",
        flags={},
        seed=0,
        base=FolderBase(kind="folder", path="shipped:tiny"),
        chat=CHAT,
        phases=(data, grpo.model_copy(update=changed)),
        suggested=NOTHING_SUGGESTED,
    )
