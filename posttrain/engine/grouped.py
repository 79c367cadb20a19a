"""Mixture-of-experts products over all experts at once, for devices where a loop over experts would leave cores idle.

The same mathematics as `posttrain.engine.joined`, with `torch._grouped_mm` in place of a product per expert and the
elementwise work between two products fused. Nothing waits for the device: how many rows each expert has stays a tensor.

Axes: T token, k choice of a token, P routed row (sorted by expert, each expert's rows filled up to a multiple),
E expert, H hidden, F expert size (twice that before the gate), R adapter rank, I in, O out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from posttrain.engine.fusing import fused
from posttrain.engine.mxfp4 import PackedExperts

ROW_MULTIPLE = 8
"""Rows of an expert begin at multiples of 16 bytes in bfloat16 along a contracted axis, as grouped products ask."""
Gate = Callable[[torch.Tensor], torch.Tensor]
Tensor = torch.Tensor


@dataclass(frozen=True)
class GroupedRouting:
    """Which rows each expert works on. Rows that only fill up are of token 0 with weight 0."""

    token_P: Tensor
    expert_P: Tensor
    weight_P: Tensor
    place_Tk: Tensor
    """The row of each token's k-th choice."""
    stop_E: Tensor
    """Where each expert's rows end; the last expert's are all that are left. int32."""


