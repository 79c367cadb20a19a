"""What a phase will need: disk by artefact and memory by part from shapes and rows, time from earlier runs like this.

Where nothing is known the answer is None, shown as "not measured".
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.host import machine
from posttrain.pipeline.memory import Device, Memory, memory, trainable, weight_bytes
from posttrain.pipeline.results import FIELDS
from posttrain.pipeline.rows import Expected, expected
from posttrain.pipeline.sizes import ModelSize, base_folder, model_size
from posttrain.recipe.check import TrainingPhase
from posttrain.recipe.types import (
    Epochs,
    EvaluatePhase,
    Execution,
    ExportPhase,
    GrpoPhase,
    HubBase,
    MergePhase,
    Phase,
    PreferencePhase,
    PreparePhase,
    Recipe,
    RowBatch,
    SampleBatch,
    SftPhase,
)
from posttrain.run.folder import RunFolder

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
DTYPE_BYTES |= {"mxfp4": 17 / 32}
"""Bytes of a stored number; q8_0 keeps 32 of them in 34 bytes. MXFP4 is for experts alone."""
ANSWER_BYTES, EPISODE_BYTES = 600, 2500
"""An answer or an episode as a JSON line, beside what grows with its row or its tokens."""
EPISODE_TOKEN_BYTES = 30
"""Each token of an episode with its flag, log-probability and text."""
STEP_BYTES = 330
"""A step's line of metrics."""


@dataclass(frozen=True)
class Needs:
    disk: Mapping[str, int]
    """Bytes by artefact."""
    memory: Memory | None
    seconds: float | None
    basis: str
    """What the time was taken from."""

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())


@dataclass(frozen=True)
class Facts:
    """What estimates are made from."""

    size: ModelSize
    rows: Mapping[str, Expected]
    device: Device


def facts_of(recipe: Recipe, run: RunFolder, execution: Execution) -> Facts:
    """What estimates are made from, read from files and from the first rows of sources that are on this machine."""
    base = base_folder(recipe, run)
    device: Device = "cpu" if execution.device == "cpu" or not machine.gpus() else "cuda"
    return Facts(model_size(recipe, run), expected(recipe, run, base), device)


def download_bytes(recipe: Recipe, run: RunFolder, size: ModelSize) -> int:
    """Of a base that is not on this machine yet; 0 where nothing is known of it."""
    far = isinstance(recipe.base, HubBase) and base_folder(recipe, run) is None
    return weight_bytes(size, 2, packed=True) if far else 0


def device_bytes(device: Device, execution: Execution) -> int:
    """Memory of the device: of the smallest GPU in use, or of the machine."""
    gpus = machine.gpus()
    if device == "cpu" or not gpus:
        return machine.memory_bytes()
    ranks = map(int, execution.gpu_ranks.split(",")) if execution.gpu_ranks else range(len(gpus))
    return min((gpus[rank].memory_bytes for rank in ranks if rank < len(gpus)), default=0)


def needs(recipe: Recipe, phase: Phase, facts: Facts, execution: Execution, past: "Past") -> Needs:
    seconds, basis = past.seconds(recipe, phase, execution, expected_steps(recipe, phase, facts.rows))
    return Needs(
        disk(recipe, phase, facts, execution),
        memory(recipe, phase, facts.size, execution, facts.device, facts.rows),
        seconds,
        basis,
    )


def disk_bytes(recipe: Recipe, phases: Iterable[Phase], facts: Facts, execution: Execution) -> int:
    return sum(sum(disk(recipe, phase, facts, execution).values()) for phase in phases)


def checkpoint_bytes(recipe: Recipe, phase: Phase, size: ModelSize) -> int:
    """Of one checkpoint: the trained weights and their two moments; nothing for a phase that writes none."""
    return 12 * trainable(recipe, phase, size)[0] if isinstance(phase, TrainingPhase) else 0


