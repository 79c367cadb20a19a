"""Mixture-of-experts products for processors: one product per expert and projection.

What a processor loses by are many small products, not some more operations in large ones. So tokens are sorted by
expert, and a projection's matrix, its bias and that factor of its adapter which stands at the experts' inner side are
one matrix: up projections are [x, x·A, 1] · [W; B; bias], down projections a · [W, A]. The other factor, at the side of
the tokens, is applied for all experts at once: x·A before the rows are sorted, the down projection's ·B after they are
added up, each as one product with the adapters of all experts side by side. No dense weight delta and no dense expert
gradient ever exists. The backward pass keeps the input, the up projection's output and what meets the B factors; the
rest is computed again.

Axes: T token, k choice of a token, P routed row (sorted by expert), M row of a block, E expert, H hidden, F expert size
(G twice that: gate and up), R adapter rank, X all experts' ranks side by side (E times R), I in, O out, J in or out
joined.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from posttrain.engine.gates import Gate
from posttrain.engine.mxfp4 import PackedExperts

JOINED_MULTIPLE = 16
"""What a joined side is filled up to with zeros where there is room: products like round sizes."""
BLOCK_ROWS = 1024
"""Rows that pass both projections before the next ones do: what stands between these stays in the caches."""

Tensor = torch.Tensor


@dataclass(frozen=True)
class Block:
    """Rows of some experts one behind the other, or a part of one's."""

    rows: slice
    experts: list[int]
    sizes: list[int]

    def each(self, *rows_M: Tensor) -> Iterator[tuple[Any, ...]]:
        """Every expert with its part of the block's rows."""
        return zip(self.experts, *(rows.split(self.sizes) for rows in rows_M), strict=True)


@dataclass(frozen=True)
class Routing:
    """Which rows each expert works on. Rows that only fill up are of token 0 with weight 0 and without an adapter."""

    counts: list[int]
    """Rows of each expert."""
    blocks: list[Block]
    token_P: Tensor
    weight_P1: Tensor
    """The router's."""
    pair_P: Tensor
    """Number of the row's token and expert among all pairs; as many as there are pairs in rows that only fill up."""
    expert_Tk: Tensor
    place_Tk: Tensor
    """The row of each token's k-th choice."""

    @property
    def experts(self) -> int:
        return len(self.counts)


def route(expert_Tk: Tensor, weight_Tk: Tensor, num_experts: int, multiple: int) -> Routing:
    """Each expert's rows are filled up to a multiple."""
    tokens, per_token = expert_Tk.shape
    device = expert_Tk.device
    # The choices N in the order of their experts.
    expert_N, order_N = torch.sort(expert_Tk.reshape(-1), stable=True)
    count_E = torch.bincount(expert_N, minlength=num_experts)
    filled_E = (count_E + (multiple - 1)) // multiple * multiple
    shift_E = (filled_E - count_E).cumsum(0) - (filled_E - count_E)
    row_N = torch.arange(len(expert_N), device=device) + shift_E.index_select(0, expert_N)
    counts = filled_E.tolist()
    token_N = order_N // per_token
    token_P = torch.zeros(sum(counts), dtype=torch.long, device=device).index_copy_(0, row_N, token_N)
    pair_P = torch.full_like(token_P, tokens * num_experts).index_copy_(0, row_N, token_N * num_experts + expert_N)
    weight_P = weight_Tk.new_zeros(len(token_P)).index_copy_(0, row_N, weight_Tk.reshape(-1).index_select(0, order_N))
    place_N = torch.empty_like(row_N).index_copy_(0, order_N, row_N)
    place_Tk = place_N.view(tokens, per_token)
    return Routing(counts, plan_blocks(counts), token_P, weight_P[:, None], pair_P, expert_Tk, place_Tk)