def route_grouped(indices_Tk: Tensor, weights_Tk: Tensor, num_experts: int) -> GroupedRouting:
    """Every expert has at least one row, so that no group of a product is empty."""
    tokens, per_token = indices_Tk.shape
    device = indices_Tk.device
    # The choices N in the order of their experts. What follows only reads by index: writing by index would have to be
    # sorted to give the same bits every time.
    expert_N, order_N = torch.sort(indices_Tk.reshape(-1), stable=True)
    seen_E = torch.searchsorted(expert_N, torch.arange(num_experts, device=device), right=True)
    count_E = seen_E.diff(prepend=seen_E.new_zeros(1))
    filled_E = (count_E + ROW_MULTIPLE - 1).clamp_(min=ROW_MULTIPLE) // ROW_MULTIPLE * ROW_MULTIPLE
    stop_E = filled_E.cumsum(0)
    shift_E = (stop_E - filled_E) - (seen_E - count_E)
    rows = tokens * per_token + num_experts * ROW_MULTIPLE
    row_P = torch.arange(rows, device=device)
    expert_P = torch.searchsorted(stop_E, row_P, right=True).clamp_(max=num_experts - 1)
    number_P = row_P - shift_E[expert_P]
    real_P = number_P < seen_E[expert_P]
    choice_P = order_N[torch.where(real_P, number_P, 0)]
    token_P = torch.where(real_P, choice_P // per_token, 0)
    weight_P = torch.where(real_P, weights_Tk.reshape(-1)[choice_P], 0)
    place_N = (torch.arange(len(order_N), device=device) + shift_E[expert_N])[torch.argsort(order_N)]
    # What is left at the end belongs to the last expert.
    stop_E = torch.where(torch.arange(num_experts, device=device) == num_experts - 1, rows, stop_E).int()
    return GroupedRouting(token_P, expert_P, weight_P, place_N.view(tokens, per_token), stop_E)


@dataclass(frozen=True)
class GroupedProjection:
    """All experts' matrices [E, I, O] of one projection with their adapter, in the type of the products."""

    weight: Tensor | None
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    scale: float
    transposed: bool
    """Whether the weight is stored (in, out)."""
    packed: PackedExperts | None
    """Holds the weight where it is kept in four bits; `weight` is None then."""

    def matrices(self, dtype: torch.dtype) -> Tensor:
        if self.packed is not None:
            return self.packed.matrices(dtype)
        assert self.weight is not None
        weight = self.weight.to(dtype)
        return weight if self.transposed else weight.transpose(1, 2)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """A and B, their rank filled up with zeros to what grouped products take."""
        if self.lora_A is None or self.lora_B is None:
            return None
        missing = -self.lora_A.shape[2] % ROW_MULTIPLE
        return pad(self.lora_A.to(dtype), (0, missing)), pad(self.lora_B.to(dtype), (0, 0, 0, missing))

    def low(self, x_PI: Tensor, a_EIR: Tensor, stop_E: Tensor) -> Tensor:
        """scale · x·A, [P, R]."""
        return torch._grouped_mm(x_PI, a_EIR, offs=stop_E).mul_(self.scale)

    def forward(self, x_PI: Tensor, stop_E: Tensor) -> tuple[Tensor, Tensor | None]:
        """x·W and the adapter's part, without the bias; to be added by whoever reads them next."""
        base_PO = torch._grouped_mm(x_PI, self.matrices(x_PI.dtype), offs=stop_E)
        factors = self.factors(x_PI.dtype)
        if factors is None:
            return base_PO, None
        return base_PO, torch._grouped_mm(self.low(x_PI, factors[0], stop_E), factors[1], offs=stop_E)

    def backward(self, grad_PO: Tensor, stop_E: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The two parts of the gradient of the rows [P, I], and the gradient of x·A [P, R]."""
        base_PI = torch._grouped_mm(grad_PO, self.matrices(grad_PO.dtype).transpose(1, 2), offs=stop_E)
        factors = self.factors(grad_PO.dtype)
        if factors is None:
            return base_PI, None, None
        low_PR = torch._grouped_mm(grad_PO, factors[1].transpose(1, 2), offs=stop_E).mul_(self.scale)
        return base_PI, torch._grouped_mm(low_PR, factors[0].transpose(1, 2), offs=stop_E), low_PR

    def gradients(
        self,
        needed: tuple[bool, ...],
        x_PI: Tensor,
        grad_PO: Tensor,
        grad_PR: Tensor | None,
        weight_P: Tensor | None,
        routing: GroupedRouting,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of weight, bias, A and B, where they are needed; `weight_P` is still to be put on both gradients.

        It goes on the narrowest side of each product.
        """
        weight, bias, lora_A, lora_B = None, None, None, None
        weight_P1 = None if weight_P is None else weight_P[:, None].to(x_PI.dtype)
        stop_E = routing.stop_E
        if needed[0]:
            assert self.weight is not None
            left_PI = x_PI if weight_P1 is None else x_PI * weight_P1
            weight = torch._grouped_mm(left_PI.T, grad_PO, offs=stop_E)
            weight = (weight if self.transposed else weight.transpose(1, 2)).to(self.weight.dtype)
        if needed[1]:
            assert self.bias is not None
            member_EP = (torch.arange(len(stop_E), device=stop_E.device)[:, None] == routing.expert_P).to(x_PI.dtype)
            bias = ((member_EP if weight_P1 is None else member_EP * weight_P1.T) @ grad_PO).to(self.bias.dtype)
        if needed[2]:
            assert self.lora_A is not None and grad_PR is not None
            right_PR = grad_PR if weight_P1 is None else grad_PR * weight_P1
            rank = self.lora_A.shape[2]
            lora_A = torch._grouped_mm(x_PI.T, right_PR, offs=stop_E)[..., :rank].to(self.lora_A.dtype)
        if needed[3]:
            factors = self.factors(x_PI.dtype)
            assert self.lora_B is not None and factors is not None
            low_PR = self.low(x_PI, factors[0], stop_E)
            left_PR = low_PR if weight_P1 is None else low_PR.mul_(weight_P1)
            rank = self.lora_B.shape[1]
            lora_B = torch._grouped_mm(left_PR.T, grad_PO, offs=stop_E)[:, :rank].to(self.lora_B.dtype)
        return weight, bias, lora_A, lora_B


def _sum(base: Tensor, adapter: Tensor | None, bias_E: Tensor | None, expert: Tensor) -> Tensor:
    total = base if adapter is None else base + adapter
    return total if bias_E is None else total + bias_E[expert].to(base.dtype)


@fused
def _gated(
    base_PF: Tensor, adapter_PF: Tensor | None, bias_EF: Tensor | None, expert_P: Tensor, gate: Gate
) -> tuple[Tensor, Tensor]:
    """The up projection's sum, which is kept, and its gated activation."""
    total_PF = _sum(base_PF, adapter_PF, bias_EF, expert_P)
    return total_PF, gate(total_PF)


@fused
def _gated_backward(
    base_PF: Tensor, adapter_PF: Tensor | None, gate_up_PF: Tensor, weight_P: Tensor, gate: Gate
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of the activation, before the router's weight, in its two parts: activation, gradient of what
    the gate was given, gradient of the router's weight (without the down bias's part)."""
    grad_PF = base_PF if adapter_PF is None else base_PF + adapter_PF
    act_PF, pull = torch.func.vjp(gate, gate_up_PF)  # type: ignore[misc]
    grad_weight_P = (grad_PF.float() * act_PF.float()).sum(-1)
    (grad_gate_up_PF,) = pull(grad_PF * weight_P[:, None].to(grad_PF.dtype))
    return act_PF, grad_gate_up_PF, grad_weight_P


@fused
def _combined(
    base_PH: Tensor,
    adapter_PH: Tensor | None,
    bias_EH: Tensor | None,
    expert_P: Tensor,
    place_Tk: Tensor,
    weights_Tk: Tensor | None,
) -> Tensor:
    """The (weighted) sum of each token's rows [T, H], in float32 until it is rounded once."""
    total_TH = None
    for choice in range(place_Tk.shape[1]):
        place_T = place_Tk[:, choice]
        adapter_TH = None if adapter_PH is None else adapter_PH[place_T].float()
        rows_TH = _sum(base_PH[place_T].float(), adapter_TH, bias_EH, expert_P[place_T])
        if weights_Tk is not None:
            rows_TH = rows_TH * weights_Tk[:, choice, None].float()
        total_TH = rows_TH if total_TH is None else total_TH + rows_TH
    assert total_TH is not None
    return total_TH.to(base_PH.dtype)


class GroupedExperts(torch.autograd.Function):
    """Rows through their experts, weighted and summed per token; keeps the input and the up projection's output.

    The router's weight's gradient is g · (a·W + bias) = (g·Wᵀ) · a + g · bias, as in `posttrain.engine.joined`.
    """

    @staticmethod
    def forward(ctx, hidden_TH, weights_Tk, routing, gate, keep, dtype, up_parts, down_parts, *parameters):  # type: ignore[no-untyped-def, override]
        up, down = GroupedProjection(*parameters[:4], *up_parts), GroupedProjection(*parameters[4:], *down_parts)
        x_PH = hidden_TH.to(dtype).index_select(0, routing.token_P)
        base_PF, adapter_PF = up.forward(x_PH, routing.stop_E)
        del x_PH
        gate_up_PF, act_PF = _gated(base_PF, adapter_PF, up.bias, routing.expert_P, gate)
        del base_PF, adapter_PF
        base_PH, adapter_PH = down.forward(act_PF, routing.stop_E)
        if keep:
            ctx.save_for_backward(hidden_TH, gate_up_PF, *parameters)
            ctx.routing, ctx.gate, ctx.parts = routing, gate, (up_parts, down_parts)
        return _combined(base_PH, adapter_PH, down.bias, routing.expert_P, routing.place_Tk, weights_Tk)

    @staticmethod
    def backward(ctx, grad_TH):  # type: ignore[no-untyped-def, override]
        hidden_TH, gate_up_PF, *parameters = ctx.saved_tensors
        up = GroupedProjection(*parameters[:4], *ctx.parts[0])
        down = GroupedProjection(*parameters[4:], *ctx.parts[1])
        routing: GroupedRouting = ctx.routing
        dtype, stop_E = gate_up_PF.dtype, routing.stop_E
        grad_TH = grad_TH.to(dtype)
        grad_PH = grad_TH.index_select(0, routing.token_P)
        base_PF, adapter_PF, grad_low_PR = down.backward(grad_PH, stop_E)
        act_PF, grad_gate_up_PF, grad_weight_P = _gated_backward(
            base_PF, adapter_PF, gate_up_PF, routing.weight_P, ctx.gate
        )
        del base_PF, adapter_PF
        down_grads = down.gradients(
            ctx.needs_input_grad[12:16], act_PF, grad_PH, grad_low_PR, routing.weight_P, routing
        )
        del act_PF, grad_PH, grad_low_PR
        base_PH, adapter_PH, grad_low_PR = up.backward(grad_gate_up_PF, stop_E)
        grad_hidden = _combined(base_PH, adapter_PH, None, routing.expert_P, routing.place_Tk, None)
        del base_PH, adapter_PH
        x_PH = hidden_TH.to(dtype).index_select(0, routing.token_P)
        up_grads = up.gradients(ctx.needs_input_grad[8:12], x_PH, grad_gate_up_PF, grad_low_PR, None, routing)
        grad_weights = grad_weight_P[routing.place_Tk]
        if down.bias is not None:
            by_expert_TE = (grad_TH @ down.bias.to(dtype).T).float()
            grad_weights = grad_weights + by_expert_TE.gather(1, routing.expert_P[routing.place_Tk])
        grad_weights = grad_weights.to(routing.weight_P.dtype)
        return grad_hidden.to(hidden_TH.dtype), grad_weights, *[None] * 6, *up_grads, *down_grads


def grouped_experts(
    experts: Any, hidden_TH: Tensor, indices_Tk: Tensor, weights_Tk: Tensor, dtype: torch.dtype, up: Any, down: Any
) -> Tensor:
    """`posttrain.engine.experts.sorted_experts` for a device with grouped products."""
    routing = route_grouped(indices_Tk, weights_Tk.detach(), experts.num_experts)
    gate, keep = experts._apply_gate, torch.is_grad_enabled()
    (up_tensors, up_parts), (down_tensors, down_parts) = up, down
    up_parts, down_parts = ((parts.scale, parts.transposed, parts.packed) for parts in (up_parts, down_parts))
    return GroupedExperts.apply(
        hidden_TH, weights_Tk, routing, gate, keep, dtype, up_parts, down_parts, *up_tensors, *down_tensors
    )
