"""What a stock PEFT adapter changes in a model folder: the two factors of every tensor, found without reading weights.

PEFT's layout for expert parameters: `lora_A` is (E*r, in) with the expert slowest, `lora_B` is (out, r*E) with the
expert fastest; wrappers of several parameters of one module nest in the order the module declares them, the first one
innermost, so `experts.base_layer.lora_A` belongs to `gate_up_proj` and `experts.lora_A` to `down_proj`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import ModelError
from posttrain.export.tensors import TensorFolder
from posttrain.export.weights import Weight, weights_by_module

PREFIX = "base_model.model."
LORA_KEY = re.compile(r"(?P<module>.+?)(?P<nested>(?:\.base_layer)*)\.lora_(?P<side>[AB])\.weight")
DECLARED = ("gate_up_proj", "down_proj", "weight")
"""Parameters an adapter can target, in the order modules declare them: the order PEFT nests its wrappers in."""


@dataclass(frozen=True)
class Factors:
    """The two adapter tensors of one weight; the change is scale * B A for every expert."""

    a: str
    b: str
    scale: float
    rank: int
    experts: int


def plan_factors(base: Path, weights: dict[str, Weight], adapter: Path) -> dict[str, Factors]:
    """The adapter's tensors by the weight they change; every one of them is used.

    Raises ModelError for an adapter made for another model, an incomplete one, and PEFT settings that change what an
    adapter means and are not supported here.
    """
    config = read_adapter_config(adapter)
    tensors = TensorFolder(adapter / "adapter_model.safetensors")
    sides: dict[str, dict[str, str]] = {}
    for key in tensors.specs:
        match = LORA_KEY.fullmatch(key.removeprefix(PREFIX))
        name = _target_of(match["module"], match["nested"].count(".base_layer"), weights, config) if match else None
        if match is None or name is None:
            raise ModelError(
                f"adapter {adapter}: tensor {key} has no place in the model {base}. Was the adapter made for "
                f"another base ({config.get('base_model_name_or_path')})?"
            )
        sides.setdefault(name, {})[match["side"]] = key
    _refuse_missing(adapter, base, weights, config, sides)
    return {name: _checked(adapter, base, tensors, config, weights[name], keys) for name, keys in sides.items()}


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


def _wrapped(module: str, weights: dict[str, Weight], config: dict[str, Any]) -> list[str]:
    """The parameters of `module` that PEFT wraps, innermost first."""
    names = [f"{module}.{parameter}" for parameter in DECLARED]
    present = [name for name in names if name in weights]
    if _matches(module, config.get("target_modules")):
        return [name for name in present if name.endswith(".weight")]
    return [name for name in present if _matches(name, config.get("target_parameters"))]


def _target_of(module: str, depth: int, weights: dict[str, Weight], config: dict[str, Any]) -> str | None:
    wrapped = _wrapped(module, weights, config)
    return wrapped[-1 - depth] if depth < len(wrapped) else None


def _refuse_missing(
    adapter: Path, base: Path, weights: dict[str, Weight], config: dict[str, Any], sides: dict[str, dict[str, str]]
) -> None:
    """Raise if a weight that the adapter's config names lacks a factor, or the config names nothing here."""
    named = [name for module in weights_by_module(weights) for name in _wrapped(module, weights, config)]
    incomplete = [name for name in {*named, *sides} if set(sides.get(name, {})) != {"A", "B"}]
    if incomplete:
        raise ModelError(f"adapter {adapter} lacks a lora_A or lora_B tensor for {min(incomplete)}: it is incomplete")
    if not named:
        raise ModelError(f"adapter {adapter} changes no tensor of {base}: it was made for another base")


def _checked(
    adapter: Path, base: Path, tensors: TensorFolder, config: dict[str, Any], weight: Weight, keys: dict[str, str]
) -> Factors:
    rank, experts = int(config["r"]), max(weight.experts, 1)
    wanted = {"A": (experts * rank, weight.columns), "B": (weight.rows, rank * experts)}
    for side, expected in wanted.items():
        found = tensors.specs[keys[side]].shape
        if found != expected:
            raise ModelError(
                f"adapter {adapter}: tensor {keys[side]} has shape {list(found)}, but {weight.name} "
                f"{list(weight.stacked_shape)} of {base} needs {list(expected)} at rank {rank}: the adapter was made "
                f"for another base"
            )
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    return Factors(keys["A"], keys["B"], scale, rank, experts)
