"""Experts on the tile unit (`posttrain.engine.amx`): projections, adapters and what stands between in one kernel.

A thread takes one expert after another, packs its matrices and passes blocks of its rows, which stay in the thread's
caches between the products. As in `posttrain.engine.joined`, up projections are [x, x·A, 1] · [W; B; bias] and down
projections a · [W, A], to which [a·A, 1] · [B; bias] is added here. An expert's sums are added up in one order,
whichever thread makes them.

Axes as in `posttrain.engine.joined`; a rank is filled up with zeros to whole tiles.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import cfunc, njit

from posttrain.engine import amx
from posttrain.engine.amx import SUM, array_at, from_bfloat16, to_bfloat16
from posttrain.engine.gates import ClampedSwiglu, Gate
from posttrain.engine.joined import Parts, Routing, combine

BLOCK_ROWS = 128

Tensor = torch.Tensor
Tensors = Sequence[Tensor | None]

JOB = np.dtype(
    [("next", "i8")]
    + [(name, "i8") for name in ("experts", "tokens", "hidden", "size", "keep", "up_rank", "down_rank", "has_bias")]
    + [(name, "i8") for name in ("configuration", "order", "start", "token", "row_weight", "x", "grad")]
    + [(name, "i8") for name in ("gate_up", "up_low", "down_low", "out", "grad_weight")]
    + [(f"{side}_{name}", "i8") for side in ("up", "down") for name in ("weight", "expert", "stride", "in_rows")]
    + [(f"{side}_{name}", "i8") for side in ("up", "down") for name in ("A", "B", "B_rows", "grad_A", "grad_B")]
    + [("alpha", "f4"), ("bound", "f4")]
)
"""What a kernel is given: a counter that its threads share, sizes, addresses, strides in bytes.

A is [E, I, R] with its scale, B is [E, B_rows, O] with the bias behind its ranks; their gradients have the ranks first.
"""


@njit(cache=True)
def _filled(size, multiple):  # type: ignore[no-untyped-def]
    return (size + multiple - 1) // multiple * multiple


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def _sigmoid(value):  # type: ignore[no-untyped-def]
    # exp(-value) = 2**whole · exp(rest): Cody and Waite's reduction, the polynomial of Cephes.
    power = min(max(-value, np.float32(-87.0)), np.float32(87.0))
    whole = np.floor(power * np.float32(1.44269504) + np.float32(0.5))
    rest = power - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
    exp = np.float32(1.9875691500e-4) * rest + np.float32(1.3981999507e-3)
    exp = exp * rest + np.float32(8.3334519073e-3)
    exp = exp * rest + np.float32(4.1665795894e-2)
    exp = exp * rest + np.float32(1.6666665459e-1)
    exp = exp * rest + np.float32(5.0000001201e-1)
    exp = exp * rest * rest + rest + np.float32(1.0)
    return np.float32(1.0) / (np.float32(1.0) + exp * amx.power_of_two(np.int32(whole)))


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def _gate(sums, rows, size, alpha, bound, gate_up, act):  # type: ignore[no-untyped-def]
    """`gates.ClampedSwiglu.forward`: `gate_up` [M, G] and `act` [M, F] in bfloat16 from float32 `sums` [M, G]."""
    for row in range(rows):
        for unit in range(2 * size):
            gate_up[row, unit] = to_bfloat16(sums[row, unit])
        for unit in range(size):
            gate = min(from_bfloat16(gate_up[row, 2 * unit]), bound)
            up = min(max(from_bfloat16(gate_up[row, 2 * unit + 1]), -bound), bound)
            act[row, unit] = to_bfloat16(gate * _sigmoid(alpha * gate) * (up + np.float32(1.0)))


@njit(cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _gate_backward(grad, gate_up, weight, rows, size, alpha, bound, act, grad_gate_up, total):  # type: ignore[no-untyped-def]
    """`gates.ClampedSwiglu.backward`: the first two in bfloat16, and `total` is added to."""
    one, zero = np.float32(1.0), np.float32(0.0)
    for row in range(rows):
        summed, weight_here = zero, weight[row]
        for unit in range(size):
            given, up_given = from_bfloat16(gate_up[row, 2 * unit]), from_bfloat16(gate_up[row, 2 * unit + 1])
            gate, up = min(given, bound), min(max(up_given, -bound), bound) + one
            sigmoid = _sigmoid(alpha * gate)
            glu = gate * sigmoid
            summed += grad[row, unit] * (glu * up)
            act[row, unit] = to_bfloat16(glu * up)
            weighted = grad[row, unit] * weight_here
            slope = (sigmoid + alpha * glu * (one - sigmoid)) * up * weighted
            grad_gate_up[row, 2 * unit] = to_bfloat16(zero if given > bound else slope)
            grad_gate_up[row, 2 * unit + 1] = to_bfloat16(zero if abs(up_given) > bound else weighted * glu)
        total[row] += summed


@njit(cache=True)
def _gather(source, token, filled, hidden, out):  # type: ignore[no-untyped-def]
    """The tokens of a block's rows, zeros behind and below them."""
    for row in range(len(token)):
        out[row, :hidden] = source[token[row]]
        out[row, hidden:] = 0
    out[len(token) : filled] = 0


