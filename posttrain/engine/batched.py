"""Mixture-of-experts products for processors, several experts in one batched product.

Tokens are sorted by expert, experts by how many rows they have. Neighbours are filled up to the same number of rows and
share their products: cores then take an expert each and need not wait for one another inside a small product. An
adapter adds (x·A)·B on the same rows, so no dense weight delta and no dense expert gradient ever exists. The backward
pass keeps the input, the up projection's output and x·A; the rest is computed again.

Axes: T token, k choice of a token, P routed row, E expert (busiest first), N experts of a group, C rows of each of
them, M rows of a group, H hidden, F expert size (G twice that: gate and up), R adapter rank, I in, O out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from posttrain.engine.mxfp4 import PackedExperts
from posttrain.engine.packing import row_multiple

GROUP_ROWS = 1024
"""An expert joins a group of up to so many rows: what the gate works on stays in the caches, and memory small."""
GROUP_FILL = 0.9
"""And if that leaves at least this share of the group's rows in use."""

Tensor = torch.Tensor


@dataclass(frozen=True)
class Group:
    """Experts that share their products, and their rows, as many of each."""

    experts: slice
    """Among the experts, busiest first."""
    rows: slice

    def of(self, rows_MX: Tensor) -> Tensor:
        """[M, X] of the group → [N, C, X]."""
        return rows_MX.view(self.experts.stop - self.experts.start, -1, rows_MX.shape[-1])


@dataclass(frozen=True)
class Routing:
    """Which rows each expert works on."""

    expert_E: Tensor
    """The experts' numbers, busiest first."""
    token_P: Tensor
    """The row's token; 0 in rows that only fill up."""
    weight_P: Tensor
    """The router's weight; 0 in rows that only fill up, so that they change nothing in either direction."""
    expert_Tk: Tensor
    place_Tk: Tensor
    """The row of each token's k-th choice."""
    groups: tuple[Group, ...]


