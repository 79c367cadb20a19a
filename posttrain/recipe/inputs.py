"""Which phases a phase reads from: by field, so that a fault can name the field."""

from collections.abc import Iterator

from posttrain.recipe.types import (
    EvaluatePhase,
    ExportPhase,
    GrpoPhase,
    MergePhase,
    Phase,
    PreferencePhase,
    PreparePhase,
    Recipe,
    RegisteredSource,
    SftPhase,
)


def models_used(phase: Phase) -> Iterator[tuple[str, str]]:
    """(field, model name) of every model state the phase starts from."""
    if isinstance(phase, SftPhase | MergePhase | PreferencePhase | GrpoPhase | EvaluatePhase):
        yield "model", phase.model
    elif isinstance(phase, ExportPhase):
        for place, candidate in enumerate(phase.candidates):
            yield f"candidates[{place}].model", candidate.model


def datasets_used(phase: Phase) -> Iterator[tuple[str, str]]:
    """(field, dataset name) of every prepared dataset the phase reads."""
    if isinstance(phase, SftPhase | PreferencePhase | GrpoPhase):
        yield "dataset", phase.dataset
        if phase.held_out is not None:
            yield "held_out.dataset", phase.held_out.dataset
    elif isinstance(phase, EvaluatePhase):
        for place, dataset in enumerate(phase.datasets):
            yield f"datasets[{place}]", dataset
    elif isinstance(phase, ExportPhase):
        yield "verify_dataset", phase.verify_dataset


def keys_trained_on(recipe: Recipe) -> list[str]:
    """`name@version` of every registered dataset that a training phase reads, in the recipe's order."""
    trained = {phase.dataset for phase in recipe.phases if isinstance(phase, SftPhase | PreferencePhase | GrpoPhase)}
    datasets = [one for phase in recipe.phases if isinstance(phase, PreparePhase) for one in phase.datasets]
    sources = [source for one in datasets if one.name in trained for source in one.sources]
    return list(dict.fromkeys(source.dataset for source in sources if isinstance(source, RegisteredSource)))


def phases_read(recipe: Recipe, phase: Phase) -> list[str]:
    """Names of the phases whose results this phase reads, in the recipe's order."""
    wanted = {model for _, model in models_used(phase)}
    datasets = {dataset for _, dataset in datasets_used(phase)}
    if isinstance(phase, ExportPhase):
        wanted |= {candidate.evaluation for candidate in phase.candidates}
    for other in recipe.phases:
        if isinstance(other, PreparePhase) and any(dataset.name in datasets for dataset in other.datasets):
            wanted.add(other.name)
    return [other.name for other in recipe.phases if other.name in wanted]
