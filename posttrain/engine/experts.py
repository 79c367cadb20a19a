"""Mixture-of-experts products with tokens sorted by expert, adapters in split form.

One pass over the experts does everything for an expert's rows while they are in the processor's caches: gather, up
projection, gate, down projection. An adapter adds (x·A)·B on the same rows, so no dense weight delta and no dense
expert gradient ever exists. The backward pass keeps the up projection's output alone and computes the rest again.
On CUDA in bfloat16 grouped products take the loop's place (`posttrain.engine.grouped`).

Axes: T token, k choice of a token, P routed row (sorted by expert, each expert's rows filled up to a multiple),
E expert, M rows of one expert, H hidden, F expert size, R adapter rank, I in, O out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from posttrain.engine.grouped import grouped_experts
from posttrain.engine.mxfp4 import PackedExperts
from posttrain.errors import ModelError

NAME = "posttrain_sorted"
"""Registered with transformers' experts interface."""
LARGEST_MULTIPLE = 64
"""Rows of an expert are filled up to at most this multiple: oneDNN compiles a kernel for every new shape it meets."""


class ExpertAdapter(nn.Module):
    """Low-rank factors of one expert projection: A [E, I, R], B [E, R, O]."""

    def __init__(
        self, num_experts: int, size_in: int, size_out: int, rank: int, scale: float, device: torch.device
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(num_experts, size_in, rank, device=device))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, rank, size_out, device=device))
        self.scale = scale


@dataclass(frozen=True)
class Routing:
    """Which rows each expert works on."""

    token_P: torch.Tensor
    """The row's token; 0 in rows that only fill up."""
    weight_P: torch.Tensor
    """The router's weight; 0 in rows that only fill up, so that they change nothing in either direction."""
    place_Tk: torch.Tensor
    """The row of each token's k-th choice."""
    bounds: tuple[tuple[int, int], ...]
    """Row limits of each expert."""


def row_multiple(rows: int, num_experts: int) -> int:
    """The power of two that rows are filled up to: at most a quarter of an expert's mean share of them."""
    share = rows // (4 * num_experts)
    return 1 if share < 2 else min(LARGEST_MULTIPLE, 1 << (share.bit_length() - 1))


