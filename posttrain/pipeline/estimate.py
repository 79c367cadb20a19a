"""What a phase will need: disk and memory from the model's shapes, time from earlier runs on the same hardware.

Where nothing is known the answer is None, shown as "not measured"; activations and the sampler's cache are not counted.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.pipeline.results import FIELDS
from posttrain.pipeline.sizes import ModelSize
from posttrain.recipe.types import (
    ContinueAdapter,
    EvaluatePhase,
    Execution,
    ExportPhase,
    FullParameters,
    GrpoPhase,
    Lora,
    MergePhase,
    Phase,
    PreferencePhase,
    PreparePhase,
    Recipe,
    SftPhase,
)

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
DTYPE_BYTES |= {"mxfp4": 34 / 32, "auto": 34 / 32}
"""Bytes of a stored number; q8_0 keeps 32 of them in 34 bytes. MXFP4 is for experts alone: at most the rest's size."""
ROW_BYTES = 1500
"""A generated row, an answer or an episode as a JSON line: about this much, seen in runs of the tiny worlds."""
TOKEN_BYTES = 5
"""A token and its target flag."""

TrainingPhase = SftPhase | PreferencePhase | GrpoPhase


@dataclass(frozen=True)
class Needs:
    disk_bytes: int
    memory_bytes: int | None
    seconds: float | None
    basis: str
    """What the time was taken from."""


def trainable_parameters(recipe: Recipe, phase: TrainingPhase, size: ModelSize) -> int:
    """Parameters the phase updates; a continued adapter is looked up where it was made."""
    match phase.trainable:
        case Lora() as adapter:
            return size.adapter_parameters(adapter)
        case FullParameters():
            return size.parameters
        case ContinueAdapter():
            maker = next((one for one in recipe.phases if one.name == phase.model), None)
            return trainable_parameters(recipe, maker, size) if isinstance(maker, TrainingPhase) else 0
    raise AssertionError(phase.trainable)


def needs(recipe: Recipe, phase: Phase, size: ModelSize, execution: Execution, past: "Past") -> Needs:
    memory = None if isinstance(phase, PreparePhase) else _memory(recipe, phase, size)
    seconds, basis = past.seconds(recipe, phase, execution)
    return Needs(_disk(recipe, phase, size, execution), memory, seconds, basis)


def disk_bytes(recipe: Recipe, phases: Iterable[Phase], size: ModelSize, execution: Execution) -> int:
    return sum(_disk(recipe, phase, size, execution) for phase in phases)


def checkpoint_bytes(recipe: Recipe, phase: Phase, size: ModelSize) -> int:
    """Of one checkpoint: the trained weights and their two moments; nothing for a phase that writes none."""
    return 12 * trainable_parameters(recipe, phase, size) if isinstance(phase, TrainingPhase) else 0


def expected_steps(phase: TrainingPhase) -> int:
    return phase.steps if isinstance(phase.steps, int) else 0


def _disk(recipe: Recipe, phase: Phase, size: ModelSize, execution: Execution) -> int:
    match phase:
        case PreparePhase():
            rows = {dataset: _rows(recipe, dataset.name) for dataset in phase.datasets}
            return sum(count * (ROW_BYTES + TOKEN_BYTES * dataset.max_tokens) for dataset, count in rows.items())
        case SftPhase() | PreferencePhase() | GrpoPhase():
            trained = trainable_parameters(recipe, phase, size)
            # Weights and two moments; one more checkpoint exists while the newest is being written.
            checkpoints = (execution.keep_checkpoints + 1) * checkpoint_bytes(recipe, phase, size)
            steps = expected_steps(phase)
            episodes = steps * phase.groups_per_step * phase.group_size if isinstance(phase, GrpoPhase) else 0
            return checkpoints + 4 * trained + 300 * steps + ROW_BYTES * episodes
        case MergePhase():
            return int(size.parameters * DTYPE_BYTES[phase.dtype])
        case EvaluatePhase():
            return sum(_rows(recipe, name) for name in phase.datasets) * ROW_BYTES
        case ExportPhase():
            numbers = {"hf": DTYPE_BYTES[phase.dtype], "gguf": DTYPE_BYTES[phase.gguf_type], "adapter": 0.0}
            numbers |= {"mxfp4": DTYPE_BYTES["bfloat16"], "ollama": 0.0 if "gguf" in phase.formats else numbers["gguf"]}
            return int(size.parameters * sum(numbers[name] for name in phase.formats))
    raise AssertionError(phase)


