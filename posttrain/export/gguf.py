"""Write a model folder, with or without an adapter, as one GGUF file that llama.cpp loads: merged, quantized and
written in one pass.

Expert weights are stored (expert, out, in) with gate and up apart; norms, biases, sinks and the router stay float32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gguf import GGML_QUANT_SIZES, GGUFWriter

from posttrain.engine import mxfp4
from posttrain.errors import ModelError
from posttrain.export.factors import Factors, plan_factors
from posttrain.export.gguf_layout import (
    MODEL_NAMES,
    Config,
    Family,
    add_hyperparameters,
    family_of,
    rope_factors,
)
from posttrain.export.gguf_types import FILE_TYPES, FLOATS, STORED, GgufType, Stored, encode, stored_bytes
from posttrain.export.gguf_vocabulary import add_vocabulary, read_vocabulary
from posttrain.export.merge import BLOCK_VALUES, MergedWeights, finite
from posttrain.export.stream import FileStream, in_order
from posttrain.export.tensors import TensorFolder, as_bytes
from posttrain.export.weights import Weight, find_weights
from posttrain.run import faults

KEPT_FLOAT32 = (".bias", "norm.weight", "sinks.weight", "ffn_gate_inp.weight", "rope_freqs.weight")
ALIGNMENT = 32
Part = Callable[[], torch.Tensor]
Parts = Callable[[], Iterator[Part]]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file; `parts` computes its bytes as they are stored."""

    name: str
    shape: tuple[int, ...]
    """Slowest dimension first, as numpy counts."""
    stored: Stored
    parts: Parts

    @property
    def bytes(self) -> int:
        return stored_bytes(self.shape, self.stored)


@dataclass(frozen=True)
class GgufPlan:
    family: Family
    config: Config
    file_type: str
    tensors: tuple[GgufTensor, ...]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)


def resolved_type(gguf_type: GgufType, family: Family) -> str:
    """What `auto` means for the family; ModelError for MXFP4 where there are no experts to hold it."""
    has_experts = "ffn_gate_inp" in family.layer_names.values()
    if gguf_type == "auto":
        return "mxfp4" if family.architecture == "gpt-oss" else "q8_0"
    if gguf_type == "mxfp4" and not has_experts:
        raise ModelError(f"GGUF type mxfp4 is for experts; {family.architecture} has none: choose q8_0 or q4_0")
    return gguf_type


def plan_gguf(folder: Path, gguf_type: GgufType, adapter: Path | None = None) -> GgufPlan:
    """Every tensor of the GGUF file; raises ModelError for a model or a tensor that has no place in one."""
    family, config = family_of(folder)
    file_type = resolved_type(gguf_type, family)
    weights = find_weights(TensorFolder(folder), config)
    factors = plan_factors(folder, weights, adapter) if adapter else {}
    merged = MergedWeights(folder, adapter)
    tensors: list[GgufTensor] = []
    for name, weight in weights.items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue  # the embedding's copy: llama.cpp takes the embedding where the output is absent
        source = Source(merged, weight, factors.get(name), family, config)
        names = gguf_names(name, family)
        if names is None:
            raise ModelError(f"tensor {name} of {folder} has no place in a {family.architecture} GGUF file")
        for index, gguf_name in enumerate(names):
            tensors.append(source.tensor(gguf_name, file_type, index, len(names)))
    divisors = rope_factors(config)
    if divisors is not None:
        tensors.append(
            GgufTensor("rope_freqs.weight", tuple(divisors.shape), Stored.F32, lambda: iter([lambda: divisors]))
        )
    return GgufPlan(family, config, file_type, tuple(sorted(tensors, key=lambda tensor: tensor.name)))


def gguf_names(name: str, family: Family) -> list[str] | None:
    """What llama.cpp calls a weight: two names where gate and up are one; None where it has no place."""
    base, kind = name, "weight"
    for suffix in (".weight", ".bias", "_bias"):
        if name.endswith(suffix):
            base, kind = name.removesuffix(suffix), suffix[1:]
    if base in MODEL_NAMES:
        return [f"{MODEL_NAMES[base]}.{kind}"]
    layer, _, rest = base.removeprefix("model.layers.").partition(".")
    if not layer.isdigit() or rest not in family.layer_names:
        return None
    return [f"blk.{layer}.{part}.{kind}" for part in family.layer_names[rest].split()]


