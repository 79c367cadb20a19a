"""A LoRA adapter as a GGUF file that llama.cpp puts on a base: dense weights and experts alike.

llama.cpp's names are those of the weights with `.lora_a` and `.lora_b` behind; A is [rank, in] and B [out, rank], for
experts with the expert in front; the scale is alpha over the rank it sees.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from gguf import GGUFWriter

from posttrain.errors import ModelError
from posttrain.export.factors import Factors, plan_factors
from posttrain.export.gguf import GgufTensor, gguf_names, rotate_pairs, rotated_heads, rows_of, write_tensors
from posttrain.export.gguf_layout import Config, Family, family_of
from posttrain.export.gguf_types import Stored
from posttrain.export.merge import MergedWeights, finite
from posttrain.export.tensors import TensorFolder
from posttrain.export.weights import Weight, find_weights


def plan_adapter(base: Path, adapter: Path) -> tuple[GgufTensor, ...]:
    """The file's tensors; ModelError for a target that llama.cpp puts no adapter on."""
    family, config = family_of(base)
    weights = find_weights(TensorFolder(base), config)
    merged = MergedWeights(base, adapter)
    found: list[GgufTensor] = []
    for name, factors in plan_factors(base, weights, adapter).items():
        names = gguf_names(name, family)
        if names is None or names[0] in ("token_embd.weight", "output.weight") or "ffn_gate_inp" in names[0]:
            raise ModelError(
                f"adapter {adapter}: llama.cpp puts no adapter on {name}; merge it instead (--formats gguf)"
            )
        for index, gguf_name in enumerate(names):
            found += _pair(gguf_name, index, len(names), merged, weights[name], factors, family, config)
    return tuple(sorted(found, key=lambda tensor: tensor.name))


def _pair(
    name: str,
    index: int,
    count: int,
    merged: MergedWeights,
    weight: Weight,
    factors: Factors,
    family: Family,
    config: Config,
) -> Iterator[GgufTensor]:
    rows = weight.rows // count
    front = (weight.experts,) if weight.experts else ()
    half, heads = rows_of(family, index, count, rows), rotated_heads(name, family, config)

    def low(expert: int) -> torch.Tensor:
        return finite(merged.change(factors, expert)[0], factors.a)

    def high(expert: int) -> torch.Tensor:
        part = merged.change(factors, expert)[1][half]
        return finite(rotate_pairs(part, heads) if heads else part.contiguous(), factors.b)

    def parts(side: Callable[[int], torch.Tensor]) -> Iterator[Callable[[], torch.Tensor]]:
        return (partial(side, expert) for expert in range(factors.experts))

    yield GgufTensor(f"{name}.lora_a", (*front, factors.rank, weight.columns), Stored.F32, lambda: parts(low))
    yield GgufTensor(f"{name}.lora_b", (*front, rows, factors.rank), Stored.F32, lambda: parts(high))


def write_adapter(
    base: Path,
    adapter: Path,
    file: Path,
    name: str,
    advance: Callable[[int], None] = lambda bytes_written: None,
) -> None:
    """Write `file`; it has its name when all of it is on the disk."""
    tensors = plan_adapter(base, adapter)
    family, config = family_of(base)
    factors = next(iter(plan_factors(base, find_weights(TensorFolder(base), config), adapter).values()))
    head = file.with_name(f".{file.name}.head")
    writer = GGUFWriter(head, family.architecture)
    try:
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", factors.scale * factors.rank)
        write_tensors(writer, head, file, tensors, advance)
    finally:
        writer.close()
        head.unlink(missing_ok=True)
