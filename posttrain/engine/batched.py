"""Mixture-of-experts products for processors, two experts in one batched product.

Tokens are sorted by expert, experts by how many rows they have. Neighbours are filled up to the same number of rows and
share their products: two cores then take an expert each and need not wait for one another inside a small product. An
adapter adds (x·A)·B on the same rows, so no dense weight delta and no dense expert gradient ever exists. The backward
pass keeps the input, the up projection's output and x·A; the rest is computed again.

Axes: T token, k choice of a token, P routed row, E expert, N experts of a pair, C rows of each of them, M rows of a
block, H hidden, F expert size (G twice that: gate and up), R adapter rank, I in, O out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from posttrain.engine.mxfp4 import PackedExperts

LARGEST_MULTIPLE = 64
"""Rows of an expert are filled up to at most this multiple: oneDNN compiles a kernel for every new shape it meets."""
BLOCK_ROWS = 1024
"""Pairs are taken together up to about so many rows for all that is not a product."""
GATE_ROWS = 256
"""Rows that pass the gate at once: its temporaries stay in the second level cache."""

Tensor = torch.Tensor


@dataclass(frozen=True)
class Pair:
    """Two experts (or the last one alone) and their rows within a block, as many of each."""

    experts: slice
    rows: slice

    @property
    def size(self) -> int:
        return 1 + (self.experts.stop - 1 - self.experts.start) // self.experts.step

    def of(self, rows_MX: Tensor) -> Tensor:
        """[M, X] of the block → [N, C, X] of the pair."""
        return rows_MX[self.rows].view(self.size, -1, rows_MX.shape[-1])


@dataclass(frozen=True)
class Block:
    rows: slice
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Routing:
    """Which rows each expert works on."""

    token_P: Tensor
    """The row's token; 0 in rows that only fill up."""
    weight_P: Tensor
    """The router's weight; 0 in rows that only fill up, so that they change nothing in either direction."""
    expert_Tk: Tensor
    place_Tk: Tensor
    """The row of each token's k-th choice."""
    blocks: tuple[Block, ...]


def row_multiple(rows: int, num_experts: int) -> int:
    """The power of two that rows are filled up to: at most a quarter of an expert's mean share of them."""
    share = rows // (4 * num_experts)
    return 1 if share < 2 else min(LARGEST_MULTIPLE, 1 << (share.bit_length() - 1))