@dataclass(frozen=True)
class Source:
    """One weight, and how it becomes tensors of the file."""

    merged: MergedWeights
    weight: Weight
    factors: Factors | None
    family: Family
    config: Config

    def tensor(self, name: str, file_type: str, index: int, count: int) -> GgufTensor:
        """The `index`-th of `count` tensors that the weight's rows are split into."""
        weight = self.weight
        if weight.experts:
            rows = weight.rows // count
            half = rows_of(self.family, index, count, rows)
            shape: tuple[int, ...] = (weight.experts, rows, weight.columns)
            stored = self._stored(name, shape, "mxfp4" if file_type == "mxfp4" else file_type, experts=True)
            return GgufTensor(name, shape, stored, lambda: self._expert_parts(name, stored, half))
        shape = weight.specs[0].shape
        if count > 1:  # a bias of gate and up
            half = rows_of(self.family, index, count, shape[1] // count)
            shape = (shape[0], shape[1] // count)
            return GgufTensor(name, shape, Stored.F32, lambda: self._split_bias(name, half))
        stored = self._stored(name, shape, file_type, experts=False)
        return GgufTensor(name, shape, stored, lambda: self._parts(name, stored))

    def _stored(self, name: str, shape: tuple[int, ...], file_type: str, experts: bool) -> Stored:
        wanted = Stored.MXFP4 if file_type == "mxfp4" and experts else STORED[file_type]
        if name.endswith(KEPT_FLOAT32) or len(shape) < 2 or shape[-1] % GGML_QUANT_SIZES[wanted][0] != 0:
            return Stored.F32
        return wanted

    def _expert_parts(self, name: str, stored: Stored, half: slice) -> Iterator[Part]:
        packed = stored == Stored.MXFP4 and self.weight.layout == "mxfp4"
        for expert in range(self.weight.experts):
            if packed:
                yield partial(self._packed, name, expert, half)
            else:
                yield partial(self._expert, name, stored, expert, half)

    def _expert(self, name: str, stored: Stored, expert: int, half: slice) -> torch.Tensor:
        what = f"{self.weight.name}[{expert}]"
        matrix = self.merged.matrix(self.weight, self.factors, expert, half)
        if stored in FLOATS:
            return encode(finite(matrix, what), stored, name)
        rows = matrix.split(max(1, BLOCK_VALUES // matrix.shape[1]))
        return torch.cat([encode(finite(part.contiguous(), what), stored, name) for part in rows])

    def _packed(self, name: str, expert: int, half: slice) -> torch.Tensor:
        """From MXFP4 to MXFP4: codes that nothing changed are only laid out anew."""
        before = self.merged.codes(self.weight, expert)
        if self.factors is not None:
            matrix = finite(self.merged.matrix(self.weight, self.factors, expert), f"{name}[{expert}]")
            before = mxfp4.encode_change(matrix, before)
        blocks, scales = before
        return mxfp4.to_ggml(blocks[half], scales[half])

    def _split_bias(self, name: str, half: slice) -> Iterator[Part]:
        for part in self.merged.parts(self.weight, self.factors):
            yield partial(lambda part: encode(finite(part()[..., half], name), Stored.F32, name), part)

    def _parts(self, name: str, stored: Stored) -> Iterator[Part]:
        heads = rotated_heads(name, self.family, self.config)
        parts = self.merged.parts(self.weight, self.factors)
        if heads:
            # Heads lie in several parts.
            whole = list(parts)
            parts = iter([lambda: rotate_pairs(torch.cat([part() for part in whole]), heads)])
        for part in parts:
            yield partial(self._encoded, part, name, stored)

    def _encoded(self, part: Part, name: str, stored: Stored) -> torch.Tensor:
        values = part()
        if self.family.norm_offset and name.endswith("norm.weight"):
            values = values.float() + self.family.norm_offset
        return encode(finite(values, self.weight.name), stored, name)


def rows_of(family: Family, index: int, count: int, rows: int) -> slice:
    """The rows of the `index`-th of `count` weights that are stored as one."""
    return slice(index, None, count) if family.interleaved else slice(index * rows, (index + 1) * rows)


def rotated_heads(name: str, family: Family, config: Config) -> int:
    """The heads whose rows are reordered; 0 where none are."""
    part = name.split(".")[-2]
    if not family.rotated_pairs or part not in ("attn_q", "attn_k"):
        return 0
    return int(config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"])


def rotate_pairs(whole: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows with the halves of every head, which lie one above the other, made neighbours."""
    return whole.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(whole.shape)


def write_gguf(
    folder: Path,
    file: Path,
    gguf_type: GgufType,
    name: str,
    adapter: Path | None = None,
    advance: Callable[[int], None] = lambda bytes_written: None,
) -> None:
    """Write `file`, one expert's matrix in memory at a time. It has its name when all of it is on the disk.

    Raises ModelError for a model whose settings llama.cpp has fixed otherwise.
    """
    plan = plan_gguf(folder, gguf_type, adapter)
    vocabulary = read_vocabulary(folder, plan.config["vocab_size"])
    head = file.with_name(f".{file.name}.head")
    writer = GGUFWriter(head, plan.family.architecture)
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[plan.file_type])
        writer.add_quantization_version(2)
        add_hyperparameters(writer, plan.family, plan.config)
        add_vocabulary(writer, vocabulary, plan.config, folder)
        write_tensors(writer, head, file, plan.tensors, advance)
    finally:
        writer.close()
        head.unlink(missing_ok=True)


def write_tensors(
    writer: GGUFWriter,
    head: Path,
    file: Path,
    tensors: tuple[GgufTensor, ...],
    advance: Callable[[int], None] = lambda bytes_written: None,
) -> None:
    """Finish a writer's file: its header goes to `head`, and with the tensors' bytes behind it to `file`."""
    for tensor in tensors:
        announced = torch.empty(0, dtype=FLOATS.get(tensor.stored, torch.uint8))
        shape = tensor.shape
        if tensor.stored not in FLOATS:
            block, size = GGML_QUANT_SIZES[tensor.stored]
            shape = (*shape[:-1], shape[-1] // block * size)
        dtype = announced.view(torch.uint8 if tensor.stored == Stored.BF16 else announced.dtype).numpy().dtype
        if tensor.stored == Stored.BF16:
            shape = (*shape[:-1], shape[-1] * 2)
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.bytes, raw_dtype=tensor.stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.flush()
    with FileStream(file) as stream:
        header = head.read_bytes()
        stream.write(header + bytes(-len(header) % ALIGNMENT))
        for tensor in tensors:
            written = 0
            for part in in_order(tensor.parts()):
                if part.numel():
                    stream.write(as_bytes(part.contiguous()))
                written += part.nbytes
                advance(part.nbytes)
            assert written == tensor.bytes, f"{tensor.name}: {written} bytes written, {tensor.bytes} announced"
            stream.write(bytes(-written % ALIGNMENT))
            faults.reach("gguf.tensor_written")