def expected_steps(recipe: Recipe, phase: Phase, rows: Mapping[str, Expected]) -> int | None:
    """None where it follows from data that is not known yet; a phase without steps has none either."""
    if not isinstance(phase, TrainingPhase):
        return None
    if isinstance(phase.steps, int):
        return phase.steps
    if not isinstance(phase.steps, Epochs):
        return 0
    data = rows.get(phase.dataset)
    if data is None or data.unknown:
        return None
    match phase:
        case SftPhase(batch=SampleBatch(samples=per_step)):
            items = float(data.samples)
        case SftPhase(batch=RowBatch(rows=per_step, row_tokens=row_tokens)):
            items = data.tokens / row_tokens
        case PreferencePhase(pairs_per_step=per_step) | GrpoPhase(groups_per_step=per_step):
            items = float(data.rows)
    return max(1, -int(-phase.steps.epochs * items // per_step))


def disk(recipe: Recipe, phase: Phase, facts: Facts, execution: Execution) -> dict[str, int]:
    """Bytes of what the phase leaves in the run, and of what it holds there for a while."""
    size = facts.size
    match phase:
        case PreparePhase():
            return {"prepared data": sum(facts.rows[dataset.name].disk_bytes for dataset in phase.datasets)}
        case SftPhase() | PreferencePhase() | GrpoPhase():
            trained, _ = trainable(recipe, phase, size)
            steps = expected_steps(recipe, phase, facts.rows) or 0
            every = execution.checkpoint_every_steps
            # One more exists while the newest is being written; the last step saves none.
            saved = min(execution.keep_checkpoints + 1, (steps - 1) // every if steps else 0)
            found = {"checkpoints": saved * checkpoint_bytes(recipe, phase, size), "adapter": 4 * trained}
            found["metrics"] = STEP_BYTES * steps
            if isinstance(phase, GrpoPhase):
                episodes = steps * phase.groups_per_step * phase.group_size
                tokens = phase.sampling.max_new_tokens * phase.sampling.max_turns
                found["episodes"] = episodes * (EPISODE_BYTES + EPISODE_TOKEN_BYTES * tokens)
            return found
        case MergePhase():
            return {"merged model": int(size.parameters * DTYPE_BYTES[phase.dtype])}
        case EvaluatePhase():
            samples = phase.vote.samples if phase.vote else 1
            sets = [facts.rows[name] for name in phase.datasets]
            return {"answers": sum(one.row_bytes // 2 + one.rows * samples * ANSWER_BYTES for one in sets)}
        case ExportPhase():
            return export_bytes(recipe, phase, size)
    raise AssertionError(phase)


def export_bytes(recipe: Recipe, phase: ExportPhase, size: ModelSize) -> dict[str, int]:
    """By format, and the float32 merge that they are compared with and that goes again."""
    experts, rest = size.expert_parameters, size.parameters - size.expert_parameters
    trained = (one for one in recipe.phases if isinstance(one, TrainingPhase))
    adapters = {one.name: 4 * trainable(recipe, one, size)[0] for one in trained}
    four_bit = phase.gguf_type in ("auto", "mxfp4") and experts
    gguf = int(
        experts * DTYPE_BYTES["mxfp4"] + rest * DTYPE_BYTES["q8_0"]
        if four_bit
        else size.parameters * DTYPE_BYTES["q8_0" if phase.gguf_type == "auto" else phase.gguf_type]
    )
    written = {
        "adapter": max(adapters.get(candidate.model, 0) for candidate in phase.candidates),
        "hf": int(size.parameters * DTYPE_BYTES[phase.dtype]),
        "mxfp4": int(experts * DTYPE_BYTES["mxfp4"] + rest * DTYPE_BYTES["bfloat16"]),
        "gguf": gguf,
        "ollama": 0 if "gguf" in phase.formats else gguf,
    }
    found = {f"export {name}": written[name] for name in phase.formats}
    if phase.dtype != "float32" or "hf" not in phase.formats:
        found["comparison"] = 4 * size.parameters
    return found


class Past:
    """Results of earlier runs in a folder of runs, on hardware like this."""

    def __init__(self, runs_dir: Path, hardware: dict[str, Any]) -> None:
        self.entries = list(_entries(runs_dir, hardware))

    def seconds(
        self, recipe: Recipe, phase: Phase, execution: Execution, steps: int | None
    ) -> tuple[float | None, str]:
        """Expected time and where it was taken from: the same phase before, its rate per step, or one like it."""
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
        if steps is None:
            return None, ""
        wanted.pop("steps", None)
        for entry in reversed(like):
            before = {name: value for name, value in entry.comparable.items() if name != "steps"}
            if entry.steps and before == wanted:
                return entry.seconds / entry.steps * steps, f"rate of run {entry.run}"
        if isinstance(phase, SftPhase) and isinstance(phase.batch, RowBatch):
            tokens = steps * phase.batch.rows * phase.batch.row_tokens
            for entry in reversed(like):
                if entry.tokens_per_second:
                    return tokens / entry.tokens_per_second, f"tokens per second of run {entry.run}"
        return None, ""


@dataclass(frozen=True)
class _Entry:
    run: str
    kind: str
    base: dict[str, Any]
    threads: int
    comparable: dict[str, Any]
    seconds: float
    steps: int
    tokens_per_second: float


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
                yield _Entry(
                    path.parent.name,
                    phase.kind,
                    base,
                    threads,
                    _comparable(phase),
                    result["seconds"],
                    int(result["metrics"].get("steps") or 0),
                    float(result["metrics"].get("tokens_per_second") or 0.0),
                )
