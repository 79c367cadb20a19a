"""AdamW and its schedules."""

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from posttrain.errors import MachineError, ModelError
from posttrain.recipe.types import AdamW


def make_optimizer(spec: AdamW, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over the named parameters in the groups of `parameter_groups`; raises MachineError without the library
    that 8-bit moments are from."""
    groups = list(parameter_groups(spec, parameters))
    fields: dict[str, Any] = {
        "lr": spec.learning_rate,
        "betas": (spec.beta1, spec.beta2),
        "eps": spec.epsilon,
    }
    if spec.moments == "float32":
        return torch.optim.AdamW(groups, **fields, fused=True)
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise MachineError(
            "optimizer.moments 8bit needs the library bitsandbytes: pip install 'posttrain[cuda]', or use float32"
        ) from error
    return AdamW8bit(groups, **fields)


def parameter_groups(spec: AdamW, parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Any]]:
    """The recipe's groups, then all other parameters; each with weight decay on matrices only, not on vectors (biases,
    norms, sinks). `learning_rate_scale` is for who sets the rates.

    Raises ModelError for a pattern that matches none of the parameters left by those before it.
    """
    left = dict(parameters)
    for group in spec.groups:
        chosen = {name: left.pop(name) for name in [*left] if fnmatchcase(name, group.pattern)}
        if not chosen:
            taken = "" if len(left) == len(parameters) else " that no earlier group has taken"
            raise ModelError(
                f"optimizer.groups: {group.pattern!r} matches no trained parameter{taken}; "
                f"names are such as {', '.join(list(left)[:4])}"
            )
        yield from _by_decay(chosen, group.learning_rate_scale, spec.weight_decay * group.weight_decay_scale)
    yield from _by_decay(left, 1.0, spec.weight_decay)


def _by_decay(parameters: Mapping[str, nn.Parameter], scale: float, decay: float) -> Iterator[dict[str, Any]]:
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    for chosen, weight_decay in ((matrices, decay), (vectors, 0.0)):
        if chosen:
            yield {"params": chosen, "weight_decay": weight_decay, "learning_rate_scale": scale}


def learning_rate(spec: AdamW, step: int, steps: int) -> float:
    """The rate of 1-based `step` of `steps`: a linear rise, then the schedule down to its final share."""
    warmup = round(spec.warmup_share * steps)
    if step <= warmup:
        return spec.learning_rate * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if spec.schedule == "constant":
        return spec.learning_rate
    left = 1 - done if spec.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return spec.learning_rate * (spec.final_share + (1 - spec.final_share) * left)