@njit(cache=True)
def _round(sums, first, out):  # type: ignore[no-untyped-def]
    """Columns of float32 from the `first` one on as bfloat16."""
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            out[row, column] = to_bfloat16(sums[row, first + column])


@njit(cache=True)
def _turn(low, weight, out):  # type: ignore[no-untyped-def]
    """Weighted rows [M, R] as columns, zeros beyond both."""
    out[:] = 0
    for row in range(low.shape[0]):
        for rank in range(low.shape[1]):
            out[rank, row] = to_bfloat16(from_bfloat16(low[row, rank]) * weight[row])


@njit(cache=True)
def _pack(matrix, stride, in_rows, rows, columns, out, out_rows):  # type: ignore[no-untyped-def]
    if in_rows:
        amx.pack(matrix, stride, rows, columns, out, out_rows)
    else:
        amx.pack_turned(matrix, stride, rows, columns, out, out_rows)


@cfunc("void(int64)", cache=True)
def forward(address):  # type: ignore[no-untyped-def]
    job = array_at(address, (1,), JOB)[0]
    hidden, size, columns = job.hidden, job.size, 2 * job.size
    up_ranks, down_ranks = _filled(job.up_rank, SUM), _filled(job.down_rank, SUM)
    along, width = hidden + job.up_B_rows, hidden + down_ranks
    order, start = array_at(job.order, (job.experts,), np.int64), array_at(job.start, (job.experts + 1,), np.int64)
    total = start[job.experts]
    token, x_TH = array_at(job.token, (total,), np.int64), array_at(job.x, (job.tokens, hidden), np.uint16)
    gate_up_PG, out_PH = (
        array_at(job.gate_up, (total, columns), np.uint16),
        array_at(job.out, (total, hidden), np.uint16),
    )
    up_low_PR = array_at(job.up_low, (total, job.up_rank), np.uint16)
    down_low_PR = array_at(job.down_low, (total, job.down_rank), np.uint16)
    # Packed matrices, then what a block is on its way.
    widest = max(columns, width)
    packed = hidden * up_ranks + along * columns + size * width + job.down_B_rows * hidden
    memory = np.empty(
        2 * packed + BLOCK_ROWS * (2 * (along + columns + size + job.down_B_rows) + 4 * widest) + 64, np.uint8
    )
    up_A = _filled(memory.ctypes.data, 64)
    up = up_A + 2 * hidden * up_ranks
    down = up + 2 * along * columns
    down_B = down + 2 * size * width
    left = down_B + 2 * job.down_B_rows * hidden
    sums = left + 2 * BLOCK_ROWS * along
    act = sums + 4 * BLOCK_ROWS * widest
    low = act + 2 * BLOCK_ROWS * size
    aside = low + 2 * BLOCK_ROWS * job.down_B_rows
    left_MJ, act_MF = array_at(left, (BLOCK_ROWS, along), np.uint16), array_at(act, (BLOCK_ROWS, size), np.uint16)
    low_MR = array_at(low, (BLOCK_ROWS, job.down_B_rows), np.uint16)
    aside_MG = array_at(aside, (BLOCK_ROWS, columns), np.uint16)
    up_low_MR = array_at(sums, (BLOCK_ROWS, up_ranks), np.float32)
    sums_MG, sums_MJ = (
        array_at(sums, (BLOCK_ROWS, columns), np.float32),
        array_at(sums, (BLOCK_ROWS, width), np.float32),
    )
    before = np.zeros(64, np.uint8)
    amx.store_configuration(before.ctypes.data)
    amx.load_configuration(job.configuration)
    number = amx.next_number(address)
    while number < job.experts:
        expert = order[number]
        if start[expert] < start[expert + 1]:
            amx.pack(job.up_A + 2 * expert * hidden * up_ranks, 2 * up_ranks, hidden, up_ranks, up_A, hidden)
            _pack(job.up_weight + expert * job.up_expert, job.up_stride, job.up_in_rows, hidden, columns, up, along)
            behind = up + hidden // SUM * amx.TILE_BYTES
            amx.pack(
                job.up_B + 2 * expert * job.up_B_rows * columns, 2 * columns, job.up_B_rows, columns, behind, along
            )
            _pack(
                job.down_weight + expert * job.down_expert, job.down_stride, job.down_in_rows, size, hidden, down, size
            )
            amx.pack(
                job.down_A + 2 * expert * size * down_ranks,
                2 * down_ranks,
                size,
                down_ranks,
                down + 2 * size * hidden,
                size,
            )
            rows_B = job.down_B_rows
            amx.pack(job.down_B + 2 * expert * rows_B * hidden, 2 * hidden, rows_B, hidden, down_B, rows_B)
        for row in range(start[expert], start[expert + 1], BLOCK_ROWS):
            stop = min(row + BLOCK_ROWS, start[expert + 1])
            rows, filled = stop - row, _filled(stop - row, 32)
            _gather(x_TH, token[row:stop], filled, hidden, left_MJ)
            if job.up_rank:
                amx.product(left, 2 * along, up_A, hidden, up_ranks, sums, 4 * up_ranks, filled)
                _round(up_low_MR, 0, left_MJ[:rows, hidden : hidden + job.up_rank])
                if job.keep:
                    up_low_PR[row:stop] = left_MJ[:rows, hidden : hidden + job.up_rank]
            if job.has_bias:
                left_MJ[:rows, hidden + job.up_rank] = amx.ONE
            amx.product(left, 2 * along, up, along, columns, sums, 4 * columns, filled)
            act_MF[rows:filled] = 0
            _gate(sums_MG, rows, size, job.alpha, job.bound, gate_up_PG[row:stop] if job.keep else aside_MG, act_MF)
            amx.product(act, 2 * size, down, size, width, sums, 4 * width, filled)
            if job.down_B_rows:
                low_MR[:filled] = 0
                _round(sums_MJ, hidden, low_MR[:rows, : job.down_rank])
                if job.keep:
                    down_low_PR[row:stop] = low_MR[:rows, : job.down_rank]
                if job.has_bias:
                    low_MR[:rows, job.down_rank] = amx.ONE
                rows_B = job.down_B_rows
                amx.add_product(low, 2 * rows_B, down_B, rows_B, hidden, sums, 4 * width, filled)
            _round(sums_MJ, 0, out_PH[row:stop])
        number = amx.next_number(address)
    amx.load_configuration(before.ctypes.data)
    memory[0] = 0  # numba frees an array after its last use.


