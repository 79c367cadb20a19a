"""Prepare: every dataset of the phase, read, checked, rendered and committed, one after another."""

from typing import Any

from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.prepare import committed, content_key, link_dataset, prepare_dataset
from posttrain.data.sources import local_files
from posttrain.errors import InputError, PhaseFault, Stopped
from posttrain.host.cache import cache_folder
from posttrain.phases.context import PhaseContext, PhaseOutcome
from posttrain.recipe.types import CodeSource, Dataset, PreparePhase, WorldSource
from posttrain.run.folder import digest_file


def run(context: PhaseContext, phase: PreparePhase) -> PhaseOutcome:
    base = context.base_folder(context.states["base"])
    tokenizer = Tokenizer.load(base)
    described: dict[str, dict[str, Any]] = {}
    for dataset in phase.datasets:
        key = content_key(dataset, context.recipe.chat, tokenizer, context.fingerprint)
        folder = context.folder.data / dataset.name
        description = committed(folder, key)
        described[dataset.name] = description or _make(context, dataset, tokenizer, key)
    counts = {
        f"{name}.{what}": count
        for name, description in described.items()
        for what, count in description["counts"].items()
    }
    if not described:
        raise PhaseFault("it has no datasets; give it at least one, or leave the phase out")
    shown = ("content", "counts", "faulty", "parts", "digest")
    details = {
        "datasets": {name: {what: description[what] for what in shown} for name, description in described.items()},
        "sources": source_files(phase),
    }
    metrics = {name: float(value) for name, value in counts.items()}
    outputs = tuple(context.folder.data / name for name in described)
    return PhaseOutcome(outputs, metrics, counts, details=details)


def _make(context: PhaseContext, dataset: Dataset, tokenizer: Tokenizer, key: str) -> dict[str, Any]:
    """Make the dataset in the cache, or find it there, and link it into the run."""
    phase, made = context.folder.path.name, cache_folder() / "shards" / key
    if context.prepared_only and committed(made, key) is None:
        raise InputError(
            f"--skip-data was given, and dataset {dataset.name!r} is prepared neither in this run nor in "
            f"{made.parent}: leave it out once, or set POSTTRAIN_CACHE_DIR to the cache that holds it"
        )
    with context.progress(f"{phase}: {dataset.name}", expected_rows(dataset), "rows", 0) as progress:

        def advance(rows: float) -> None:
            progress.advance(rows)
            if context.stop_requested():
                raise Stopped(f"stopped in {phase} while preparing {dataset.name}; what is prepared stays")

        advance(0)
        workers = context.execution.threads
        description = prepare_dataset(dataset, context.recipe.chat, tokenizer, made, key, workers, advance)
    link_dataset(
        made, context.folder.data / dataset.name, context.folder.path / "faulty_rows" / f"{dataset.name}.jsonl"
    )
    return description


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
    return float(sum(source.count for source in dataset.sources if isinstance(source, WorldSource | CodeSource)))
