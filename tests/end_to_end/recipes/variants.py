"""The smoke curriculum with other objectives: KTO, and GSPO with a divergence and truncated importance weights."""

from posttrain.recipe.types import GrpoPhase, Gspo, Kto, PreferencePhase, Recipe
from posttrain.recipes.smoke import smoke


def variants() -> Recipe:
    """Every phase, other objectives."""
    phases = []
    for phase in smoke().phases:
        changed = {}
        if isinstance(phase, PreferencePhase):
            changed = {"objective": Kto(kind="kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)}
        if isinstance(phase, GrpoPhase):
            objective = Gspo(kind="gspo", clip_low=3e-4, clip_high=4e-4)
            changed = {"objective": objective, "kl_weight": 0.1, "sampler_ratio_cap": 2.0, "updates_per_rollout": 2}
        phases.append(phase.model_copy(update=changed))
    return smoke().model_copy(update={"name": "variants", "flags": {}, "phases": tuple(phases)})