def plan_blocks(count_E: Sequence[int], multiple: int) -> tuple[tuple[Block, ...], list[int]]:
    """Blocks of pairs, busiest experts first, and the first row of every expert."""
    busiest = sorted((number for number, count in enumerate(count_E) if count), key=lambda number: -count_E[number])
    blocks: list[Block] = []
    start_E, first, pairs, used = [0] * len(count_E), 0, [], 0
    for number in range(0, len(busiest), 2):
        experts = sorted(busiest[number : number + 2])
        each = -(-count_E[busiest[number]] // multiple) * multiple
        # Any two experts are a slice of all.
        step = max(1, experts[-1] - experts[0])
        pairs.append(Pair(slice(experts[0], experts[-1] + 1, step), slice(used, used + len(experts) * each)))
        for expert in experts:
            start_E[expert] = first + used
            used += each
        if used >= BLOCK_ROWS or number + 2 >= len(busiest):
            blocks.append(Block(slice(first, first + used), tuple(pairs)))
            first, pairs, used = first + used, [], 0
    return tuple(blocks), start_E


def route(expert_Tk: Tensor, weight_Tk: Tensor, num_experts: int) -> Routing:
    tokens, per_token = expert_Tk.shape
    device = expert_Tk.device
    expert_N, order_N = torch.sort(expert_Tk.reshape(-1), stable=True)
    count_E = torch.bincount(expert_N, minlength=num_experts)
    blocks, start = plan_blocks(count_E.tolist(), row_multiple(tokens * per_token, num_experts))
    shift_E = torch.tensor(start, device=device) - (count_E.cumsum(0) - count_E)
    row_N = torch.arange(len(expert_N), device=device) + shift_E.index_select(0, expert_N)
    rows = blocks[-1].rows.stop
    token_P = torch.zeros(rows, dtype=torch.long, device=device).index_copy_(0, row_N, order_N // per_token)
    weight_P = weight_Tk.new_zeros(rows).index_copy_(0, row_N, weight_Tk.reshape(-1).index_select(0, order_N))
    place_N = torch.empty_like(row_N).index_copy_(0, order_N, row_N)
    return Routing(token_P, weight_P, expert_Tk, place_N.view(tokens, per_token), blocks)


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
        parameters: Sequence[Tensor | None],
        scale: float,
        transposed: bool,
        packed: PackedExperts | None,
    ) -> None:
        """`transposed`: the weight is stored (in, out). `packed` holds it where it is kept in four bits."""
        self.parameters, self.dtype, self.scale = parameters, dtype, scale
        self.transposed, self.packed = transposed, packed
        weight, bias, lora_A, lora_B = parameters
        self.weight = None if weight is None else weight.to(dtype)
        if weight is None:
            assert packed is not None
            stored = packed.shape
        else:
            stored = weight.shape
        self.size_in, self.size_out = stored[1:] if transposed else stored[:0:-1]
        self.bias = None if bias is None else bias.to(dtype)
        self.rank = 0
        if lora_A is not None and lora_B is not None:
            # Scaled where it is smallest.
            self.a, self.b = (lora_A * scale).to(dtype), lora_B.to(dtype)
            self.rank = self.a.shape[2]

    def matrices(self, experts: slice) -> Tensor:
        """[N, I, O] of a pair, side by side as they are stored: else products copy them, and turned."""
        if self.packed is not None:
            numbers = range(experts.start, experts.stop, experts.step)
            return torch.stack([self.packed.matrix(number, self.dtype) for number in numbers])
        assert self.weight is not None
        weight = self.weight[experts].contiguous()
        return weight if self.transposed else weight.transpose(1, 2)

    def forward(self, pair: Pair, x_MI: Tensor, out_MO: Tensor, low_MR: Tensor) -> None:
        """Fills the pair's output, and x·A · scale where there is an adapter."""
        x, out = pair.of(x_MI), pair.of(out_MO)
        if self.bias is None:
            torch.bmm(x, self.matrices(pair.experts), out=out)
        else:
            torch.baddbmm(self.bias[pair.experts, None], x, self.matrices(pair.experts), out=out)
        if self.rank:
            low = torch.bmm(x, self.a[pair.experts], out=pair.of(low_MR))
            out.baddbmm_(low, self.b[pair.experts])

    def backward(self, pair: Pair, grad_MO: Tensor, grad_x_MI: Tensor, grad_low_MR: Tensor) -> None:
        """Fills the gradients of the pair's rows and of x·A · scale."""
        grad, grad_x = pair.of(grad_MO), pair.of(grad_x_MI)
        torch.bmm(grad, self.matrices(pair.experts).transpose(1, 2), out=grad_x)
        if self.rank:
            grad_low = torch.bmm(grad, self.b[pair.experts].contiguous().transpose(1, 2), out=pair.of(grad_low_MR))
            grad_x.baddbmm_(grad_low, self.a[pair.experts].contiguous().transpose(1, 2))


class _Gradients:
    """Where a projection's parameter gradients gather, for those that are asked for."""

    def __init__(self, projection: Projection, needed: tuple[bool, ...]) -> None:
        self.projection = projection
        self.weight, self.bias, self.lora_A, self.lora_B = (
            torch.zeros_like(parameter) if asked and parameter is not None else None
            for parameter, asked in zip(projection.parameters, needed, strict=True)
        )

    def add(self, pairs: Sequence[Pair], x_MI: Tensor, low_MR: Tensor, grad_MO: Tensor, grad_low_MR: Tensor) -> None:
        for pair in pairs:
            x, grad = pair.of(x_MI).transpose(1, 2), pair.of(grad_MO)
            if self.weight is not None:
                of_weight = torch.bmm(x, grad)
                of_weight = of_weight if self.projection.transposed else of_weight.transpose(1, 2)
                self.weight[pair.experts] = of_weight
            if self.bias is not None:
                self.bias[pair.experts] = grad.sum(1)
            if self.lora_A is not None:
                self.lora_A[pair.experts] = torch.bmm(x, pair.of(grad_low_MR)).mul_(self.projection.scale)
            if self.lora_B is not None:
                self.lora_B[pair.experts] = torch.bmm(pair.of(low_MR).transpose(1, 2), grad)

    def all(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.lora_A, self.lora_B


class BatchedExperts(torch.autograd.Function):
    """Rows through their experts, weighted and summed per token.

    With w the router's weight of a row, a its gated activation and g the gradient of its token's output: the gradient
    of w is g · (a·W + bias) = (g·Wᵀ) · a + g · bias, so the down projection's output need not be kept.
    """

    @staticmethod
    def forward(ctx, hidden_TH, weight_Tk, routing, gate, keep, dtype, up_parts, down_parts, *parameters):  # type: ignore[no-untyped-def, override]
        up, down = Projection(dtype, parameters[:4], *up_parts), Projection(dtype, parameters[4:], *down_parts)
        x_TH = hidden_TH.to(dtype)
        rows = len(routing.token_P)
        down_PH = x_TH.new_empty(rows, x_TH.shape[1])
        kept = [x_TH.new_empty(rows, size) for size in (up.size_out, up.rank, down.rank)] if keep else None
        for block in routing.blocks:
            x_MH = x_TH.index_select(0, routing.token_P[block.rows])
            if kept is None:
                gate_up_MG, *lows = (x_TH.new_empty(len(x_MH), size) for size in (up.size_out, up.rank, down.rank))
            else:
                gate_up_MG, *lows = (rows_PX[block.rows] for rows_PX in kept)
            for pair in block.pairs:
                up.forward(pair, x_MH, gate_up_MG, lows[0])
            act_MF = torch.cat([gate.forward(part) for part in gate_up_MG.split(GATE_ROWS)])
            for pair in block.pairs:
                down.forward(pair, act_MF, down_PH[block.rows], lows[1])
        if kept is not None:
            ctx.save_for_backward(x_TH, *kept, *parameters)
            ctx.routing, ctx.gate, ctx.parts, ctx.given = routing, gate, (up_parts, down_parts), hidden_TH.dtype
        return combine(down_PH, routing.place_Tk, weight_Tk)

    @staticmethod
    def backward(ctx, grad_TH):  # type: ignore[no-untyped-def, override]
        x_TH, gate_up_PG, low_up_PR, low_down_PR, *parameters = ctx.saved_tensors
        dtype, routing = x_TH.dtype, ctx.routing
        up, down = Projection(dtype, parameters[:4], *ctx.parts[0]), Projection(dtype, parameters[4:], *ctx.parts[1])
        up_grads, down_grads = _Gradients(up, ctx.needs_input_grad[8:12]), _Gradients(down, ctx.needs_input_grad[12:16])
        grad_TH = grad_TH.to(dtype)
        grad_x_PH = x_TH.new_empty(len(routing.token_P), x_TH.shape[1])
        grad_weight_P = x_TH.new_empty(len(routing.token_P), dtype=torch.promote_types(dtype, torch.float32))
        for block in routing.blocks:
            token_M, weight_M1 = routing.token_P[block.rows], routing.weight_P[block.rows, None]
            grad_MH = grad_TH.index_select(0, token_M)
            grad_act_MF = x_TH.new_empty(len(token_M), down.size_in)
            grad_low_MR = x_TH.new_empty(len(token_M), down.rank)
            for pair in block.pairs:
                down.backward(pair, grad_MH, grad_act_MF, grad_low_MR)
            rows = (gate_up_PG[block.rows], grad_act_MF, weight_M1)
            parts = zip(*(rows_MX.split(GATE_ROWS) for rows_MX in rows), strict=True)
            act_MF, grad_gate_up_MG, grad_weight_P[block.rows] = (
                torch.cat(part) for part in zip(*(ctx.gate.backward(*part) for part in parts), strict=True)
            )
            weight_M1 = weight_M1.to(dtype)
            # On the narrower side of each product, where that is enough.
            low_MR = low_down_PR[block.rows] * weight_M1
            if down_grads.weight is not None or down_grads.bias is not None:
                grad_MH.mul_(weight_M1)
                low_MR = low_down_PR[block.rows]
            down_grads.add(block.pairs, act_MF, low_MR, grad_MH, grad_low_MR.mul_(weight_M1))
            grad_low_MR = x_TH.new_empty(len(token_M), up.rank)
            for pair in block.pairs:
                up.backward(pair, grad_gate_up_MG, grad_x_PH[block.rows], grad_low_MR)
            x_MH = x_TH.index_select(0, token_M)
            up_grads.add(block.pairs, x_MH, low_up_PR[block.rows], grad_gate_up_MG, grad_low_MR)
        grad_hidden = combine(grad_x_PH, routing.place_Tk, None).to(ctx.given)
        grad_weight = grad_weight_P.index_select(0, routing.place_Tk.reshape(-1)).view(routing.place_Tk.shape)
        if down.bias is not None:
            grad_weight += (grad_TH @ down.bias.T).gather(1, routing.expert_Tk)
        grad_weight = grad_weight.to(routing.weight_P.dtype)
        return grad_hidden, grad_weight, *[None] * 6, *up_grads.all(), *down_grads.all()
