"""Merge a stock PEFT adapter into a Hugging Face folder, tensor by tensor: plan, then act.

PEFT's layout for expert parameters: `lora_A` is (E*r, in) with the expert slowest, `lora_B` is (out, r*E) with the
expert fastest; wrappers of several parameters of one module nest in the order the module declares them, the first one
innermost, so `experts.base_layer.lora_A` belongs to `gate_up_proj` and `experts.lora_A` to `down_proj`.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from posttrain.errors import ModelError, PhaseFault
from posttrain.export.tensors import ShardWriter, TensorFolder, TensorSpec, write_index
from posttrain.run import faults
from posttrain.run.folder import write_json_atomic

PREFIX = "base_model.model."
LORA_KEY = re.compile(r"(?P<module>.+?)(?P<nested>(?:\.base_layer)*)\.lora_(?P<side>[AB])\.weight")
DECLARED = ("gate_up_proj", "down_proj", "weight")
"""Parameters an adapter can target, in the order modules declare them: the order PEFT nests its wrappers in."""
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
    "LICENSE*",
)
SHARD_BYTES = 4 * 1024**3
Action = Literal["copy", "cast", "merge"]


@dataclass(frozen=True)
class Factors:
    """The two adapter tensors of one base tensor; the change is scale * B A."""

    a: str
    b: str
    scale: float
    rank: int


@dataclass(frozen=True)
class TensorPlan:
    source: TensorSpec
    target: TensorSpec
    factors: Factors | None

    @property
    def action(self) -> Action:
        if self.factors:
            return "merge"
        return "copy" if self.source.dtype == self.target.dtype else "cast"


@dataclass(frozen=True)
class MergePlan:
    base: Path
    adapter: Path | None
    dtype: torch.dtype
    tensors: tuple[TensorPlan, ...]

    @property
    def bytes(self) -> int:
        return sum(tensor.target.bytes for tensor in self.tensors)

    def lines(self) -> Iterator[str]:
        for tensor in self.tensors:
            rank = f" rank {tensor.factors.rank} scale {tensor.factors.scale:g}" if tensor.factors else ""
            dtype = str(tensor.target.dtype).removeprefix("torch.")
            yield f"{tensor.action:5} {tensor.target.name} {list(tensor.target.shape)} {dtype}{rank}"


def plan_merge(base: Path, adapter: Path | None, dtype: torch.dtype) -> MergePlan:
    """What merging would do to every tensor of `base`.

    Raises ModelError for an adapter made for another model, an incomplete one, and PEFT settings that change what an
    adapter means and are not supported here.
    """
    folder = TensorFolder(base)
    blocks = [name for name in folder.specs if name.endswith(("_blocks", "_scales"))]
    if blocks:
        raise ModelError(f"{base} holds MXFP4 blocks ({blocks[0]}): save a dequantized copy of the model first")
    factors = plan_factors(folder, adapter) if adapter else {}
    tensors = []
    for name, source in sorted(folder.specs.items()):
        target = TensorSpec(name, source.shape, dtype if source.dtype.is_floating_point else source.dtype)
        tensors.append(TensorPlan(source, target, factors.get(name)))
    return MergePlan(base, adapter, dtype, tuple(tensors))


def plan_factors(base: TensorFolder, adapter: Path) -> dict[str, Factors]:
    """The adapter's tensors by the base tensor they change; every one of them is used."""
    config = read_adapter_config(adapter)
    tensors = TensorFolder(adapter / "adapter_model.safetensors")
    sides: dict[str, dict[str, str]] = {}
    for key in tensors.specs:
        match = LORA_KEY.fullmatch(key.removeprefix(PREFIX))
        name = _target_of(match["module"], match["nested"].count(".base_layer"), base, config) if match else None
        if match is None or name is None:
            raise ModelError(
                f"adapter {adapter}: tensor {key} has no place in the model {base.path}. Was the adapter made for "
                f"another base ({config.get('base_model_name_or_path')})?"
            )
        sides.setdefault(name, {})[match["side"]] = key
    _refuse_missing(adapter, base, config, sides)
    return {name: _checked_factors(adapter, base, tensors, config, name, keys) for name, keys in sides.items()}


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    try:
        config = json.loads((adapter / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{adapter} is no PEFT adapter: {error}") from error
    plain: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",),
        "bias": ("none", None),
        "use_dora": (False, None),
        "fan_in_fan_out": (False, None),
        "lora_bias": (False, None),
        "rank_pattern": ({}, None),
        "alpha_pattern": ({}, None),
        "modules_to_save": ([], None),
        "layers_to_transform": ([], None),
    }
    for setting, allowed in plain.items():
        if config.get(setting, allowed[-1]) not in allowed:
            raise ModelError(
                f"adapter {adapter}: {setting} is {config.get(setting)!r}, which cannot be merged here; "
                f"allowed is {allowed[0]!r}"
            )
    return config


def _matches(name: str, targets: list[str] | str | None) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets or [])


def _wrapped(module: str, base: TensorFolder, config: dict[str, Any]) -> list[str]:
    """The parameters of `module` that PEFT wraps, innermost first."""
    names = [f"{module}.{parameter}" for parameter in DECLARED]
    present = [name for name in names if name in base.specs]
    if _matches(module, config.get("target_modules")):
        return [name for name in present if name.endswith(".weight")]
    return [name for name in present if _matches(name, config.get("target_parameters"))]