def route(indices_Tk: torch.Tensor, weights_Tk: torch.Tensor, num_experts: int) -> Routing:
    tokens, per_token = indices_Tk.shape
    expert_N, order_N = torch.sort(indices_Tk.reshape(-1), stable=True)
    count_E = torch.bincount(expert_N, minlength=num_experts)
    multiple = row_multiple(tokens * per_token, num_experts)
    filled_E = (count_E + multiple - 1) // multiple * multiple
    start_E = filled_E.cumsum(0) - filled_E
    shift_E = start_E - (count_E.cumsum(0) - count_E)
    row_N = torch.arange(len(expert_N), device=expert_N.device) + shift_E.index_select(0, expert_N)
    starts, lengths = start_E.tolist(), filled_E.tolist()
    rows = starts[-1] + lengths[-1]
    token_P = torch.zeros(rows, dtype=torch.long, device=row_N.device).index_copy_(0, row_N, order_N // per_token)
    weight_P = weights_Tk.new_zeros(rows).index_copy_(0, row_N, weights_Tk.reshape(-1).index_select(0, order_N))
    place_N = torch.empty_like(row_N).index_copy_(0, order_N, row_N)
    bounds = tuple((start, start + length) for start, length in zip(starts, lengths, strict=True))
    return Routing(token_P, weight_P, place_N.view(tokens, per_token), bounds)


def combine(rows_PH: torch.Tensor, place_Tk: torch.Tensor, weights_Tk: torch.Tensor | None) -> torch.Tensor:
    """The (weighted) sum of each token's rows, [T, H]; always in the same order."""
    if rows_PH.device.type == "cpu":
        weights_Tk = None if weights_Tk is None else weights_Tk.to(rows_PH.dtype)
        return nn.functional.embedding_bag(place_Tk, rows_PH, per_sample_weights=weights_Tk, mode="sum")
    rows_TkH = rows_PH.index_select(0, place_Tk.reshape(-1)).view(*place_Tk.shape, -1)
    return (rows_TkH if weights_Tk is None else rows_TkH * weights_Tk[..., None]).sum(1, dtype=rows_PH.dtype)


@dataclass(frozen=True)
class Projection:
    """One expert projection with its adapter: matrices [E, I, O], in the type of the products where they are cast."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    lora_A: torch.Tensor | None
    lora_B: torch.Tensor | None
    scale: float
    transposed: bool
    """Whether the weight is stored (in, out)."""
    packed: PackedExperts | None
    """Holds the weight where it is kept in four bits; `weight` is None then."""

    @property
    def width(self) -> int:
        """Size of the output."""
        if self.weight is None:
            assert self.packed is not None
            return self.packed.shape[2]
        return self.weight.shape[2 if self.transposed else 1]

    def matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        if self.packed is not None:
            return self.packed.matrix(expert, dtype)
        assert self.weight is not None
        weight = self.weight[expert] if self.transposed else self.weight[expert].T
        return weight.to(dtype)

    def factors(self, expert: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.lora_A is None or self.lora_B is None:
            return None
        return self.lora_A[expert].to(dtype), self.lora_B[expert].to(dtype)

    def forward(self, expert: int, x_MI: torch.Tensor, out_MO: torch.Tensor | None = None) -> torch.Tensor:
        matrix = self.matrix(expert, x_MI.dtype)
        if self.bias is None:
            out_MO = torch.mm(x_MI, matrix, out=out_MO)
        else:
            out_MO = torch.addmm(self.bias[expert].to(x_MI.dtype), x_MI, matrix, out=out_MO)
        if factors := self.factors(expert, x_MI.dtype):
            # Scaled where it is narrowest: R columns instead of O.
            out_MO.addmm_(torch.mm(x_MI, factors[0]).mul_(self.scale), factors[1])
        return out_MO

    def backward_input(self, expert: int, grad_MO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradient of the rows [M, I], and of x·A [M, R]."""
        grad_MI = torch.mm(grad_MO, self.matrix(expert, grad_MO.dtype).T)
        grad_MR = None
        if factors := self.factors(expert, grad_MO.dtype):
            grad_MR = torch.mm(grad_MO, factors[1].T).mul_(self.scale)
            grad_MI.addmm_(grad_MR, factors[0].T)
        return grad_MI, grad_MR


class _Gradients:
    """Where a projection's parameter gradients gather, for those that are asked for."""

    def __init__(self, projection: Projection, needed: tuple[bool, ...]) -> None:
        self.projection = projection
        parameters = (projection.weight, projection.bias, projection.lora_A, projection.lora_B)
        self.weight, self.bias, self.lora_A, self.lora_B = (
            torch.zeros_like(parameter) if asked and parameter is not None else None
            for parameter, asked in zip(parameters, needed, strict=True)
        )

    def add(self, expert: int, x_MI: torch.Tensor, grad_MO: torch.Tensor, grad_MR: torch.Tensor | None) -> None:
        if self.weight is not None:
            grad_IO = torch.mm(x_MI.T, grad_MO)
            self.weight[expert].copy_(grad_IO if self.projection.transposed else grad_IO.T)
        if self.bias is not None:
            self.bias[expert].copy_(grad_MO.sum(0))
        if self.lora_A is not None and grad_MR is not None:
            self.lora_A[expert].copy_(torch.mm(x_MI.T, grad_MR))
        if self.lora_B is not None and self.projection.lora_A is not None:
            low_MR = torch.mm(x_MI, self.projection.lora_A[expert].to(x_MI.dtype)).mul_(self.projection.scale)
            self.lora_B[expert].copy_(torch.mm(low_MR.T, grad_MO))

    def all(self) -> tuple[torch.Tensor | None, ...]:
        return self.weight, self.bias, self.lora_A, self.lora_B


class _SortedExperts(torch.autograd.Function):
    """Rows through their experts, weighted and summed per token.

    With w the router's weight of a row, a its gated activation and g the gradient of its token's output: the gradient
    of w is g · (a·W + bias) = (g·Wᵀ) · a + g · bias, so the down projection's output need not be kept.
    """

    @staticmethod
    def forward(ctx, hidden_TH, weights_Tk, routing, apply_gate, keep, dtype, up_parts, down_parts, *parameters):  # type: ignore[no-untyped-def, override]
        up, down = Projection(*parameters[:4], *up_parts), Projection(*parameters[4:], *down_parts)
        x_TH = hidden_TH.to(dtype)
        rows = len(routing.token_P)
        down_PH = x_TH.new_empty(rows, x_TH.shape[1])
        gate_up_PF = x_TH.new_empty(rows, up.width) if keep else None
        for expert, (start, stop) in enumerate(routing.bounds):
            if start < stop:
                x_MH = x_TH.index_select(0, routing.token_P[start:stop])
                gate_up = up.forward(expert, x_MH, None if gate_up_PF is None else gate_up_PF[start:stop])
                down.forward(expert, apply_gate(gate_up), down_PH[start:stop])
        if keep:
            ctx.save_for_backward(hidden_TH, gate_up_PF, *parameters)
            ctx.routing, ctx.apply_gate, ctx.parts = routing, apply_gate, (up_parts, down_parts)
        return combine(down_PH, routing.place_Tk, weights_Tk)

    @staticmethod
    def backward(ctx, grad_TH):  # type: ignore[no-untyped-def, override]
        hidden_TH, gate_up_PF, *parameters = ctx.saved_tensors
        up, down = Projection(*parameters[:4], *ctx.parts[0]), Projection(*parameters[4:], *ctx.parts[1])
        routing: Routing = ctx.routing
        dtype = gate_up_PF.dtype
        x_TH, grad_TH = hidden_TH.to(dtype), grad_TH.to(dtype)
        up_grads = _Gradients(up, ctx.needs_input_grad[8:12])
        down_grads = _Gradients(down, ctx.needs_input_grad[12:16])
        grad_x_PH = x_TH.new_empty(len(routing.token_P), x_TH.shape[1])
        grad_weight_P = torch.zeros(len(routing.token_P), dtype=torch.float32, device=x_TH.device)
        for expert, (start, stop) in enumerate(routing.bounds):
            if start == stop:
                continue
            token_M, weight_M1 = routing.token_P[start:stop], routing.weight_P[start:stop, None].to(dtype)
            grad_MH = grad_TH.index_select(0, token_M)
            grad_act_MF, grad_low_MR = down.backward_input(expert, grad_MH)
            with torch.enable_grad():
                gate_up_M = gate_up_PF[start:stop].detach().requires_grad_()
                act_MF = ctx.apply_gate(gate_up_M)
            torch.sum(grad_act_MF * act_MF.detach(), -1, dtype=torch.float32, out=grad_weight_P[start:stop])
            if down.bias is not None:
                grad_weight_P[start:stop] += grad_MH @ down.bias[expert].to(dtype)
            grad_low_MR = None if grad_low_MR is None else grad_low_MR.mul_(weight_M1)
            down_grads.add(expert, act_MF.detach(), grad_MH.mul_(weight_M1), grad_low_MR)
            (grad_gate_up,) = torch.autograd.grad(act_MF, gate_up_M, grad_act_MF.mul_(weight_M1))
            grad_x_PH[start:stop], grad_up_MR = up.backward_input(expert, grad_gate_up)
            up_grads.add(expert, x_TH.index_select(0, token_M), grad_gate_up, grad_up_MR)
        grad_hidden = combine(grad_x_PH, routing.place_Tk, None).to(hidden_TH.dtype)
        grad_weights = grad_weight_P.index_select(0, routing.place_Tk.reshape(-1)).view(routing.place_Tk.shape)
        grad_weights = grad_weights.to(routing.weight_P.dtype)
        return grad_hidden, grad_weights, None, None, None, None, None, None, *up_grads.all(), *down_grads.all()


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
    keep, gate = torch.is_grad_enabled(), experts._apply_gate
    return _SortedExperts.apply(hidden_TH, weights_Tk, routing, gate, keep, dtype, up_parts, down_parts, *up, *down)


ExpertsInterface.register(NAME, sorted_experts)