def _memory(recipe: Recipe, phase: Phase, size: ModelSize) -> int:
    """Weights in float32, and gradient and two moments of what is trained."""
    weights = 4 * size.parameters
    if isinstance(phase, TrainingPhase):
        return weights + 16 * trainable_parameters(recipe, phase, size)
    return 2 * weights if isinstance(phase, ExportPhase) else weights


def _rows(recipe: Recipe, dataset_name: str) -> int:
    """Rows that the sources declare; those of local files are not counted."""
    for phase in recipe.phases:
        for dataset in phase.datasets if isinstance(phase, PreparePhase) else ():
            if dataset.name == dataset_name:
                return sum(getattr(source, "count", 0) for source in dataset.sources)
    return 0


class Past:
    """Results of earlier runs in a folder of runs, on hardware like this."""

    def __init__(self, runs_dir: Path, hardware: dict[str, Any]) -> None:
        self.entries = list(_entries(runs_dir, hardware))

    def seconds(self, recipe: Recipe, phase: Phase, execution: Execution) -> tuple[float | None, str]:
        """Expected time and where it was taken from: the same phase before, or its rate per step."""
        wanted = _comparable(phase)
        base = recipe.base.model_dump(mode="json")
        like = [
            entry
            for entry in self.entries
            if entry.kind == phase.kind and entry.base == base and entry.threads == execution.threads
        ]
        for entry in reversed(like):
            if entry.comparable == wanted:
                return entry.seconds, f"run {entry.run}"
        wanted.pop("steps", None)
        for entry in reversed(like):
            before = dict(entry.comparable)
            steps = before.pop("steps", None)
            if steps and before == wanted:
                return entry.seconds / steps * getattr(phase, "steps", 0), f"rate of run {entry.run}"
        return None, ""


@dataclass(frozen=True)
class _Entry:
    run: str
    kind: str
    base: dict[str, Any]
    threads: int
    comparable: dict[str, Any]
    seconds: float


def _comparable(phase: Phase) -> dict[str, Any]:
    """What decides a phase's time: its specification without names, gates and rates."""
    return phase.model_dump(mode="json", exclude={"name", "gates", "model", "optimizer", "candidates"})


def _entries(runs_dir: Path, hardware: dict[str, Any]) -> Iterator[_Entry]:
    """Completed phases of the runs there, oldest run first; what cannot be read is passed over: this only estimates."""
    for path in sorted(runs_dir.glob("*/recipe.json"), key=lambda path: path.stat().st_mtime):
        try:
            recipe = Recipe.model_validate(json.loads(path.read_text())["recipe"])
            manifest = json.loads((path.parent / "run.json").read_text())
            same = all(manifest["hardware"].get(name) == hardware[name] for name in ("cpu", "cpu_count", "gpus"))
            threads = manifest["attempts"][-1]["execution"]["threads"]
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue
        for phase in recipe.phases if same else ():
            try:
                result = json.loads((path.parent / "phases" / phase.name / "result.json").read_text())
            except (OSError, ValueError):
                continue
            if isinstance(result, dict) and result.keys() >= FIELDS:
                base = recipe.base.model_dump(mode="json")
                yield _Entry(path.parent.name, phase.kind, base, threads, _comparable(phase), result["seconds"])
