"""Merge a stock PEFT adapter into a Hugging Face folder, part by part: plan, then act.

Arithmetic is float32, rounded once. At any time one expert's matrix, or a part of another tensor, is in memory.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from posttrain.engine import mxfp4
from posttrain.errors import ModelError, PhaseFault
from posttrain.export.factors import Factors, plan_factors
from posttrain.export.stream import in_order
from posttrain.export.survival import Survival, Survivals
from posttrain.export.tensors import ShardWriter, TensorFolder, TensorSpec, write_index
from posttrain.export.weights import Weight, find_weights, read_config
from posttrain.run import faults
from posttrain.run.folder import write_json_atomic

COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
    "LICENSE*",
)
SHARD_BYTES = 4 * 1024**3
PART_VALUES = 4 * 1024**2
"""Tensors other than experts are read, merged and written in parts of so many values."""
BLOCK_VALUES = 256 * 1024
"""An expert is quantized in blocks of rows of so many values: the dozen copies that it takes stay small."""
MXFP4_KEPT = (
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
)
"""What a config of a GPT-OSS with MXFP4 experts says is not MXFP4."""
Action = Literal["copy", "cast", "merge"]
Store = Literal["float", "mxfp4"]


@dataclass(frozen=True)
class TensorPlan:
    """One weight: where it comes from, the tensors it is written as, and the adapter's part in it."""

    weight: Weight
    targets: tuple[TensorSpec, ...]
    store: Store
    factors: Factors | None

    @property
    def action(self) -> Action:
        if self.factors:
            return "merge"
        return "copy" if self.targets == self.weight.specs else "cast"

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in self.targets)


@dataclass(frozen=True)
class MergePlan:
    base: Path
    adapter: Path | None
    dtype: torch.dtype
    mxfp4: bool
    """Whether experts are written as MXFP4."""
    tensors: tuple[TensorPlan, ...]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    def lines(self) -> Iterator[str]:
        for tensor in self.tensors:
            rank = f" rank {tensor.factors.rank} scale {tensor.factors.scale:g}" if tensor.factors else ""
            kind = str(tensor.targets[0].dtype).removeprefix("torch.") if tensor.store == "float" else "mxfp4"
            yield f"{tensor.action:5} {tensor.weight.name} {list(tensor.weight.stacked_shape)} {kind}{rank}"


def plan_merge(base: Path, adapter: Path | None, dtype: torch.dtype, mxfp4_experts: bool = False) -> MergePlan:
    """What merging would do to every weight of `base`.

    Raises ModelError for a folder that is not whole, for an adapter that `plan_factors` refuses, and where MXFP4 is
    asked for experts that cannot have it.
    """
    folder, config = TensorFolder(base), read_config(base)
    weights = find_weights(folder, config)
    factors = plan_factors(base, weights, adapter) if adapter else {}
    if mxfp4_experts:
        _refuse_mxfp4(base, config, weights)
    tensors = []
    for name, weight in weights.items():
        store: Store = "mxfp4" if mxfp4_experts and weight.experts else "float"
        tensors.append(TensorPlan(weight, _targets(weight, store, dtype), store, factors.get(name)))
    return MergePlan(base, adapter, dtype, mxfp4_experts, tuple(tensors))


def _refuse_mxfp4(base: Path, config: dict[str, Any], weights: dict[str, Weight]) -> None:
    if config.get("model_type") != "gpt_oss":
        raise ModelError(
            f"{base}: model type {config.get('model_type')!r} has no MXFP4 experts; transformers and vLLM read them "
            f"for gpt_oss only. Choose the format hf, or a GGUF of type q8_0 or q4_0"
        )
    odd = [weight for weight in weights.values() if weight.experts and weight.columns % mxfp4.GROUP]
    if odd:
        raise ModelError(
            f"{base}: {odd[0].name} has {odd[0].columns} inputs, no multiple of {mxfp4.GROUP} as MXFP4 needs: use hf"
        )


