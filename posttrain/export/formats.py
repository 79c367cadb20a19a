"""What an export writes: one folder per format, planned before anything is written."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import torch

from posttrain.errors import InputError, MachineError, ModelError
from posttrain.export.commit import committing, is_committed, refuse_foreign
from posttrain.export.gguf import plan_gguf, write_gguf
from posttrain.export.gguf_adapter import plan_adapter, write_adapter
from posttrain.export.gguf_types import GgufType, Stored, encode
from posttrain.export.llama_quantize import find_quantizer, quantize_file
from posttrain.export.merge import MergePlan, apply_merge, plan_merge
from posttrain.export.ollama import HarmonySettings, write_modelfiles
from posttrain.run.folder import files_below

Format = Literal["hf", "mxfp4", "gguf", "ollama", "adapter"]
FORMATS: tuple[Format, ...] = get_args(Format)
Choice = TypeVar("Choice", bound=str)
Advance = Callable[[int], None]
K_QUANT_BITS = 4.9
"""Of a weight in Q4_K_M on average, as llama.cpp reports; it depends on the layers."""
PROBE_BYTES = 64 * 1024**2
PROBE_VALUES = 4 * 1024**2


@dataclass(frozen=True)
class Model:
    """A base and at most one adapter on it, by digest."""

    name: str
    base: Path
    adapter: Path | None
    digests: dict[str, str | None]
    harmony: HarmonySettings | None = None
    """How prompts are to be rendered, where a recipe says so."""


@dataclass(frozen=True)
class Piece:
    """One folder to write."""

    folder: str
    format: Format
    bytes: int
    scratch: int = 0
    """Bytes that are on the disk as well while it is written."""
    values: dict[Stored, int] = field(default_factory=dict)
    """Numbers that have to be encoded, by type: they cost arithmetic, not only disk."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What, beside the model, decides its bytes."""
    fill: Callable[[Path, Advance], None] = lambda folder, advance: None

    def write(self, model: Model, output: Path, advance: Advance = lambda written: None) -> bool:
        """Make the folder below `output`; False where an earlier attempt had finished the same."""
        target = output / self.folder
        made_from = {**model.digests, **self.settings}
        if is_committed(target, made_from):
            advance(self.bytes)
            return False
        with committing(target, made_from, f"export.{self.format}_written") as folder:
            self.fill(folder, advance)
        return True


def plan_pieces(model: Model, formats: Sequence[Format], dtype: str, gguf_types: Sequence[GgufType]) -> Iterator[Piece]:
    """The folders of these formats in the order they are written.

    Raises ModelError for what the model or its adapter does not allow.
    """
    if "adapter" in formats:
        yield adapter_piece(model)
    if "hf" in formats:
        yield merge_piece("hf", model, plan_merge(model.base, model.adapter, getattr(torch, dtype)), {"dtype": dtype})
    if "mxfp4" in formats:
        plan = plan_merge(model.base, model.adapter, torch.bfloat16, mxfp4_experts=True)
        yield merge_piece("mxfp4", model, plan, {"dtype": "mxfp4"})
    if "gguf" in formats or "ollama" in formats:
        for gguf_type in gguf_types:
            yield gguf_piece(model, gguf_type)
    if "ollama" in formats:
        yield ollama_piece(model, gguf_types[0])


def adapter_piece(model: Model) -> Piece:
    source = model.adapter
    if source is None:
        raise ModelError(f"{model.name} is a model without an adapter: leave the format adapter out")
    size = sum(file.stat().st_size for file in files_below(source))
    return Piece("adapter", "adapter", size, fill=lambda folder, advance: _copy(source, folder, advance))


def _copy(source: Path, target: Path, advance: Advance) -> None:
    for file in files_below(source):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
        advance(file.stat().st_size)


def merge_piece(format_name: Literal["hf", "mxfp4"], model: Model, plan: MergePlan, settings: dict[str, Any]) -> Piece:
    values: dict[Stored, int] = {}
    if plan.mxfp4:
        count = sum(t.weight.experts * t.weight.rows * t.weight.columns for t in plan.tensors if t.store == "mxfp4")
        values = {Stored.MXFP4: count}

    def fill(folder: Path, advance: Advance) -> None:
        apply_merge(plan, folder, advance)

    return Piece(format_name, format_name, plan.bytes, values=values, settings=settings, fill=fill)


def gguf_file(model: Model, gguf_type: GgufType) -> str:
    return f"{model.name}-{gguf_type}.gguf"