@cfunc("void(int64)", cache=True)
def backward(address):  # type: ignore[no-untyped-def]
    job = array_at(address, (1,), JOB)[0]
    hidden, size, columns = job.hidden, job.size, 2 * job.size
    up_ranks, down_ranks = _filled(job.up_rank, SUM), _filled(job.down_rank, SUM)
    along, width, rows_B = hidden + down_ranks, hidden + up_ranks, job.down_B_rows
    order, start = array_at(job.order, (job.experts,), np.int64), array_at(job.start, (job.experts + 1,), np.int64)
    total = start[job.experts]
    token, row_weight = array_at(job.token, (total,), np.int64), array_at(job.row_weight, (total,), np.float32)
    x_TH = array_at(job.x, (job.tokens, hidden), np.uint16)
    grad_TH = array_at(job.grad, (job.tokens, hidden), np.uint16)
    gate_up_PG, out_PH = (
        array_at(job.gate_up, (total, columns), np.uint16),
        array_at(job.out, (total, hidden), np.uint16),
    )
    up_low_PR = array_at(job.up_low, (total, job.up_rank), np.uint16)
    down_low_PR = array_at(job.down_low, (total, job.down_rank), np.uint16)
    grad_weight_P = array_at(job.grad_weight, (total,), np.float32)
    # Packed matrices, then what a block is on its way.
    widest = max(size, width, rows_B)
    packed = hidden * rows_B + along * size + columns * width + up_ranks * hidden
    block = 2 * (along + 2 * hidden + 2 * size + 2 * columns + down_ranks + 2 * up_ranks) + 4 * widest
    memory = np.empty(2 * packed + BLOCK_ROWS * block + 64, np.uint8)
    down_B = _filled(memory.ctypes.data, 64)
    down = down_B + 2 * hidden * rows_B
    up = down + 2 * along * size
    up_A = up + 2 * columns * width
    left = up_A + 2 * up_ranks * hidden
    x = left + 2 * BLOCK_ROWS * along
    packed_rows = x + 2 * BLOCK_ROWS * hidden
    act = packed_rows + 2 * BLOCK_ROWS * hidden
    packed_act = act + 2 * BLOCK_ROWS * size
    grad = packed_act + 2 * BLOCK_ROWS * size
    packed_grad = grad + 2 * BLOCK_ROWS * columns
    turned = packed_grad + 2 * BLOCK_ROWS * columns
    low = turned + 2 * BLOCK_ROWS * max(down_ranks, up_ranks)
    sums = low + 2 * BLOCK_ROWS * up_ranks
    left_MJ, x_MH = array_at(left, (BLOCK_ROWS, along), np.uint16), array_at(x, (BLOCK_ROWS, hidden), np.uint16)
    act_MF, grad_MG = array_at(act, (BLOCK_ROWS, size), np.uint16), array_at(grad, (BLOCK_ROWS, columns), np.uint16)
    low_MR = array_at(low, (BLOCK_ROWS, up_ranks), np.uint16)
    low_sums_MR = array_at(sums, (BLOCK_ROWS, rows_B), np.float32)
    grad_act_MF, sums_MJ = (
        array_at(sums, (BLOCK_ROWS, size), np.float32),
        array_at(sums, (BLOCK_ROWS, width), np.float32),
    )
    ones_M = np.ones(BLOCK_ROWS, np.float32)
    before = np.zeros(64, np.uint8)
    amx.store_configuration(before.ctypes.data)
    amx.load_configuration(job.configuration)
    number = amx.next_number(address)
    while number < job.experts:
        expert = order[number]
        if start[expert] < start[expert + 1]:
            amx.pack_turned(job.down_B + 2 * expert * rows_B * hidden, 2 * hidden, hidden, rows_B, down_B, hidden)
            _pack(
                job.down_weight + expert * job.down_expert,
                job.down_stride,
                1 - job.down_in_rows,
                hidden,
                size,
                down,
                along,
            )
            behind = down + hidden // SUM * amx.TILE_BYTES
            amx.pack_turned(
                job.down_A + 2 * expert * size * down_ranks, 2 * down_ranks, down_ranks, size, behind, along
            )
            _pack(
                job.up_weight + expert * job.up_expert, job.up_stride, 1 - job.up_in_rows, columns, hidden, up, columns
            )
            first_B = job.up_B + 2 * expert * job.up_B_rows * columns
            amx.pack_turned(first_B, 2 * columns, columns, up_ranks, up + 2 * columns * hidden, columns)
            amx.pack_turned(job.up_A + 2 * expert * hidden * up_ranks, 2 * up_ranks, up_ranks, hidden, up_A, up_ranks)
        for row in range(start[expert], start[expert + 1], BLOCK_ROWS):
            stop = min(row + BLOCK_ROWS, start[expert + 1])
            rows, filled = stop - row, _filled(stop - row, 32)
            weight_M, grad_weight_M = row_weight[row:stop], grad_weight_P[row:stop]
            turned_RM = array_at(turned, (down_ranks, filled), np.uint16)
            _gather(grad_TH, token[row:stop], filled, hidden, left_MJ)
            if rows_B:
                amx.product(left, 2 * along, down_B, hidden, rows_B, sums, 4 * rows_B, filled)
                if job.has_bias:
                    grad_weight_M[:] = low_sums_MR[:rows, job.down_rank]
            if job.down_rank:
                _round(low_sums_MR, 0, left_MJ[:rows, hidden : hidden + job.down_rank])
                # The gradient of B.
                _turn(down_low_PR[row:stop], weight_M, turned_RM)
                amx.pack(left, 2 * along, filled, hidden, packed_rows, filled)
                place = job.down_grad_B + 4 * expert * down_ranks * hidden
                amx.add_product(turned, 2 * filled, packed_rows, filled, hidden, place, 4 * hidden, down_ranks)
            amx.product(left, 2 * along, down, along, size, sums, 4 * size, filled)
            act_MF[rows:filled] = 0
            grad_MG[rows:filled] = 0
            gate_up_MG = gate_up_PG[row:stop]
            _gate_backward(
                grad_act_MF, gate_up_MG, weight_M, rows, size, job.alpha, job.bound, act_MF, grad_MG, grad_weight_M
            )
            if job.down_rank:
                _turn(left_MJ[:rows, hidden : hidden + job.down_rank], weight_M, turned_RM)
                amx.pack(act, 2 * size, filled, size, packed_act, filled)
                place = job.down_grad_A + 4 * expert * down_ranks * size
                amx.add_product(turned, 2 * filled, packed_act, filled, size, place, 4 * size, down_ranks)
            amx.product(grad, 2 * columns, up, columns, width, sums, 4 * width, filled)
            if job.up_rank:
                turned_RM = array_at(turned, (up_ranks, filled), np.uint16)
                _turn(up_low_PR[row:stop], ones_M, turned_RM)
                amx.pack(grad, 2 * columns, filled, columns, packed_grad, filled)
                place = job.up_grad_B + 4 * expert * up_ranks * columns
                amx.add_product(turned, 2 * filled, packed_grad, filled, columns, place, 4 * columns, up_ranks)
                low_MR[:filled] = 0
                _round(sums_MJ, hidden, low_MR[:rows, : job.up_rank])
                _turn(low_MR[:rows], ones_M, turned_RM)
                _gather(x_TH, token[row:stop], filled, hidden, x_MH)
                amx.pack(x, 2 * hidden, filled, hidden, packed_rows, filled)
                place = job.up_grad_A + 4 * expert * up_ranks * hidden
                amx.add_product(turned, 2 * filled, packed_rows, filled, hidden, place, 4 * hidden, up_ranks)
                amx.add_product(low, 2 * up_ranks, up_A, up_ranks, hidden, sums, 4 * width, filled)
            _round(sums_MJ, 0, out_PH[row:stop])
        number = amx.next_number(address)
    amx.load_configuration(before.ctypes.data)
    memory[0] = 0  # numba frees an array after its last use.