def _targets(weight: Weight, store: Store, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
    if store == "mxfp4":
        groups = (weight.experts, weight.rows, weight.columns // mxfp4.GROUP)
        return (
            TensorSpec(f"{weight.name}_blocks", (*groups, mxfp4.GROUP // 2), torch.uint8),
            TensorSpec(f"{weight.name}_scales", groups, torch.uint8),
        )
    if weight.layout == "mxfp4":
        return (TensorSpec(weight.name, weight.stacked_shape, dtype),)
    return tuple(
        TensorSpec(spec.name, spec.shape, dtype if spec.dtype.is_floating_point else spec.dtype)
        for spec in weight.specs
    )


class MergedWeights:
    """Base and adapter read as one set of weights."""

    def __init__(self, base: Path, adapter: Path | None) -> None:
        self.base = TensorFolder(base)
        self.adapter = TensorFolder(adapter / "adapter_model.safetensors") if adapter else None
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._reading = threading.Lock()

    def matrix(self, weight: Weight, factors: Factors | None, expert: int, rows: slice = slice(None)) -> torch.Tensor:
        """One expert's [rows, columns], merged in float32; without factors as stored. It may be a transposed view."""
        return self.merged(select_rows(self.unmerged(weight, expert), rows), factors, expert, rows)

    def unmerged(self, weight: Weight, expert: int) -> torch.Tensor:
        if weight.layout == "mxfp4":
            return mxfp4.decode(*self.codes(weight, expert))
        if weight.layout == "pieces":
            count = weight.pieces
            names = [spec.name for spec in weight.specs[expert * count : (expert + 1) * count]]
            return torch.cat([self.base.read(name) for name in names])
        stored = self.base.read_rows(weight.name, expert, expert + 1)[0]
        return stored.T if weight.layout == "transposed" else stored

    def codes(self, weight: Weight, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's MXFP4 blocks and scales."""
        blocks, scales = (self.base.read_rows(spec.name, expert, expert + 1)[0] for spec in weight.specs)
        return blocks, scales

    def parts(self, weight: Weight, factors: Factors | None) -> Iterator[Callable[[], torch.Tensor]]:
        """A weight without experts in parts along its first dimension, merged in float32; else as stored."""
        (spec,) = weight.specs
        if not spec.shape:
            yield partial(self.base.read, spec.name)
            return
        step = max(1, PART_VALUES * spec.shape[0] // max(1, spec.bytes // spec.dtype.itemsize))
        for start in range(0, spec.shape[0], step):
            yield partial(self._part, spec.name, factors, start, min(start + step, spec.shape[0]))

    def _part(self, name: str, factors: Factors | None, start: int, stop: int) -> torch.Tensor:
        return self.merged(self.base.read_rows(name, start, stop), factors, 0, slice(start, stop))

    def merged(self, stored: torch.Tensor, factors: Factors | None, expert: int, rows: slice) -> torch.Tensor:
        """These rows of a weight, plus the same rows of the expert's change."""
        if factors is None:
            return stored
        low, high = self.change(factors, expert)
        high = high[rows]
        if stored.is_contiguous():
            return stored.float().addmm_(high, low, alpha=factors.scale)
        return stored.T.float().addmm_(low.T, high.T, alpha=factors.scale).T

    def change(self, factors: Factors, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The expert's A [rank, columns] and B [rows, rank]; the change is scale * B A."""
        with self._reading:
            if factors.a not in self._factors:
                assert self.adapter is not None
                a, b = self.adapter.read(factors.a), self.adapter.read(factors.b)
                self._factors = {factors.a: (a.float(), b.float())}
            a, b = self._factors[factors.a]
        return a[expert * factors.rank : (expert + 1) * factors.rank], b[:, expert :: factors.experts].contiguous()


def select_rows(stored: torch.Tensor, rows: slice) -> torch.Tensor:
    """These rows of [rows, columns]; every other row of transposed bfloat16 values comes as float32, which is faster.

    Neighbours in memory are one integer then, and a bfloat16 is the upper half of the same float32.
    """
    if stored.dtype != torch.bfloat16 or stored.is_contiguous() or rows.step != 2:
        return stored[rows]
    pairs = stored.T.view(torch.int32)
    halves = pairs << 16 if rows.start == 0 else pairs & -(1 << 16)
    return halves.view(torch.float32).T


def apply_merge(
    plan: MergePlan, target: Path, advance: Callable[[int], None] = lambda bytes_written: None
) -> Survivals:
    """Write the planned folder into `target`; shards that an interrupted attempt left whole there are kept.

    Returns what of the adapter's change survived quantization, by weight; empty where nothing was quantized. Raises
    PhaseFault with the tensor's name at the first NaN or infinity.
    """
    weights = MergedWeights(plan.base, plan.adapter)
    shards = split_shards(plan)
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{index:05}-of-{len(shards):05}.safetensors" for index in range(1, len(shards) + 1)]
    survivals = Survivals(target)
    for name, shard in zip(names, shards, strict=True):
        if (target / name).exists():
            advance(sum(tensor.bytes for tensor in shard))
            continue
        with ShardWriter(target / name, [spec for tensor in shard for spec in tensor.targets]) as writer:
            for tensor in shard:
                for part in written_parts(tensor, weights, survivals):
                    writer.write(part)
                    advance(part.nbytes)
                faults.reach("merge.tensor_written")
            # Before the shard has its name: a shard that is kept keeps its measurements.
            survivals.save()
        faults.reach("merge.shard_written")
    if len(shards) > 1:
        specs = [[spec for tensor in shard for spec in tensor.targets] for shard in shards]
        write_index(target, specs, names)
    copy_companions(plan, target)
    return survivals


def split_shards(plan: MergePlan, limit: int = SHARD_BYTES) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    held = 0
    for tensor in plan.tensors:
        if shards[-1] and held + tensor.bytes > limit:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.bytes
    return shards


def written_parts(tensor: TensorPlan, weights: MergedWeights, survivals: Survivals) -> Iterator[torch.Tensor]:
    """The bytes of the tensor's targets, in their order."""
    weight, factors, dtype = tensor.weight, tensor.factors, tensor.targets[0].dtype
    if tensor.store == "mxfp4":
        yield from _mxfp4_parts(tensor, weights, survivals)
    elif weight.experts:
        yield from in_order(partial(_expert, tensor, weights, expert) for expert in range(weight.experts))
    else:
        parts = weights.parts(weight, factors)
        yield from in_order(partial(lambda part: finite(part().to(dtype), weight.name), part) for part in parts)


def _expert(tensor: TensorPlan, weights: MergedWeights, expert: int) -> torch.Tensor:
    weight = tensor.weight
    matrix = weights.matrix(weight, tensor.factors, expert)
    stored = matrix if weight.layout in ("plain", "pieces") else matrix.T
    return finite(stored.to(tensor.targets[0].dtype), f"{weight.name}[{expert}]").contiguous()


def _mxfp4_parts(tensor: TensorPlan, weights: MergedWeights, survivals: Survivals) -> Iterator[torch.Tensor]:
    """Blocks expert by expert, then all scales, which are 1/16 of them."""
    kept_scales = []
    survival = Survival(0.0, 0.0)
    experts = range(tensor.weight.experts)
    for blocks, scales, survived in in_order(partial(_mxfp4_expert, tensor, weights, expert) for expert in experts):
        kept_scales.append(scales)
        survival += survived
        yield blocks
    yield torch.stack(kept_scales)
    if tensor.factors is not None:
        survivals.add(tensor.weight.name, survival)


def _mxfp4_expert(
    tensor: TensorPlan, weights: MergedWeights, expert: int
) -> tuple[torch.Tensor, torch.Tensor, Survival]:
    """One expert's blocks and scales, and what of its change is in them."""
    weight, factors = tensor.weight, tensor.factors
    name = f"{weight.name}[{expert}]"
    if weight.layout == "mxfp4" and factors is None:
        blocks, scales = weights.codes(weight, expert)
        if (scales == 255).any():
            raise PhaseFault(f"{name} holds scales that are NaN (code 255); nothing was kept")
        return blocks, scales, Survival(0.0, 0.0)
    found, survival = [], Survival(0.0, 0.0)
    for rows, unmerged, ground in _mxfp4_grounds(weight, weights, expert):
        values = finite(weights.merged(unmerged, factors, expert, rows).contiguous(), name)
        if factors is None:
            found.append(ground)
            continue
        found.append(mxfp4.encode_change(values, ground))
        low, high = weights.change(factors, expert)
        change = (high[rows] @ low) * factors.scale
        survival += Survival.measured(change, mxfp4.decode(*found[-1]) - mxfp4.decode(*ground))
    blocks, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    return blocks, scales, survival


def _mxfp4_grounds(
    weight: Weight, weights: MergedWeights, expert: int
) -> Iterator[tuple[slice, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
    """An expert before the merge, in blocks of rows: which, their values, and those as MXFP4."""
    step = max(1, BLOCK_VALUES // weight.columns)
    blocks = [slice(start, start + step) for start in range(0, weight.rows, step)]
    if weight.layout == "mxfp4":
        codes, scales = weights.codes(weight, expert)
        for rows in blocks:
            yield rows, mxfp4.decode(codes[rows], scales[rows]), (codes[rows], scales[rows])
        return
    stored = weights.unmerged(weight, expert)
    for rows in blocks:
        values = stored[rows].contiguous()
        yield rows, values, mxfp4.encode(values)


def finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor; PhaseFault with its name where a value is NaN or infinite."""
    # NaN passes through both extremes: one fast pass over the values in the order they lie in.
    lying = tensor if tensor.is_contiguous() or tensor.dim() != 2 else tensor.T
    if tensor.is_floating_point() and tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(lying))).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise PhaseFault(
            f"{count} of {tensor.numel()} values of {name} would be NaN or infinite; nothing was kept. Does the "
            f"base or the adapter hold them?"
        )
    return tensor


def copy_companions(plan: MergePlan, target: Path) -> None:
    """Config with the new type, and the tokenizer, template and generation files as they are."""
    config = read_config(plan.base)
    config.pop("torch_dtype", None)
    config["dtype"] = str(plan.dtype).removeprefix("torch.")
    config.pop("quantization_config", None)
    if plan.mxfp4:
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": list(MXFP4_KEPT)}
    write_json_atomic(target / "config.json", config)
    for pattern in COPIED:
        for file in sorted(plan.base.glob(pattern)):
            shutil.copyfile(file, target / file.name)