def plan_blocks(count_E: list[int]) -> list[Block]:
    """An expert is cut where it has more rows than a block."""
    blocks: list[Block] = []
    for expert, count in enumerate(count_E):
        for start in range(0, count, BLOCK_ROWS):
            size = min(count - start, BLOCK_ROWS)
            row = blocks[-1].rows.stop if blocks else 0
            if blocks and sum(blocks[-1].sizes) + size <= BLOCK_ROWS:
                last = blocks.pop()
                blocks.append(Block(slice(last.rows.start, row + size), [*last.experts, expert], [*last.sizes, size]))
            else:
                blocks.append(Block(slice(row, row + size), [expert], [size]))
    return blocks


def combine(rows_PJ: Tensor, place_Tk: Tensor, weights_Tk: Tensor | None) -> Tensor:
    """The (weighted) sum of each token's rows; always in the same order."""
    if rows_PJ.device.type == "cpu":
        weights_Tk = None if weights_Tk is None else weights_Tk.to(rows_PJ.dtype)
        return nn.functional.embedding_bag(place_Tk, rows_PJ, per_sample_weights=weights_Tk, mode="sum")
    rows_TkJ = rows_PJ.index_select(0, place_Tk.reshape(-1)).view(*place_Tk.shape, -1)
    return (rows_TkJ if weights_Tk is None else rows_TkJ * weights_Tk[..., None]).sum(1, dtype=rows_PJ.dtype)