def gguf_piece(model: Model, gguf_type: GgufType) -> Piece:
    if gguf_type == "q4_k_m":
        return _quantized_piece(model, gguf_type)
    plan = plan_gguf(model.base, gguf_type, model.adapter)
    values: dict[Stored, int] = {}
    for tensor in plan.tensors:
        values[tensor.stored] = values.get(tensor.stored, 0) + torch.Size(tensor.shape).numel()

    def fill(folder: Path, advance: Advance) -> None:
        write_gguf(model.base, folder / gguf_file(model, gguf_type), gguf_type, model.name, model.adapter, advance)

    settings = {"gguf_type": gguf_type, "name": model.name}
    return Piece(f"gguf-{gguf_type}", "gguf", plan.bytes, values=values, settings=settings, fill=fill)


def _quantized_piece(model: Model, gguf_type: GgufType) -> Piece:
    """A bf16 file that llama.cpp makes the real one of; MachineError where it is not installed."""
    find_quantizer()
    plan = plan_gguf(model.base, "bf16", model.adapter)

    def fill(folder: Path, advance: Advance) -> None:
        source = folder / "bf16.part"
        write_gguf(model.base, source, "bf16", model.name, model.adapter)
        quantize_file(source, folder / gguf_file(model, gguf_type), gguf_type, torch.get_num_threads())
        source.unlink()

    settings = {"gguf_type": gguf_type, "name": model.name}
    size = int(plan.bytes * K_QUANT_BITS / 16)
    return Piece(f"gguf-{gguf_type}", "gguf", size, plan.bytes, settings=settings, fill=fill)


def ollama_piece(model: Model, gguf_type: GgufType) -> Piece:
    """Modelfiles that point at the GGUF file beside them, and the adapter as a GGUF file of its own."""
    tensors = plan_adapter(model.base, model.adapter) if model.adapter else ()
    harmony = vars(model.harmony) if model.harmony else None
    settings = {"gguf_type": gguf_type, "name": model.name, "harmony": harmony, "merged": f"gguf-{gguf_type}"}

    def fill(folder: Path, advance: Advance) -> None:
        if model.adapter is not None:
            write_adapter(model.base, model.adapter, folder / "adapter.gguf", model.name, advance)
        merged = f"../gguf-{gguf_type}/{gguf_file(model, gguf_type)}"
        write_modelfiles(folder, model.base, merged, "adapter.gguf" if model.adapter else None, model.harmony)

    return Piece("ollama", "ollama", sum(tensor.bytes for tensor in tensors), settings=settings, fill=fill)


# ---------------------------------------------------------------- how long, and whether it fits


@dataclass(frozen=True)
class Rates:
    """Measured on this machine when the plan is made."""

    disk: float
    """Bytes per second, written and synced."""
    encoding: dict[Stored, float]
    """Values per second."""

    def seconds(self, piece: Piece) -> float:
        """Arithmetic and the disk work at the same time: the slower one decides."""
        arithmetic = sum(count / self.encoding[stored] for stored, count in piece.values.items())
        return max(piece.bytes / self.disk, arithmetic)


def measure_rates(output: Path, pieces: Sequence[Piece]) -> Rates:
    """A short write where the export will go, and one encoding of each type that it needs."""
    nearest = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    with tempfile.NamedTemporaryFile(dir=nearest, prefix=".posttrain-probe-") as file:
        started = time.perf_counter()
        file.write(torch.zeros(PROBE_BYTES, dtype=torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
        disk = PROBE_BYTES / (time.perf_counter() - started)
    encoding = {}
    values = torch.linspace(-1, 1, PROBE_VALUES).view(-1, 64)
    for stored in sorted({stored for piece in pieces for stored in piece.values}):
        encode(values[:64], stored, "probe")
        started = time.perf_counter()
        encode(values, stored, "probe")
        encoding[stored] = PROBE_VALUES / (time.perf_counter() - started)
    return Rates(disk, encoding)


def require_room(output: Path, pieces: Sequence[Piece]) -> None:
    """MachineError where the disk cannot hold the export, InputError where a folder is not ours."""
    for piece in pieces:
        refuse_foreign(output / piece.folder)
    nearest = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    needed = sum(piece.bytes for piece in pieces) + max((piece.scratch for piece in pieces), default=0)
    free = shutil.disk_usage(nearest).free
    if needed > free:
        raise MachineError(
            f"the export needs {needed / 1e9:.2f} GB and {nearest} has {free / 1e9:.2f} GB free: make room, ask for "
            f"fewer --formats, or choose another disk with --output"
        )


def parse_formats(text: str, allowed: Sequence[Choice], option: str) -> tuple[Choice, ...]:
    """A comma-separated choice; InputError with what is allowed."""
    asked = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in asked if part not in allowed]
    if wrong or not asked:
        raise InputError(
            f"{option} {text!r}: {', '.join(wrong) or 'nothing'} is not known; allowed: {', '.join(allowed)}"
        )
    return tuple(allowed[allowed.index(cast(Choice, part))] for part in asked)
