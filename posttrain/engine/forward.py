"""The forward pass over a packed row, shared by training, reference log-probabilities and evaluation."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.engine.head import capped, target_logprobs
from posttrain.engine.packing import Item, MicroBatch, filled_up, pack, plan_micro_batches
from posttrain.recipe.types import Precision


def precision_context(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if precision == "float32" else torch.autocast(device.type, dtype=torch.bfloat16)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the layers are; the vocabulary may be elsewhere."""
    return next(model.get_decoder().layers.parameters()).device


def hidden_states(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """The last layer's normed states [T, H] of one packed row."""
    device = device_of(model)
    output = model.get_decoder()(
        input_ids=batch.input_ids_1T.to(device, non_blocking=True),
        position_ids=batch.position_ids_1T.to(device, non_blocking=True),
        attention_mask=None,
        use_cache=False,
        plan=batch.plan,
    )
    states_TH: torch.Tensor = output.last_hidden_state[0]
    return states_TH


def head_weight(model: PreTrainedModel) -> torch.Tensor:
    """The output head's matrix [V, H], on the layers' device."""
    return cast(nn.Linear, model.get_output_embeddings()).weight.to(device_of(model), non_blocking=True)


def _softcap(model: PreTrainedModel) -> float | None:
    return getattr(model.config, "final_logit_softcapping", None)


def next_logits(model: PreTrainedModel, hidden_BH: torch.Tensor) -> torch.Tensor:
    """Float32 logits [B, V] of normed states."""
    return capped(nn.functional.linear(hidden_BH, head_weight(model)), _softcap(model)).float()


def batch_logprobs(
    model: PreTrainedModel, batch: MicroBatch, precision: Precision, temperature: float = 1.0
) -> torch.Tensor:
    """Float32 log-probabilities [N] at the batch's targets, on the CPU: objectives are small and need no device."""
    device = device_of(model)
    if device.type == "cpu" and precision != "float32":
        batch = filled_up(batch)
    with precision_context(precision, device):
        hidden_TH = hidden_states(model, batch)
        source_N, target_N = (numbers_N.to(device) for numbers_N in (batch.source_N, batch.target_N))
        return target_logprobs(hidden_TH, head_weight(model), source_N, target_N, temperature, _softcap(model)).cpu()


@torch.no_grad()
def token_logprobs(
    model: PreTrainedModel,
    items: Sequence[Item],
    precision: Precision,
    micro_batch_tokens: int,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and number of the sequence of every target of every item, both [N]."""
    logprobs, owners, first = [torch.empty(0)], [torch.empty(0, dtype=torch.long)], 0
    for group in plan_micro_batches([item.size for item in items], micro_batch_tokens):
        batch = pack([items[number] for number in group], first)
        first = batch.sequences.stop
        logprobs.append(batch_logprobs(model, batch, precision, temperature))
        owners.append(batch.sequence_N)
    return torch.cat(logprobs), torch.cat(owners)


def sequence_logprobs(
    model: PreTrainedModel, items: Sequence[Item], precision: Precision, micro_batch_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probability and target count of every sequence of every item, both [S]."""
    total = sum(len(item.tokens) for item in items)
    logprob_N, owner_N = token_logprobs(model, items, precision, micro_batch_tokens)
    sums_S = torch.zeros(total).index_add_(0, owner_N, logprob_N)
    return sums_S, torch.bincount(owner_N, minlength=total).float()
