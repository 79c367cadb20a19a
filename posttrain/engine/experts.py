"""Mixture-of-experts products with tokens sorted by expert, adapters in split form.

Frozen expert weights take part in one product per expert; an adapter adds (x·A)·B on the same sorted rows, so no
dense weight delta and no dense expert gradient ever exists.

Axes: T token, N routed row (T × experts per token, sorted by expert), E expert, I in, O out, R adapter rank.
"""

from itertools import pairwise
from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface

from posttrain.errors import ModelError

NAME = "posttrain_sorted"
"""Registered with transformers' experts interface."""


class _GroupedProduct(torch.autograd.Function):
    """out[n] = x[n] @ weight[e(n)] (+ bias[e(n)]) for rows sorted by expert; `bounds` are the experts' row limits."""

    @staticmethod
    def forward(ctx, x_NI, weight_EIO, bias_EO, bounds):  # type: ignore[no-untyped-def, override]
        out_NO = x_NI.new_empty(x_NI.shape[0], weight_EIO.shape[2])
        for expert, (start, stop) in enumerate(pairwise(bounds)):
            if start < stop and bias_EO is not None:
                torch.addmm(bias_EO[expert], x_NI[start:stop], weight_EIO[expert], out=out_NO[start:stop])
            elif start < stop:
                torch.mm(x_NI[start:stop], weight_EIO[expert], out=out_NO[start:stop])
        ctx.save_for_backward(x_NI, weight_EIO)
        ctx.bounds = bounds
        return out_NO

    @staticmethod
    def backward(ctx, grad_NO):  # type: ignore[no-untyped-def, override]
        x_NI, weight_EIO = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_NO = grad_NO.contiguous()
        grad_x = torch.empty_like(x_NI) if needs_x else None
        grad_weight = torch.zeros_like(weight_EIO) if needs_weight else None
        grad_bias = grad_NO.new_zeros(weight_EIO.shape[0], weight_EIO.shape[2]) if needs_bias else None
        for expert, (start, stop) in enumerate(pairwise(ctx.bounds)):
            if start == stop:
                continue
            grad = grad_NO[start:stop]
            if grad_x is not None:
                torch.mm(grad, weight_EIO[expert].T, out=grad_x[start:stop])
            if grad_weight is not None:
                torch.mm(x_NI[start:stop].T, grad, out=grad_weight[expert])
            if grad_bias is not None:
                torch.sum(grad, dim=0, out=grad_bias[expert])
        return grad_x, grad_weight, grad_bias, None


def grouped_product(
    x_NI: torch.Tensor, weight_EIO: torch.Tensor, bias_EO: torch.Tensor | None, bounds: list[int]
) -> torch.Tensor:
    """Rows sorted by expert times their expert's weight, in autocast's type where it is on."""
    if torch.is_autocast_enabled(x_NI.device.type):
        dtype = torch.get_autocast_dtype(x_NI.device.type)
        x_NI, weight_EIO = x_NI.to(dtype), weight_EIO.to(dtype)
        bias_EO = None if bias_EO is None else bias_EO.to(dtype)
    return _GroupedProduct.apply(x_NI, weight_EIO, bias_EO, bounds)


class ExpertAdapter(torch.nn.Module):
    """Low-rank factors of one expert projection: A [E, I, R], B [E, R, O]."""

    def __init__(self, num_experts: int, size_in: int, size_out: int, rank: int, scale: float) -> None:
        super().__init__()
        self.lora_A = torch.nn.Parameter(torch.zeros(num_experts, size_in, rank))
        self.lora_B = torch.nn.Parameter(torch.zeros(num_experts, rank, size_out))
        self.scale = scale

    def forward(self, x_NI: torch.Tensor, bounds: list[int]) -> torch.Tensor:
        # Scaled where it is narrowest: R columns instead of O.
        low_NR = grouped_product(x_NI, self.lora_A, None, bounds) * self.scale
        return grouped_product(low_NR, self.lora_B, None, bounds)


def project(experts: Any, name: str, x_NI: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """One projection (`gate_up_proj` or `down_proj`) of sorted rows, with its adapter where there is one."""
    weight = getattr(experts, name)
    if not experts.is_transposed:
        weight = weight.transpose(1, 2)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    out_NO: torch.Tensor = grouped_product(x_NI, weight, bias, bounds)
    adapters = getattr(experts, "adapters", None)
    if adapters is not None and name in adapters:
        out_NO = out_NO + adapters[name](x_NI, bounds)
    return out_NO


def sorted_experts(
    experts: Any, hidden_TI: torch.Tensor, indices_Tk: torch.Tensor, weights_Tk: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface: hidden [T, I], chosen experts and their weights [T, k] → [T, I].

    Rows are gathered by `index_select` and summed by `index_add`: advanced indexing would make the backward pass
    differ from run to run.
    """
    if not experts.has_gate or experts.has_post_expert_norm:
        raise ModelError(f"{type(experts).__name__} has no gate or a norm after its experts: not supported")
    per_token = indices_Tk.shape[1]
    expert_N, order_N = torch.sort(indices_Tk.reshape(-1), stable=True)
    counts_E = torch.bincount(expert_N, minlength=experts.num_experts)
    bounds = [0, *torch.cumsum(counts_E, 0).tolist()]
    token_N = order_N // per_token
    gate_up_NO = project(experts, "gate_up_proj", hidden_TI.index_select(0, token_N), bounds)
    down_NI = project(experts, "down_proj", experts._apply_gate(gate_up_NO), bounds)
    weight_N1 = weights_Tk.reshape(-1).index_select(0, order_N)[:, None]
    out_TI = torch.zeros(hidden_TI.shape, dtype=down_NI.dtype, device=hidden_TI.device)
    return out_TI.index_add(0, token_N, (down_NI * weight_N1).to(down_NI.dtype))


ExpertsInterface.register(NAME, sorted_experts)