def _up_to_tiles(size: int) -> int:
    return -(-size // SUM) * SUM


def _filled_up(parts: list[Tensor], dim: int) -> Tensor:
    """The parts [E, ..., ...] one after another along `dim` in bfloat16, zeros up to whole tiles."""
    size = list(parts[0].shape)
    size[dim] = _up_to_tiles(sum(part.shape[dim] for part in parts))
    together = torch.zeros(size, dtype=torch.bfloat16)
    at = 0
    for part in parts:
        together.narrow(dim, at, part.shape[dim]).copy_(part)
        at += part.shape[dim]
    return together


def _run(
    kernel: Any, routing: Routing, gate: ClampedSwiglu, parts: tuple[Parts, Parts], tensors: Tensors, **more: Any
) -> None:
    """A kernel on a layer's tensors; `more` are further fields of its job, tensors by their addresses."""
    counts = np.array(routing.counts)
    given: dict[str, Any] = {"experts": len(counts), "order": np.argsort(-counts, kind="stable")}
    given |= {
        "start": np.concatenate(([0], counts.cumsum())),
        "token": routing.token_P,
        "configuration": amx.CONFIGURATION,
    }
    given |= {"alpha": gate.alpha, "bound": gate.bound, "has_bias": tensors[1] is not None} | more
    for side, part, (weight, bias, lora_A, lora_B) in zip(
        ("up", "down"), parts, (tensors[:4], tensors[4:]), strict=True
    ):
        assert weight is not None
        weight = weight.to(torch.bfloat16)
        expert, row, _ = weight.stride()
        given |= {f"{side}_weight": weight, f"{side}_expert": 2 * expert, f"{side}_stride": 2 * row}
        given[f"{side}_in_rows"] = part.transposed
        if lora_A is not None:
            given |= {f"{side}_A": _filled_up([lora_A * part.scale], 2), f"{side}_rank": lora_A.shape[2]}
        behind = [*([] if lora_B is None else [lora_B]), *([] if bias is None else [bias[:, None]])]
        if behind:
            given[f"{side}_B"] = _filled_up(behind, 1)
            given[f"{side}_B_rows"] = given[f"{side}_B"].shape[1]
    job = np.zeros(1, JOB)
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        job[name] = value.ctypes.data if isinstance(value, np.ndarray) else value
    amx.run(kernel, job)


class TiledExperts(torch.autograd.Function):
    """Rows through their experts, weighted and summed per token, on frozen weights with GPT-OSS' gate.

    The gradient of a row's weight is found as in `posttrain.engine.joined.JoinedExperts`.
    """

    @staticmethod
    def takes(gate: Gate, up: Tensors, down: Tensors) -> bool:
        """Whether the kernels are made for these: weight, bias and adapter of both projections."""
        if not isinstance(gate, ClampedSwiglu) or (up[1] is None) != (down[1] is None):
            return False
        frozen = [tensor for tensor in (*up[:2], *down[:2]) if tensor is not None]
        return not any(tensor.requires_grad for tensor in frozen) and all(
            weight is not None and weight.stride(2) == 1 and not any(side % SUM for side in weight.shape[1:])
            for weight in (up[0], down[0])
        )

    @staticmethod
    def forward(ctx, hidden_TH, weight_Tk, routing, gate, keep, parts, *tensors):  # type: ignore[no-untyped-def, override]
        x_TH = hidden_TH.to(torch.bfloat16).contiguous()
        rows, kept = len(routing.token_P), len(routing.token_P) if keep else 0
        size = tensors[4].shape[1 if parts[1].transposed else 2]
        ranks = [0 if factor is None else factor.shape[2] for factor in (tensors[2], tensors[6])]
        gate_up_PG, up_low_PR, down_low_PR = (x_TH.new_empty(kept, width) for width in (2 * size, *ranks))
        out_PH = x_TH.new_empty(rows, x_TH.shape[1])
        sizes = {"tokens": len(x_TH), "hidden": x_TH.shape[1], "size": size, "keep": keep}
        kept_tensors = {"x": x_TH, "gate_up": gate_up_PG, "up_low": up_low_PR, "down_low": down_low_PR}
        _run(forward, routing, gate, parts, tensors, **sizes, **kept_tensors, out=out_PH)
        if keep:
            ctx.save_for_backward(weight_Tk, *kept_tensors.values(), *tensors)
            ctx.routing, ctx.gate, ctx.parts, ctx.sizes, ctx.given = routing, gate, parts, sizes, hidden_TH.dtype
        return combine(out_PH, routing.place_Tk, weight_Tk)

    @staticmethod
    def backward(ctx, grad_TH):  # type: ignore[no-untyped-def, override]
        weight_Tk, x_TH, gate_up_PG, up_low_PR, down_low_PR, *tensors = ctx.saved_tensors
        kept = {"x": x_TH, "gate_up": gate_up_PG, "up_low": up_low_PR, "down_low": down_low_PR}
        routing: Routing = ctx.routing
        out_PH, grad_weight_P = x_TH.new_empty(len(gate_up_PG), x_TH.shape[1]), torch.zeros(len(gate_up_PG))
        sums: dict[str, Tensor] = {}
        for side, (_, _, lora_A, lora_B) in (("up", tensors[:4]), ("down", tensors[4:])):
            if lora_A is not None:
                experts, size_in, rank = lora_A.shape
                sums[f"{side}_grad_A"] = torch.zeros(experts, _up_to_tiles(rank), size_in)
                sums[f"{side}_grad_B"] = torch.zeros(experts, _up_to_tiles(rank), lora_B.shape[2])
        row_weight_P = routing.weight_P1.float().contiguous()
        rows = {"grad": grad_TH.to(x_TH.dtype).contiguous(), "row_weight": row_weight_P, "out": out_PH}
        _run(
            backward,
            routing,
            ctx.gate,
            ctx.parts,
            tensors,
            **ctx.sizes,
            **kept,
            **rows,
            **sums,
            grad_weight=grad_weight_P,
        )
        gradients: list[Tensor | None] = []
        for side, part, (_, _, lora_A, _) in zip(("up", "down"), ctx.parts, (tensors[:4], tensors[4:]), strict=True):
            gradients += [None, None]
            if lora_A is None:
                gradients += [None, None]
            else:
                ranks = slice(lora_A.shape[2])
                gradients.append(sums[f"{side}_grad_A"][:, ranks].transpose(1, 2) * part.scale)
                gradients.append(sums[f"{side}_grad_B"][:, ranks])
        grad_weight = grad_weight_P.index_select(0, routing.place_Tk.reshape(-1)).view(weight_Tk.shape)
        grad_hidden = combine(out_PH, routing.place_Tk, None).to(ctx.given)
        return grad_hidden, grad_weight.to(weight_Tk.dtype), *[None] * 4, *gradients
