"""Prepare: every dataset of the phase, read, checked, rendered and committed, one after another."""

from typing import Any

from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.prepare import committed, prepare_dataset, spec_digest
from posttrain.errors import PhaseFault, Stopped
from posttrain.phases.context import PhaseContext, PhaseOutcome
from posttrain.recipe.types import Dataset, PreparePhase, WorldSource


def run(context: PhaseContext, phase: PreparePhase) -> PhaseOutcome:
    base = context.base_folder(context.states["base"])
    tokenizer = Tokenizer.load(base)
    described: dict[str, dict[str, Any]] = {}
    for dataset in phase.datasets:
        if context.stop_requested():
            raise Stopped(f"{phase.name}: stopped before dataset {dataset.name}; what is prepared stays")
        folder = context.folder.data / dataset.name
        spec = spec_digest(dataset, context.recipe.chat, base / "tokenizer.json")
        description = committed(folder, spec)
        if description is None:
            with context.progress(f"{phase.name}: {dataset.name}", expected_rows(dataset), "rows", 0) as progress:
                description = prepare_dataset(
                    dataset, context.recipe.chat, tokenizer, folder, spec, advance=progress.advance
                )
        described[dataset.name] = description
    counts = {
        f"{name}.{what}": count
        for name, description in described.items()
        for what, count in description["counts"].items()
    }
    if not described:
        raise PhaseFault("it has no datasets; give it at least one, or leave the phase out")
    details = {"datasets": {name: {k: d[k] for k in ("content", "counts", "digest")} for name, d in described.items()}}
    metrics = {name: float(value) for name, value in counts.items()}
    outputs = tuple(context.folder.data / name for name in described)
    return PhaseOutcome(outputs, metrics, counts, details=details)


def expected_rows(dataset: Dataset) -> float:
    """As far as the recipe tells; files are counted when they are read."""
    return float(sum(source.count for source in dataset.sources if isinstance(source, WorldSource)))
