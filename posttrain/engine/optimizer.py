"""AdamW and its schedules."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from posttrain.recipe.types import AdamW


def make_optimizer(spec: AdamW, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; vectors (biases, norms, sinks) are not decayed."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=spec.learning_rate,
        betas=(spec.beta1, spec.beta2),
        eps=spec.epsilon,
        fused=True,
    )


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