def plan_groups(count_E: Sequence[int], multiple: int) -> tuple[tuple[Group, ...], list[int]]:
    """Groups of experts, which come busiest first, and the first row of each; those without rows are in no group.

    A group has a power of two of experts, so that products have few shapes.
    """
    filled_E = [-(-count // multiple) * multiple for count in count_E if count]
    groups: list[Group] = []
    start_E: list[int] = []
    first, row = 0, 0
    while first < len(filled_E):
        each, size = filled_E[first], 1
        while first + 2 * size <= len(filled_E) and 2 * size * each <= GROUP_ROWS:
            if sum(filled_E[first : first + 2 * size]) < GROUP_FILL * 2 * size * each:
                break
            size *= 2
        groups.append(Group(slice(first, first + size), slice(row, row + size * each)))
        start_E += range(row, row + size * each, each)
        first, row = first + size, row + size * each
    return tuple(groups), start_E + [row] * (len(count_E) - len(start_E))


def route(expert_Tk: Tensor, weight_Tk: Tensor, num_experts: int) -> Routing:
    tokens, per_token = expert_Tk.shape
    device = expert_Tk.device
    chosen_N, order_N = torch.sort(expert_Tk.reshape(-1), stable=True)
    count = torch.bincount(chosen_N, minlength=num_experts)
    count_E, expert_E = torch.sort(count, descending=True, stable=True)
    groups, start_E = plan_groups(count_E.tolist(), row_multiple(tokens * per_token, num_experts))
    start = torch.empty_like(count).index_copy_(0, expert_E, torch.tensor(start_E, device=device))
    shift = start - (count.cumsum(0) - count)
    row_N = torch.arange(len(chosen_N), device=device) + shift.index_select(0, chosen_N)
    rows = groups[-1].rows.stop
    token_P = torch.zeros(rows, dtype=torch.long, device=device).index_copy_(0, row_N, order_N // per_token)
    weight_P = weight_Tk.new_zeros(rows).index_copy_(0, row_N, weight_Tk.reshape(-1).index_select(0, order_N))
    place_N = torch.empty_like(row_N).index_copy_(0, order_N, row_N)
    return Routing(expert_E, token_P, weight_P, expert_Tk, place_N.view(tokens, per_token), groups)


def combine(rows_PH: Tensor, place_Tk: Tensor, weights_Tk: Tensor | None) -> Tensor:
    """The (weighted) sum of each token's rows, [T, H]; always in the same order."""
    if rows_PH.device.type == "cpu":
        weights_Tk = None if weights_Tk is None else weights_Tk.to(rows_PH.dtype)
        return nn.functional.embedding_bag(place_Tk, rows_PH, per_sample_weights=weights_Tk, mode="sum")
    rows_TkH = rows_PH.index_select(0, place_Tk.reshape(-1)).view(*place_Tk.shape, -1)
    return (rows_TkH if weights_Tk is None else rows_TkH * weights_Tk[..., None]).sum(1, dtype=rows_PH.dtype)


class Projection:
    """One expert projection with its adapter: matrices [E, I, O] in the type of the products."""

    def __init__(
        self,
        dtype: torch.dtype,
        expert_E: Tensor,
        parameters: Sequence[Tensor | None],
        scale: float,
        transposed: bool,
        packed: PackedExperts | None,
    ) -> None:
        """`transposed`: the weight is stored (in, out). `packed` holds it where it is kept in four bits."""
        self.expert_E, self.parameters, self.dtype, self.scale = expert_E, parameters, dtype, scale
        self.transposed, self.packed = transposed, packed
        weight, bias, lora_A, lora_B = parameters
        self.weight = None if weight is None else weight.to(dtype)
        if weight is None:
            assert packed is not None
            stored = packed.shape
        else:
            stored = weight.shape
        self.size_in, self.size_out = stored[1:] if transposed else stored[:0:-1]
        self.bias = None if bias is None else bias.to(dtype).index_select(0, expert_E)[:, None]
        self.rank = 0
        if lora_A is not None and lora_B is not None:
            # Scaled where it is smallest.
            scaled_A = (lora_A * scale).to(dtype)
            self.a, self.b = scaled_A.index_select(0, expert_E), lora_B.to(dtype).index_select(0, expert_E)
            self.rank = self.a.shape[2]

    def matrices(self, group: Group) -> Tensor:
        """[N, I, O] of a group."""
        numbers = self.expert_E[group.experts]
        if self.packed is not None:
            return torch.stack([self.packed.matrix(number, self.dtype) for number in numbers.tolist()])
        assert self.weight is not None
        weight = self.weight.index_select(0, numbers)
        return weight if self.transposed else weight.transpose(1, 2)

    def forward(self, group: Group, x_MI: Tensor, out_MO: Tensor, low_MR: Tensor) -> None:
        """Fills the group's output, and x·A · scale where there is an adapter."""
        x, out = group.of(x_MI), group.of(out_MO)
        if self.bias is None:
            torch.bmm(x, self.matrices(group), out=out)
        else:
            torch.baddbmm(self.bias[group.experts], x, self.matrices(group), out=out)
        if self.rank:
            low = torch.bmm(x, self.a[group.experts], out=group.of(low_MR))
            out.baddbmm_(low, self.b[group.experts])

    def backward(self, group: Group, grad_MO: Tensor, grad_x_MI: Tensor, grad_low_MR: Tensor) -> None:
        """Fills the gradients of the group's rows and of x·A · scale."""
        grad, grad_x = group.of(grad_MO), group.of(grad_x_MI)
        torch.bmm(grad, self.matrices(group).transpose(1, 2), out=grad_x)
        if self.rank:
            grad_low = torch.bmm(grad, self.b[group.experts].transpose(1, 2), out=group.of(grad_low_MR))
            grad_x.baddbmm_(grad_low, self.a[group.experts].transpose(1, 2))


class _Gradients:
    """Where a projection's parameter gradients gather, busiest experts first, for those that are asked for."""

    def __init__(self, projection: Projection, needed: tuple[bool, ...]) -> None:
        self.projection = projection
        self.weight, self.bias, self.lora_A, self.lora_B = (
            torch.zeros_like(parameter) if asked and parameter is not None else None
            for parameter, asked in zip(projection.parameters, needed, strict=True)
        )

    def add(self, group: Group, x_MI: Tensor, low_MR: Tensor, grad_MO: Tensor, grad_low_MR: Tensor) -> None:
        x, grad = group.of(x_MI).transpose(1, 2), group.of(grad_MO)
        if self.weight is not None:
            of_weight = torch.bmm(x, grad)
            self.weight[group.experts] = of_weight if self.projection.transposed else of_weight.transpose(1, 2)
        if self.bias is not None:
            self.bias[group.experts] = grad.sum(1)
        if self.lora_A is not None:
            self.lora_A[group.experts] = torch.bmm(x, group.of(grad_low_MR)).mul_(self.projection.scale)
        if self.lora_B is not None:
            self.lora_B[group.experts] = torch.bmm(group.of(low_MR).transpose(1, 2), grad)

    def all(self) -> list[Tensor | None]:
        place_E = torch.argsort(self.projection.expert_E)
        found = (self.weight, self.bias, self.lora_A, self.lora_B)
        return [None if gradient is None else gradient.index_select(0, place_E) for gradient in found]


class BatchedExperts(torch.autograd.Function):
    """Rows through their experts, weighted and summed per token.

    With w the router's weight of a row, a its gated activation and g the gradient of its token's output: the gradient
    of w is g · (a·W + bias) = (g·Wᵀ) · a + g · bias, so the down projection's output need not be kept.
    """

    @staticmethod
    def forward(ctx, hidden_TH, weight_Tk, routing, gate, keep, dtype, up_parts, down_parts, *parameters):  # type: ignore[no-untyped-def, override]
        up = Projection(dtype, routing.expert_E, parameters[:4], *up_parts)
        down = Projection(dtype, routing.expert_E, parameters[4:], *down_parts)
        x_TH = hidden_TH.to(dtype)
        rows = len(routing.token_P)
        down_PH = x_TH.new_empty(rows, x_TH.shape[1])
        kept = [x_TH.new_empty(rows, size) for size in (up.size_out, up.rank, down.rank)] if keep else None
        for group in routing.groups:
            x_MH = x_TH.index_select(0, routing.token_P[group.rows])
            if kept is None:
                gate_up_MG, *lows = (x_TH.new_empty(len(x_MH), size) for size in (up.size_out, up.rank, down.rank))
            else:
                gate_up_MG, *lows = (rows_PX[group.rows] for rows_PX in kept)
            up.forward(group, x_MH, gate_up_MG, lows[0])
            down.forward(group, gate.forward(gate_up_MG), down_PH[group.rows], lows[1])
        if kept is not None:
            ctx.save_for_backward(x_TH, *kept, *parameters)
            ctx.routing, ctx.gate, ctx.parts, ctx.given = routing, gate, (up_parts, down_parts), hidden_TH.dtype
        return combine(down_PH, routing.place_Tk, weight_Tk)

    @staticmethod
    def backward(ctx, grad_TH):  # type: ignore[no-untyped-def, override]
        x_TH, gate_up_PG, low_up_PR, low_down_PR, *parameters = ctx.saved_tensors
        dtype, routing = x_TH.dtype, ctx.routing
        up = Projection(dtype, routing.expert_E, parameters[:4], *ctx.parts[0])
        down = Projection(dtype, routing.expert_E, parameters[4:], *ctx.parts[1])
        up_grads, down_grads = _Gradients(up, ctx.needs_input_grad[8:12]), _Gradients(down, ctx.needs_input_grad[12:16])
        grad_TH = grad_TH.to(dtype)
        grad_x_PH = x_TH.new_empty(len(routing.token_P), x_TH.shape[1])
        grad_weight_P = x_TH.new_empty(len(routing.token_P), dtype=torch.promote_types(dtype, torch.float32))
        for group in routing.groups:
            token_M, weight_M1 = routing.token_P[group.rows], routing.weight_P[group.rows, None]
            grad_MH = grad_TH.index_select(0, token_M)
            grad_act_MF = x_TH.new_empty(len(token_M), down.size_in)
            grad_low_MR = x_TH.new_empty(len(token_M), down.rank)
            down.backward(group, grad_MH, grad_act_MF, grad_low_MR)
            gated = ctx.gate.backward(gate_up_PG[group.rows], grad_act_MF, weight_M1)
            act_MF, grad_gate_up_MG, grad_weight_P[group.rows] = gated
            weight_M1 = weight_M1.to(dtype)
            # On the narrower side of each product, where that is enough.
            low_MR = low_down_PR[group.rows] * weight_M1
            if down_grads.weight is not None or down_grads.bias is not None:
                grad_MH.mul_(weight_M1)
                low_MR = low_down_PR[group.rows]
            down_grads.add(group, act_MF, low_MR, grad_MH, grad_low_MR.mul_(weight_M1))
            grad_low_MR = x_TH.new_empty(len(token_M), up.rank)
            up.backward(group, grad_gate_up_MG, grad_x_PH[group.rows], grad_low_MR)
            x_MH = x_TH.index_select(0, token_M)
            up_grads.add(group, x_MH, low_up_PR[group.rows], grad_gate_up_MG, grad_low_MR)
        grad_hidden = combine(grad_x_PH, routing.place_Tk, None).to(ctx.given)
        grad_weight = grad_weight_P.index_select(0, routing.place_Tk.reshape(-1)).view(routing.place_Tk.shape)
        if down.bias is not None:
            bias_EH = parameters[5].to(dtype)
            grad_weight += (grad_TH @ bias_EH.T).gather(1, routing.expert_Tk)
        grad_weight = grad_weight.to(routing.weight_P.dtype)
        return grad_hidden, grad_weight, *[None] * 6, *up_grads.all(), *down_grads.all()