def with_room(weight: Tensor, dim: int, more: int) -> Tensor:
    """A copy of [E, ...] that ends in `more` zeros and some along `dim`."""
    size = list(weight.shape)
    size[dim] = -(-(size[dim] + more) // JOINED_MULTIPLE) * JOINED_MULTIPLE
    room = weight.new_zeros(size)
    room.narrow(dim, 0, weight.shape[dim]).copy_(weight)
    return room


@dataclass(frozen=True)
class Parts:
    """What a projection is made from besides its tensors."""

    scale: float
    """Of the adapter."""
    transposed: bool
    """Whether the weight is stored (in, out)."""
    packed: PackedExperts | None
    """Holds the weight where it is kept in four bits."""
    room: Tensor | None
    """The frozen weight's memory, where it has room for what joins it."""

    def turned(self, matrices_EIO: Tensor) -> Tensor:
        """From the way the weight is stored to [E, in, out], or back."""
        return matrices_EIO if self.transposed else matrices_EIO.transpose(1, 2)


class _Joined:
    """A projection's matrices [E, I, O] with what joins them along one of these sides, in the type of the products."""

    def __init__(self, weight: Tensor | None, parts: Parts, dim: int, more: list[Tensor], dtype: torch.dtype) -> None:
        self.more, self.dim, self.dtype, self.packed = [tensor.to(dtype) for tensor in more], dim, dtype, parts.packed
        self.together: Tensor | None = None
        if weight is None:
            assert parts.packed is not None
            size = list(parts.packed.shape)
            size[dim] += sum(tensor.shape[dim] for tensor in more)
        else:
            self.together = self._together(weight, parts)
            size = list(self.together.shape)
        self.size_in, self.size_out = size[1:]

    def _together(self, weight: Tensor, parts: Parts) -> Tensor:
        room = None if parts.room is None else parts.turned(parts.room)
        weight = parts.turned(weight.to(self.dtype))
        start, needed = weight.shape[self.dim], sum(tensor.shape[self.dim] for tensor in self.more)
        if room is None or room.dtype != self.dtype or room.shape[self.dim] < start + needed:
            return torch.cat((weight, *self.more), self.dim)
        # Written every time: whether factors have changed cannot be seen.
        for tensor in self.more:
            room.narrow(self.dim, start, tensor.shape[self.dim]).copy_(tensor)
            start += tensor.shape[self.dim]
        return room

    def matrix(self, expert: int) -> Tensor:
        if self.together is not None:
            return self.together[expert]
        assert self.packed is not None
        matrix = self.packed.matrix(expert, self.dtype)
        return torch.cat((matrix, *(tensor[expert] for tensor in self.more)), self.dim - 1)

    def forward(self, block: Block, rows_MI: Tensor, out_MO: Tensor) -> None:
        for expert, rows, out in block.each(rows_MI, out_MO):
            torch.mm(rows, self.matrix(expert), out=out)

    def backward(self, block: Block, grad_MO: Tensor, out_MI: Tensor) -> None:
        for expert, grad, out in block.each(grad_MO, out_MI):
            torch.mm(grad, self.matrix(expert).T, out=out)


def _add_outer_products(block: Block, left_MI: Tensor, right_MO: Tensor, sum_EIO: Tensor) -> None:
    # Added up in float32, as an expert's rows may be in several blocks.
    for expert, left, right in block.each(left_MI, right_MO):
        sum_EIO[expert] += left.T @ right


class _Layer:
    """The tensors of one call, laid out for the products; ranks are 0 where there is no adapter."""

    def __init__(
        self, routing: Routing, dtype: torch.dtype, parts: tuple[Parts, Parts], tensors: Sequence[Tensor | None]
    ) -> None:
        up_weight, up_bias, up_A, up_B, down_weight, down_bias, down_A, down_B = tensors
        self.routing = routing
        self.up_ranks, self.down_ranks = (0 if factor is None else factor.shape[1] for factor in (up_B, down_B))
        self.up_A_HX = None if up_A is None else (up_A * parts[0].scale).to(dtype).transpose(0, 1).flatten(1)
        self.down_B_XH = None if down_B is None else down_B.to(dtype).flatten(0, 1)
        self.down_bias_EH = None if down_bias is None else down_bias.to(dtype)
        self.has_up_bias = up_bias is not None
        up_more = [*([] if up_B is None else [up_B]), *([] if up_bias is None else [up_bias[:, None]])]
        self.up = _Joined(up_weight, parts[0], 1, up_more, dtype)
        self.down = _Joined(down_weight, parts[1], 2, [] if down_A is None else [down_A * parts[1].scale], dtype)

    def of_rows(self, all_TX: Tensor) -> Tensor:
        """Of every row its own ranks, [P, R]."""
        ranks = all_TX.shape[1] // self.routing.experts
        return nn.functional.pad(all_TX.view(-1, ranks), (0, 0, 0, 1)).index_select(0, self.routing.pair_P)

    def of_tokens(self, rows_PR: Tensor, tokens: int) -> Tensor:
        """The reverse, [T, X]: zeros where a token has not chosen an expert."""
        pairs = tokens * self.routing.experts
        all_QR = rows_PR.new_zeros(pairs + 1, rows_PR.shape[1]).index_copy_(0, self.routing.pair_P, rows_PR)
        return all_QR[:pairs].view(tokens, -1)

    def rows(self, block: Block, wide_TJ: Tensor, low_PR: Tensor | None, hidden: int) -> Tensor:
        """The tokens [M, J] of a block's rows with the adapter's part behind their `hidden` values."""
        rows_MJ = wide_TJ.index_select(0, self.routing.token_P[block.rows])
        if low_PR is not None:
            rows_MJ[:, hidden : hidden + low_PR.shape[1]] = low_PR[block.rows]
        return rows_MJ

    def widened(self, x_TH: Tensor) -> Tensor:
        """The up projections' inputs but for x·A."""
        hidden = x_TH.shape[1]
        wide_TJ = nn.functional.pad(x_TH, (0, self.up.size_in - hidden))
        if self.has_up_bias:
            wide_TJ[:, hidden + self.up_ranks] = 1
        return wide_TJ

    def weights_of_tokens(self, weight_Tk: Tensor) -> Tensor:
        """The router's weights [T, E]."""
        expert_Tk = self.routing.expert_Tk
        return weight_Tk.new_zeros(len(weight_Tk), self.routing.experts).scatter_(1, expert_Tk, weight_Tk)

    def forward(self, x_TH: Tensor, up_low_PR: Tensor | None, gate: Gate, keep: bool) -> tuple[Tensor, Tensor]:
        """The up projection's outputs [P, G], none unless they are kept, and the down projection's [P, J]."""
        rows = len(self.routing.token_P)
        hidden, wide_TJ = x_TH.shape[1], self.widened(x_TH)
        gate_up_PG = x_TH.new_empty(rows if keep else 0, self.up.size_out)
        down_PJ = x_TH.new_empty(rows, self.down.size_out)
        for block in self.routing.blocks:
            rows_MJ = self.rows(block, wide_TJ, up_low_PR, hidden)
            gate_up_MG = gate_up_PG[block.rows] if keep else x_TH.new_empty(len(rows_MJ), self.up.size_out)
            self.up.forward(block, rows_MJ, gate_up_MG)
            self.down.forward(block, gate.forward(gate_up_MG), down_PJ[block.rows])
        return gate_up_PG, down_PJ

    def backward(
        self,
        grad_TH: Tensor,
        grad_low_PR: Tensor | None,
        gate_up_PG: Tensor,
        gate: Gate,
        x_TH: Tensor | None,
        up_low_PR: Tensor | None,
        whole_down: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the up projection's inputs [P, J], of the rows' weights [P] and of the joined matrices.

        Of these only what joins a frozen weight, and all inputs and outputs where `x_TH` and `whole_down` are given.
        """
        hidden, dtype = grad_TH.shape[1], grad_TH.dtype
        weight_P1 = self.routing.weight_P1.to(dtype)
        wide_grad_TJ = nn.functional.pad(grad_TH, (0, self.down.size_out - hidden))
        grad_weight_P = weight_P1.new_empty(len(weight_P1), dtype=torch.promote_types(dtype, torch.float32))
        grad_PJ = grad_TH.new_empty(len(weight_P1), self.up.size_in)
        wide_TJ = None if x_TH is None else self.widened(x_TH)
        up_width = self.up_ranks if x_TH is None else self.up.size_in
        up_EJG = grad_weight_P.new_zeros(self.routing.experts, up_width, self.up.size_out)
        wanted = slice(0 if whole_down else hidden, hidden + self.down_ranks)
        down_EFJ = grad_weight_P.new_zeros(self.routing.experts, self.down.size_in, wanted.stop - wanted.start)
        for block in self.routing.blocks:
            grad_MJ = self.rows(block, wide_grad_TJ, grad_low_PR, hidden)
            grad_act_MF = grad_TH.new_empty(len(grad_MJ), self.down.size_in)
            self.down.backward(block, grad_MJ, grad_act_MF)
            gated = gate.backward(gate_up_PG[block.rows], grad_act_MF, self.routing.weight_P1[block.rows])
            act_MF, grad_gate_up_MG, grad_weight_P[block.rows] = gated
            if down_EFJ.shape[2]:
                _add_outer_products(block, act_MF, grad_MJ[:, wanted] * weight_P1[block.rows], down_EFJ)
            if wide_TJ is not None:
                _add_outer_products(block, self.rows(block, wide_TJ, up_low_PR, hidden), grad_gate_up_MG, up_EJG)
            elif up_low_PR is not None:
                _add_outer_products(block, up_low_PR[block.rows], grad_gate_up_MG, up_EJG)
            self.up.backward(block, grad_gate_up_MG, grad_PJ[block.rows])
        return grad_PJ, grad_weight_P, up_EJG, down_EFJ


class JoinedExperts(torch.autograd.Function):
    """Rows through their experts, weighted and summed per token.

    With w the router's weight of a row, a its gated activation and g the gradient of its token's output: the gradient
    of w is g · (a·W + bias) = (g·Wᵀ) · a + g · bias, so the down projection's output need not be kept.
    """

    @staticmethod
    def forward(ctx, hidden_TH, weight_Tk, routing, gate, keep, dtype, parts, *tensors):  # type: ignore[no-untyped-def, override]
        layer = _Layer(routing, dtype, parts, tensors)
        x_TH = hidden_TH.to(dtype)
        tokens, hidden = x_TH.shape
        up_low_PR = None if layer.up_A_HX is None else layer.of_rows(x_TH @ layer.up_A_HX)
        gate_up_PG, down_PJ = layer.forward(x_TH, up_low_PR, gate, keep)
        out_TH = combine(down_PJ, routing.place_Tk, weight_Tk)[:, :hidden]
        down_low_PR = None
        if layer.down_B_XH is not None:
            down_low_PR = down_PJ[:, hidden : hidden + layer.down_ranks] * routing.weight_P1.to(dtype)
            out_TH = torch.addmm(out_TH, layer.of_tokens(down_low_PR, tokens), layer.down_B_XH)
        if layer.down_bias_EH is not None:
            out_TH = torch.addmm(out_TH, layer.weights_of_tokens(weight_Tk).to(dtype), layer.down_bias_EH)
        if keep:
            ctx.save_for_backward(x_TH, weight_Tk, gate_up_PG, up_low_PR, down_low_PR, *tensors)
            ctx.routing, ctx.gate, ctx.parts, ctx.given = routing, gate, parts, hidden_TH.dtype
        return out_TH

    @staticmethod
    def backward(ctx, grad_TH):  # type: ignore[no-untyped-def, override]
        x_TH, weight_Tk, gate_up_PG, up_low_PR, down_low_PR, *tensors = ctx.saved_tensors
        routing, dtype, needed = ctx.routing, x_TH.dtype, ctx.needs_input_grad[7:]
        layer = _Layer(routing, dtype, ctx.parts, tensors)
        tokens, hidden = x_TH.shape
        grad_TH = grad_TH.to(dtype)
        grad_low_PR = None if layer.down_B_XH is None else layer.of_rows(grad_TH @ layer.down_B_XH.T)
        # Of a frozen weight only what joins it has a gradient.
        whole_up, whole_down = needed[0] or needed[1], needed[4]
        grad_PJ, grad_weight_P, up_EJG, down_EFJ = layer.backward(
            grad_TH, grad_low_PR, gate_up_PG, ctx.gate, x_TH if whole_up else None, up_low_PR, whole_down
        )
        grad_hidden = combine(grad_PJ, routing.place_Tk, None)[:, :hidden]
        behind_EJG = up_EJG[:, hidden:] if whole_up else up_EJG
        up_A, down_bias, down_B = None, None, None
        if layer.up_A_HX is not None:
            grad_low_TX = layer.of_tokens(grad_PJ[:, hidden : hidden + layer.up_ranks], tokens)
            up_A = (x_TH.T @ grad_low_TX).unflatten(1, (routing.experts, -1)).transpose(0, 1) * ctx.parts[0].scale
            grad_hidden = torch.addmm(grad_hidden, grad_low_TX, layer.up_A_HX.T)
        if layer.down_B_XH is not None:
            down_B = (layer.of_tokens(down_low_PR, tokens).T @ grad_TH).view_as(tensors[7])
        grad_weight = grad_weight_P.index_select(0, routing.place_Tk.reshape(-1)).view(weight_Tk.shape)
        if layer.down_bias_EH is not None:
            grad_weight += (grad_TH @ layer.down_bias_EH.T).gather(1, routing.expert_Tk)
            down_bias = layer.weights_of_tokens(weight_Tk).to(dtype).T @ grad_TH
        grads = (
            ctx.parts[0].turned(up_EJG[:, :hidden]) if whole_up else None,
            behind_EJG[:, layer.up_ranks] if whole_up and layer.has_up_bias else None,
            up_A,
            behind_EJG[:, : layer.up_ranks] if layer.up_ranks else None,
            ctx.parts[1].turned(down_EFJ[..., :hidden]) if whole_down else None,
            down_bias,
            down_EFJ[..., -layer.down_ranks :] * ctx.parts[1].scale if layer.down_ranks else None,
            down_B,
        )
        given = [gradient if asked else None for asked, gradient in zip(needed, grads, strict=True)]
        return grad_hidden.to(ctx.given), grad_weight.to(weight_Tk.dtype), *[None] * 5, *given
