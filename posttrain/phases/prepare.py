"""Prepare: every dataset of the phase, read, checked, rendered and committed, one after another."""

from typing import Any

from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.prepare import committed, prepare_dataset, spec_digest
from posttrain.data.sources import local_files
from posttrain.errors import PhaseFault, Stopped
from posttrain.phases.context import PhaseContext, PhaseOutcome
from posttrain.recipe.types import Dataset, PreparePhase, WorldSource
from posttrain.run.folder import digest_file


def run(context: PhaseContext, phase: PreparePhase) -> PhaseOutcome:
    base = context.base_folder(context.states["base"])
    tokenizer = Tokenizer.load(base)
    described: dict[str, dict[str, Any]] = {}
    for dataset in phase.datasets:
        if context.stop_requested():
            raise Stopped(f"stopped in {phase.name} before dataset {dataset.name}; what is prepared stays")
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
    details = {
        "datasets": {name: {k: d[k] for k in ("content", "counts", "digest")} for name, d in described.items()},
        "sources": source_files(phase),
    }
    metrics = {name: float(value) for name, value in counts.items()}
    outputs = tuple(context.folder.data / name for name in described)
    return PhaseOutcome(outputs, metrics, counts, details=details)


def source_files(phase: PreparePhase) -> list[dict[str, Any]]:
    """The local files that were read, as they are now: the pipeline compares with it later."""
    sources = [source for dataset in phase.datasets for source in dataset.sources]
    paths = [path.absolute() for source in sources for path in local_files(source)]
    return [
        {
            "path": str(path),
            "mtime_ns": path.stat().st_mtime_ns,
            "bytes": path.stat().st_size,
            "sha256": digest_file(path),
        }
        for path in paths
    ]


def expected_rows(dataset: Dataset) -> float:
    """As far as the recipe tells; files are counted when they are read."""
    return float(sum(source.count for source in dataset.sources if isinstance(source, WorldSource)))