def _target_of(module: str, depth: int, base: TensorFolder, config: dict[str, Any]) -> str | None:
    wrapped = _wrapped(module, base, config)
    return wrapped[-1 - depth] if depth < len(wrapped) else None


def _refuse_missing(
    adapter: Path, base: TensorFolder, config: dict[str, Any], sides: dict[str, dict[str, str]]
) -> None:
    """Raise if a base tensor that the adapter's config names lacks a factor, or the config names nothing here."""
    modules = sorted({name.rpartition(".")[0] for name in base.specs})
    named = [name for module in modules for name in _wrapped(module, base, config)]
    incomplete = [name for name in {*named, *sides} if set(sides.get(name, {})) != {"A", "B"}]
    if incomplete:
        raise ModelError(f"adapter {adapter} lacks a lora_A or lora_B tensor for {min(incomplete)}: it is incomplete")
    if not named:
        raise ModelError(f"adapter {adapter} changes no tensor of {base.path}: it was made for another base")


def _checked_factors(
    adapter: Path, base: TensorFolder, tensors: TensorFolder, config: dict[str, Any], name: str, keys: dict[str, str]
) -> Factors:
    rank, shape = int(config["r"]), base.specs[name].shape
    if len(shape) == 3:
        experts, size_in, size_out = shape
    else:
        experts, (size_out, size_in) = 1, shape
    wanted = {"A": (experts * rank, size_in), "B": (size_out, rank * experts)}
    for side, expected in wanted.items():
        found = tensors.specs[keys[side]].shape
        if found != expected:
            raise ModelError(
                f"adapter {adapter}: tensor {keys[side]} has shape {list(found)}, but {name} {list(shape)} of "
                f"{base.path} needs {list(expected)} at rank {rank}: the adapter was made for another base"
            )
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    return Factors(keys["A"], keys["B"], scale, rank)


def apply_merge(plan: MergePlan, target: Path, advance: Callable[[int], None] = lambda bytes_written: None) -> None:
    """Write the planned folder into the empty folder `target`, holding one tensor (of experts: one slice) at a time.

    Arithmetic is float32, rounded once. Raises PhaseFault with the tensor's name at the first NaN or infinity.
    """
    base = TensorFolder(plan.base)
    adapter = TensorFolder(plan.adapter / "adapter_model.safetensors") if plan.adapter else None
    shards = split_shards(plan)
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{index:05}-of-{len(shards):05}.safetensors" for index in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        with ShardWriter(target / name, [tensor.target for tensor in shard]) as writer:
            for tensor in shard:
                for part in merged_parts(tensor, base, adapter):
                    writer.write(part)
                    advance(part.nbytes)
        faults.reach("merge.shard_written")
    if len(shards) > 1:
        write_index(target, [[tensor.target for tensor in shard] for shard in shards], names)
    copy_companions(plan.base, target, plan.dtype)


def split_shards(plan: MergePlan, limit: int = SHARD_BYTES) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    held = 0
    for tensor in plan.tensors:
        if shards[-1] and held + tensor.target.bytes > limit:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.target.bytes
    return shards


def merged_parts(tensor: TensorPlan, base: TensorFolder, adapter: TensorFolder | None) -> Iterator[torch.Tensor]:
    """The merged tensor in slices along its first dimension, or whole where it is no stack of experts."""
    name = tensor.source.name
    if len(tensor.source.shape) != 3:
        weight = base.read(name)
        if tensor.factors:
            a, b = _read_factors(tensor.factors, adapter)
            weight = weight.float() + (b @ a) * tensor.factors.scale
        yield _finite(weight.to(tensor.target.dtype), name)
        return
    experts = tensor.source.shape[0]
    if tensor.factors:
        a, b = _read_factors(tensor.factors, adapter)
    for expert in range(experts):
        weight = base.read_slice(name, expert)
        if tensor.factors:
            rank = tensor.factors.rank
            low, high = a[expert * rank : (expert + 1) * rank], b[:, expert::experts]
            weight = weight.float() + (high @ low).T * tensor.factors.scale
        yield _finite(weight.to(tensor.target.dtype), f"{name}[{expert}]")


def _read_factors(factors: Factors, adapter: TensorFolder | None) -> tuple[torch.Tensor, torch.Tensor]:
    assert adapter is not None
    # Cloned: a product's last bit depends on the alignment of its operands, and a mapped file gives any.
    return adapter.read(factors.a).float().clone(), adapter.read(factors.b).float().clone()


def _finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise PhaseFault(f"merging made {count} of {tensor.numel()} values of {name} NaN or infinite; nothing was kept")
    return tensor


def copy_companions(base: Path, target: Path, dtype: torch.dtype) -> None:
    """Config with the new dtype, and the tokenizer, template and generation files as they are."""
    config = json.loads((base / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json_atomic(target / "config.json", config)
    for pattern in COPIED:
        for file in sorted(base.glob(pattern)):
            shutil.copyfile(file, target / file.name)
