"""Experts of a model through this engine: transformers' experts interface, and the adapters that hang on them.

On CUDA in bfloat16 grouped products do the work (`posttrain.engine.grouped`), elsewhere groups of experts
(`posttrain.engine.batched`).

Axes: T token, k choice of a token, E expert, H hidden, R adapter rank, I in, O out.
"""

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from posttrain.engine.batched import BatchedExperts, route
from posttrain.engine.gates import gate_of
from posttrain.engine.grouped import grouped_experts
from posttrain.engine.mxfp4 import PackedExperts
from posttrain.errors import ModelError

NAME = "posttrain_sorted"
"""Registered with transformers' experts interface."""


class ExpertAdapter(nn.Module):
    """Low-rank factors of one expert projection: A [E, I, R], B [E, R, O]."""

    def __init__(
        self, num_experts: int, size_in: int, size_out: int, rank: int, scale: float, device: torch.device
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(num_experts, size_in, rank, device=device))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, rank, size_out, device=device))
        self.scale = scale


def _parameters(
    experts: Any, name: str
) -> tuple[tuple[torch.Tensor | None, ...], tuple[float, bool, PackedExperts | None]]:
    """A projection's tensors, and what else it is made from."""
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    adapters = getattr(experts, "adapters", None)
    tensors, scale = (None, None), 1.0
    if adapters is not None and name in adapters:
        tensors, scale = (adapters[name].lora_A, adapters[name].lora_B), adapters[name].scale
    weight = getattr(experts, name)
    if isinstance(weight, PackedExperts):
        return (None, bias, *tensors), (scale, True, weight)
    return (weight, bias, *tensors), (scale, experts.is_transposed, None)


def sorted_experts(
    experts: Any, hidden_TH: torch.Tensor, indices_Tk: torch.Tensor, weights_Tk: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface: hidden [T, H], chosen experts and their weights [T, k] → [T, H].

    Nothing here gathers by advanced indexing or adds in an order of its own: that would make the backward pass differ
    from run to run.
    """
    if not experts.has_gate or getattr(experts, "has_post_expert_norm", False):
        raise ModelError(f"{type(experts).__name__} has no gate or a norm after its experts: not supported")
    device = hidden_TH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TH.dtype
    up, up_parts = _parameters(experts, "gate_up_proj")
    down, down_parts = _parameters(experts, "down_proj")
    if device == "cuda" and dtype == torch.bfloat16:
        return grouped_experts(experts, hidden_TH, indices_Tk, weights_Tk, dtype, (up, up_parts), (down, down_parts))
    routing = route(indices_Tk, weights_Tk.detach(), experts.num_experts)
    keep, gate = torch.is_grad_enabled(), gate_of(experts)
    return BatchedExperts.apply(hidden_TH, weights_Tk, routing, gate, keep, dtype, up_parts, down_parts, *up, *down)


ExpertsInterface.register(NAME, sorted_experts)
