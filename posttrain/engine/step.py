"""The one training step shared by SFT, preference and GRPO."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from posttrain.engine.forward import batch_logprobs
from posttrain.engine.packing import Item, MicroBatch, pack, plan_micro_batches
from posttrain.errors import PhaseFault
from posttrain.recipe.types import Precision

LossSum = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, float]]]
"""(log-probabilities [N], batch) → (summed loss, sums to report). Both are added up over the micro-batches."""


@dataclass(frozen=True)
class StepReport:
    loss: float
    gradient_norm: float
    """Before clipping."""
    tokens: int
    target_tokens: int
    seconds: float
    sums: dict[str, float]
    items: Sequence[Item]


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    items: Sequence[Item],
    loss_sum: LossSum,
    denominator: float,
    *,
    learning_rate: float,
    clip_norm: float,
    precision: Precision,
    micro_batch_tokens: int,
    step: int,
    temperature: float = 1.0,
) -> StepReport:
    """One update from a whole global batch.

    A loss or gradient norm that is not finite raises PhaseFault before any weight is touched.
    """
    started = time.monotonic()
    sizes = [item.size for item in items]
    loss, first = 0.0, 0
    sums: dict[str, float] = {}
    for numbers in plan_micro_batches(sizes, micro_batch_tokens):
        batch = pack([items[number] for number in numbers], first)
        first = batch.sequences.stop
        total, shown = loss_sum(batch_logprobs(model, batch, precision, temperature), batch)
        (total / denominator).backward()
        loss += total.item() / denominator
        for name, value in shown.items():
            sums[name] = sums.get(name, 0.0) + value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradient_norm = nn.utils.clip_grad_norm_(parameters, clip_norm).item()
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        optimizer.zero_grad()
        raise PhaseFault(
            f"step {step}: loss {loss}, gradient norm {gradient_norm}: not finite, so the weights were left as they "
            f"were after step {step - 1}. Lower optimizer.learning_rate, or look at this step's rows"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["learning_rate_scale"]
    optimizer.step()
    optimizer.zero_grad()
    return StepReport(
        loss=loss,
        gradient_norm=gradient_norm,
        tokens=sum(sizes),
        target_tokens=sum(item.num_targets for item in items),
        seconds=time.monotonic() - started,
        sums=sums,
        items=items,
    )
