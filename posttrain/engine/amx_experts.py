"""Experts on the tile unit (`posttrain.engine.amx`): projections, adapters and what stands between in one kernel.

A thread takes one expert after another, packs its matrices and passes blocks of its rows, which stay in the thread's
caches between the products. As in `posttrain.engine.joined`, up projections are [x, x·A, 1] · [W; B; bias] and down
projections a · [W, A], to which [a·A, 1] · [B; bias] is added here. An expert's sums are added up in one order,
whichever thread makes them.

Axes as in `posttrain.engine.joined`; a rank is filled up with zeros to whole tiles.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import cfunc, njit

from posttrain.engine import amx, jit
from posttrain.engine.amx import SUM, TILE_BYTES
from posttrain.engine.gates import ClampedSwiglu, Gate
from posttrain.engine.jit import array_at, exp, fill_up, from_bfloat16, next_number, to_bfloat16
from posttrain.engine.joined import Parts, Routing, combine

BLOCK_ROWS = 128

Tensor = torch.Tensor
Tensors = Sequence[Tensor | None]

JOB = np.dtype(
    [("next", "i8")]
    + [(name, "i8") for name in ("experts", "tokens", "hidden", "size", "keep", "up_rank", "down_rank", "has_bias")]
    + [(name, "i8") for name in ("order", "start", "token", "row_weight", "x", "grad")]
    + [(name, "i8") for name in ("gate_up", "up_low", "down_low", "out", "grad_weight")]
    + [(f"{side}_{name}", "i8") for side in ("up", "down") for name in ("weight", "expert", "stride", "in_rows")]
    + [(f"{side}_{name}", "i8") for side in ("up", "down") for name in ("bias", "A", "B", "grad_A", "grad_B")]
    + [(name, "f4") for name in ("alpha", "bound", "up_scale", "down_scale")]
)
"""What a kernel is given: a counter that its threads share, sizes, addresses, strides in bytes.

Biases, factors and their gradients are in float32 as the adapter has them.
"""


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def _sigmoid(value: np.float32) -> np.float32:
    return np.float32(1.0) / (np.float32(1.0) + exp(-value))


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def _gate(
    sums: np.ndarray, rows: int, size: int, alpha: np.float32, bound: np.float32, gate_up: np.ndarray, act: np.ndarray
) -> None:
    """`gates.ClampedSwiglu.forward`: `gate_up` [M, G] and `act` [M, F] in bfloat16 from float32 `sums` [M, G]."""
    for row in range(rows):
        for unit in range(2 * size):
            gate_up[row, unit] = to_bfloat16(sums[row, unit])
        for unit in range(size):
            gate = min(from_bfloat16(gate_up[row, 2 * unit]), bound)
            up = min(max(from_bfloat16(gate_up[row, 2 * unit + 1]), -bound), bound)
            act[row, unit] = to_bfloat16(gate * _sigmoid(alpha * gate) * (up + np.float32(1.0)))


@njit(cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _gate_backward(
    grad: np.ndarray,
    gate_up: np.ndarray,
    weight: np.ndarray,
    rows: int,
    size: int,
    alpha: np.float32,
    bound: np.float32,
    act: np.ndarray,
    grad_gate_up: np.ndarray,
    total: np.ndarray,
) -> None:
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
def _gather(source: np.ndarray, token: np.ndarray, filled: int, hidden: int, out: np.ndarray) -> None:
    """The tokens of a block's rows, zeros behind and below them."""
    for row in range(len(token)):
        number = token[row]
        for column in range(hidden):
            out[row, column] = source[number, column]
        for column in range(hidden, out.shape[1]):
            out[row, column] = 0
    out[len(token) : filled] = 0


@njit(cache=True)
def _round(sums: np.ndarray, first: int, out: np.ndarray) -> None:
    """Columns of float32 from the `first` one on as bfloat16."""
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            out[row, column] = to_bfloat16(sums[row, first + column])


@njit(cache=True)
def _turn(low: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    """Weighted rows [M, R] as columns, zeros beyond both."""
    out[:] = 0
    for row in range(low.shape[0]):
        for rank in range(low.shape[1]):
            out[rank, row] = to_bfloat16(from_bfloat16(low[row, rank]) * weight[row])


@njit(cache=True)
def _behind(job: Any, rank: int) -> int:
    """Rows of a joined B: ranks and the bias, whole tiles."""
    return fill_up(rank + job.has_bias, SUM)


@njit(cache=True)
def _place_A(factor: int, expert: int, size: int, rank: int, scale: np.float32, out: int) -> None:
    """An expert's scaled A [I, R] in bfloat16, columns filled up with zeros."""
    out_IR = array_at(out, (size, fill_up(rank, SUM)), np.uint16)
    if rank:
        A_IR = array_at(factor + 4 * expert * size * rank, (size, rank), np.float32)
        out_IR[:] = 0
        for row in range(size):
            for column in range(rank):
                out_IR[row, column] = to_bfloat16(A_IR[row, column] * scale)


@njit(cache=True)
def _place_B(job: Any, factor: int, bias: int, expert: int, rank: int, columns: int, out: int) -> None:
    """An expert's B [R, O] and its bias in bfloat16, rows filled up with zeros."""
    out_JO = array_at(out, (_behind(job, rank), columns), np.uint16)
    out_JO[:] = 0
    B_RO = array_at(factor + 4 * expert * rank * columns, (rank, columns), np.float32)
    _round(B_RO, 0, out_JO[:rank])
    if job.has_bias:
        _round(array_at(bias + 4 * expert * columns, (1, columns), np.float32), 0, out_JO[rank : rank + 1])


@njit(cache=True)
def _pack(matrix: int, stride: int, in_rows: int, rows: int, columns: int, out: int, out_rows: int) -> None:
    if in_rows:
        amx.pack(matrix, stride, rows, columns, out, out_rows)
    else:
        amx.pack_turned(matrix, stride, rows, columns, out, out_rows)


class _Forward(NamedTuple):
    """Addresses: packed matrices, then what a block of rows is on its way."""

    up_A: int
    up: int
    down: int
    down_B: int
    left: int
    gate_up: int
    act: int
    low: int
    loose: int
    sums: int
    end: int


@njit(cache=True)
def _forward_places(job: Any, start: int) -> _Forward:
    up_ranks, down_ranks = fill_up(job.up_rank, SUM), fill_up(job.down_rank, SUM)
    columns, along, width = 2 * job.size, job.hidden + _behind(job, job.up_rank), job.hidden + down_ranks
    up = start + 2 * job.hidden * up_ranks
    down = up + 2 * along * columns
    down_B = down + 2 * job.size * width
    left = down_B + 2 * _behind(job, job.down_rank) * job.hidden
    gate_up = left + 2 * BLOCK_ROWS * along
    act = gate_up + 2 * BLOCK_ROWS * columns
    low = act + 2 * BLOCK_ROWS * job.size
    loose = low + 2 * BLOCK_ROWS * _behind(job, job.down_rank)
    sums = loose + _loose(job)
    end = sums + 4 * BLOCK_ROWS * max(columns, width)
    return _Forward(start, up, down, down_B, left, gate_up, act, low, loose, sums, end)


@njit(cache=True)
def _pack_forward(job: Any, expert: int, at: _Forward) -> None:
    hidden, size, columns = job.hidden, job.size, 2 * job.size
    up_ranks, down_ranks = fill_up(job.up_rank, SUM), fill_up(job.down_rank, SUM)
    up_behind, down_behind = _behind(job, job.up_rank), _behind(job, job.down_rank)
    along = hidden + up_behind
    _pack(job.up_weight + expert * job.up_expert, job.up_stride, job.up_in_rows, hidden, columns, at.up, along)
    _place_A(job.up_A, expert, hidden, job.up_rank, job.up_scale, at.loose)
    amx.pack(at.loose, 2 * up_ranks, hidden, up_ranks, at.up_A, hidden)
    _place_B(job, job.up_B, job.up_bias, expert, job.up_rank, columns, at.loose)
    amx.pack(at.loose, 2 * columns, up_behind, columns, at.up + hidden // SUM * TILE_BYTES, along)
    _pack(job.down_weight + expert * job.down_expert, job.down_stride, job.down_in_rows, size, hidden, at.down, size)
    _place_A(job.down_A, expert, size, job.down_rank, job.down_scale, at.loose)
    amx.pack(at.loose, 2 * down_ranks, size, down_ranks, at.down + 2 * size * hidden, size)
    _place_B(job, job.down_B, job.down_bias, expert, job.down_rank, hidden, at.loose)
    amx.pack(at.loose, 2 * hidden, down_behind, hidden, at.down_B, down_behind)


@njit(cache=True)
def _loose(job: Any) -> int:
    """Bytes of the largest factor with what fills it up."""
    up_ranks, down_ranks = fill_up(job.up_rank, SUM), fill_up(job.down_rank, SUM)
    B = max(2 * job.size * _behind(job, job.up_rank), job.hidden * _behind(job, job.down_rank))
    return 2 * max(job.hidden * up_ranks, job.size * down_ranks, B)


@njit(cache=True)
def _forward_block(job: Any, row: int, stop: int, total: int, at: _Forward) -> None:
    hidden, size, columns, rows_B = job.hidden, job.size, 2 * job.size, _behind(job, job.down_rank)
    up_ranks = fill_up(job.up_rank, SUM)
    along, width = hidden + _behind(job, job.up_rank), hidden + fill_up(job.down_rank, SUM)
    rows, filled = stop - row, fill_up(stop - row, 32)
    left_MJ = array_at(at.left, (BLOCK_ROWS, along), np.uint16)
    x_TH, token_P = array_at(job.x, (job.tokens, hidden), np.uint16), array_at(job.token, (total,), np.int64)
    _gather(x_TH, token_P[row:stop], filled, hidden, left_MJ)
    if job.up_rank:
        amx.product(
            at.left, 2 * along, at.up_A, hidden, up_ranks, at.sums, 4 * up_ranks, filled, hidden // SUM * TILE_BYTES
        )
        low_MR = left_MJ[:rows, hidden : hidden + job.up_rank]
        _round(array_at(at.sums, (BLOCK_ROWS, up_ranks), np.float32), 0, low_MR)
        if job.keep:
            array_at(job.up_low, (total, job.up_rank), np.uint16)[row:stop] = low_MR
    if job.has_bias:
        left_MJ[:rows, hidden + job.up_rank] = jit.ONE
    amx.product(at.left, 2 * along, at.up, along, columns, at.sums, 4 * columns, filled, along // SUM * TILE_BYTES)
    act_MF = array_at(at.act, (BLOCK_ROWS, size), np.uint16)
    act_MF[rows:filled] = 0
    gate_up_MG = array_at(at.gate_up, (BLOCK_ROWS, columns), np.uint16)
    if job.keep:
        gate_up_MG = array_at(job.gate_up, (total, columns), np.uint16)[row:stop]
    _gate(array_at(at.sums, (BLOCK_ROWS, columns), np.float32), rows, size, job.alpha, job.bound, gate_up_MG, act_MF)
    amx.product(at.act, 2 * size, at.down, size, width, at.sums, 4 * width, filled, size // SUM * TILE_BYTES)
    sums_MJ = array_at(at.sums, (BLOCK_ROWS, width), np.float32)
    if rows_B:
        low_MR = array_at(at.low, (BLOCK_ROWS, rows_B), np.uint16)
        low_MR[:filled] = 0
        _round(sums_MJ, hidden, low_MR[:rows, : job.down_rank])
        if job.keep:
            array_at(job.down_low, (total, job.down_rank), np.uint16)[row:stop] = low_MR[:rows, : job.down_rank]
        if job.has_bias:
            low_MR[:rows, job.down_rank] = jit.ONE
        amx.add_product(at.low, 2 * rows_B, 32 * rows_B, 64, at.down_B, rows_B, hidden, at.sums, 4 * width, filled)
    _round(sums_MJ, 0, array_at(job.out, (total, hidden), np.uint16)[row:stop])


@cfunc("void(int64)", cache=True)
def forward(address: int) -> None:
    job = array_at(address, (1,), JOB)[0]
    order, start = array_at(job.order, (job.experts,), np.int64), array_at(job.start, (job.experts + 1,), np.int64)
    memory = np.empty(_forward_places(job, 0).end + 64, np.uint8)
    at = _forward_places(job, fill_up(memory.ctypes.data, 64))
    before = amx.begin()
    number = next_number(address)
    while number < job.experts:
        expert = order[number]
        if start[expert] < start[expert + 1]:
            _pack_forward(job, expert, at)
        for row in range(start[expert], start[expert + 1], BLOCK_ROWS):
            _forward_block(job, row, min(row + BLOCK_ROWS, start[expert + 1]), start[job.experts], at)
        number = next_number(address)
    amx.end(before)
    memory[0] = 0  # numba frees an array after its last use.


class _Backward(NamedTuple):
    """Addresses: packed matrices, then what a block of rows is on its way."""

    down_B: int
    down: int
    up: int
    up_A: int
    left: int
    x: int
    act: int
    grad: int
    low: int
    turned: int
    packed: int
    loose: int
    sums: int
    grads: tuple[int, int, int, int]
    """Float32 sums of the gradients of up A, up B, down A and down B, ranks first."""
    end: int


@njit(cache=True)
def _backward_places(job: Any, start: int) -> _Backward:
    up_ranks, down_ranks = fill_up(job.up_rank, SUM), fill_up(job.down_rank, SUM)
    hidden, size, columns, rows_B = job.hidden, job.size, 2 * job.size, _behind(job, job.down_rank)
    along, width = hidden + down_ranks, hidden + up_ranks
    down = start + 2 * hidden * rows_B
    up = down + 2 * along * size
    up_A = up + 2 * columns * width
    left = up_A + 2 * up_ranks * hidden
    x = left + 2 * BLOCK_ROWS * along
    act = x + 2 * BLOCK_ROWS * hidden
    grad = act + 2 * BLOCK_ROWS * size
    low = grad + 2 * BLOCK_ROWS * columns
    turned = low + 2 * BLOCK_ROWS * up_ranks
    packed = turned + 2 * BLOCK_ROWS * max(up_ranks, down_ranks)
    loose = packed + 2 * BLOCK_ROWS * max(hidden, columns)
    sums = loose + _loose(job)
    first = sums + 4 * BLOCK_ROWS * max(size, width, rows_B)
    second = first + 4 * up_ranks * hidden
    third = second + 4 * up_ranks * columns
    fourth = third + 4 * down_ranks * size
    grads, end = (first, second, third, fourth), fourth + 4 * down_ranks * hidden
    return _Backward(start, down, up, up_A, left, x, act, grad, low, turned, packed, loose, sums, grads, end)


@njit(cache=True)
def _pack_backward(job: Any, expert: int, at: _Backward) -> None:
    hidden, size, columns = job.hidden, job.size, 2 * job.size
    up_ranks, down_ranks = fill_up(job.up_rank, SUM), fill_up(job.down_rank, SUM)
    along = hidden + down_ranks
    _place_B(job, job.down_B, job.down_bias, expert, job.down_rank, hidden, at.loose)
    amx.pack_turned(at.loose, 2 * hidden, hidden, _behind(job, job.down_rank), at.down_B, hidden)
    down = job.down_weight + expert * job.down_expert
    _pack(down, job.down_stride, 1 - job.down_in_rows, hidden, size, at.down, along)
    _place_A(job.down_A, expert, size, job.down_rank, job.down_scale, at.loose)
    amx.pack_turned(at.loose, 2 * down_ranks, down_ranks, size, at.down + hidden // SUM * TILE_BYTES, along)
    _pack(job.up_weight + expert * job.up_expert, job.up_stride, 1 - job.up_in_rows, columns, hidden, at.up, columns)
    if job.up_rank:
        _place_B(job, job.up_B, job.up_bias, expert, job.up_rank, columns, at.loose)
        amx.pack_turned(at.loose, 2 * columns, columns, up_ranks, at.up + 2 * columns * hidden, columns)
        _place_A(job.up_A, expert, hidden, job.up_rank, job.up_scale, at.loose)
        amx.pack_turned(at.loose, 2 * up_ranks, up_ranks, hidden, at.up_A, up_ranks)


@njit(cache=True)
def _write_gradients(
    sums: tuple[int, int], rank: int, size_in: int, size_out: int, scale: np.float32, expert: int, A: int, B: int
) -> None:
    """The sums of an expert's A, ranks first, and of its B to the adapter's gradients, [E, I, R] and [E, R, O]."""
    ranks = fill_up(rank, SUM)
    sums_RI = array_at(sums[0], (ranks, size_in), np.float32)
    A_IR = array_at(A + 4 * expert * size_in * rank, (size_in, rank), np.float32)
    for row in range(size_in):
        for column in range(rank):
            A_IR[row, column] = sums_RI[column, row] * scale
    sums_RO = array_at(sums[1], (ranks, size_out), np.float32)
    array_at(B + 4 * expert * rank * size_out, (rank, size_out), np.float32)[:] = sums_RO[:rank]


@njit(cache=True)
def _add_gradient(
    low: np.ndarray,
    weight: np.ndarray,
    ranks: int,
    rows: int,
    stride: int,
    columns: int,
    filled: int,
    at: _Backward,
    sums: int,
) -> None:
    """Adds weighted `low` [M, R], turned, times the rows [M, columns] at an address to the float32 at another."""
    _turn(low, weight, array_at(at.turned, (ranks, filled), np.uint16))
    amx.pack(rows, stride, filled, columns, at.packed, filled)
    amx.add_product(at.turned, 2 * filled, 32 * filled, 64, at.packed, filled, columns, sums, 4 * columns, ranks)


@njit(cache=True)
def _backward_down(job: Any, row: int, stop: int, total: int, at: _Backward) -> None:
    """From the gradient of outputs to that of gate and up."""
    hidden, size, columns, rank, rows_B = job.hidden, job.size, 2 * job.size, job.down_rank, _behind(job, job.down_rank)
    rows, filled, ranks = stop - row, fill_up(stop - row, 32), fill_up(job.down_rank, SUM)
    along = hidden + ranks
    weight_M = array_at(job.row_weight, (total,), np.float32)[row:stop]
    grad_weight_M = array_at(job.grad_weight, (total,), np.float32)[row:stop]
    left_MJ = array_at(at.left, (BLOCK_ROWS, along), np.uint16)
    grad_TH, token_P = array_at(job.grad, (job.tokens, hidden), np.uint16), array_at(job.token, (total,), np.int64)
    _gather(grad_TH, token_P[row:stop], filled, hidden, left_MJ)
    if rows_B:
        amx.product(
            at.left, 2 * along, at.down_B, hidden, rows_B, at.sums, 4 * rows_B, filled, hidden // SUM * TILE_BYTES
        )
        low_sums_MR = array_at(at.sums, (BLOCK_ROWS, rows_B), np.float32)
        if job.has_bias:
            grad_weight_M[:] = low_sums_MR[:rows, rank]
        _round(low_sums_MR, 0, left_MJ[:rows, hidden : hidden + rank])
    amx.product(at.left, 2 * along, at.down, along, size, at.sums, 4 * size, filled, along // SUM * TILE_BYTES)
    act_MF = array_at(at.act, (BLOCK_ROWS, size), np.uint16)
    grad_MG = array_at(at.grad, (BLOCK_ROWS, columns), np.uint16)
    act_MF[rows:filled] = 0
    grad_MG[rows:filled] = 0
    grad_act_MF = array_at(at.sums, (BLOCK_ROWS, size), np.float32)
    gate_up_MG = array_at(job.gate_up, (total, columns), np.uint16)[row:stop]
    _gate_backward(grad_act_MF, gate_up_MG, weight_M, rows, size, job.alpha, job.bound, act_MF, grad_MG, grad_weight_M)
    if rank:
        low_MR = array_at(job.down_low, (total, rank), np.uint16)[row:stop]
        _add_gradient(low_MR, weight_M, ranks, at.left, 2 * along, hidden, filled, at, at.grads[3])
        low_MR = left_MJ[:rows, hidden : hidden + rank]
        _add_gradient(low_MR, weight_M, ranks, at.act, 2 * size, size, filled, at, at.grads[2])


@njit(cache=True)
def _backward_up(job: Any, row: int, stop: int, total: int, at: _Backward) -> None:
    """From the gradient of gate and up to that of inputs."""
    hidden, columns, rank = job.hidden, 2 * job.size, job.up_rank
    rows, filled, ranks = stop - row, fill_up(stop - row, 32), fill_up(job.up_rank, SUM)
    width = hidden + ranks
    amx.product(at.grad, 2 * columns, at.up, columns, width, at.sums, 4 * width, filled, columns // SUM * TILE_BYTES)
    sums_MJ = array_at(at.sums, (BLOCK_ROWS, width), np.float32)
    if rank:
        ones_M = np.ones(rows, np.float32)
        kept_MR = array_at(job.up_low, (total, rank), np.uint16)[row:stop]
        _add_gradient(kept_MR, ones_M, ranks, at.grad, 2 * columns, columns, filled, at, at.grads[1])
        x_TH, token_P = array_at(job.x, (job.tokens, hidden), np.uint16), array_at(job.token, (total,), np.int64)
        _gather(x_TH, token_P[row:stop], filled, hidden, array_at(at.x, (BLOCK_ROWS, hidden), np.uint16))
        low_MR = array_at(at.low, (BLOCK_ROWS, ranks), np.uint16)
        low_MR[:filled] = 0
        _round(sums_MJ, hidden, low_MR[:rows, :rank])
        _add_gradient(low_MR[:rows, :rank], ones_M, ranks, at.x, 2 * hidden, hidden, filled, at, at.grads[0])
        amx.add_product(at.low, 2 * ranks, 32 * ranks, 64, at.up_A, ranks, hidden, at.sums, 4 * width, filled)
    _round(sums_MJ, 0, array_at(job.out, (total, hidden), np.uint16)[row:stop])


@cfunc("void(int64)", cache=True)
def backward(address: int) -> None:
    job = array_at(address, (1,), JOB)[0]
    order, start = array_at(job.order, (job.experts,), np.int64), array_at(job.start, (job.experts + 1,), np.int64)
    memory = np.empty(_backward_places(job, 0).end + 64, np.uint8)
    at = _backward_places(job, fill_up(memory.ctypes.data, 64))
    before = amx.begin()
    number = next_number(address)
    while number < job.experts:
        expert = order[number]
        array_at(at.grads[0], (at.end - at.grads[0],), np.uint8)[:] = 0
        if start[expert] < start[expert + 1]:
            _pack_backward(job, expert, at)
        for row in range(start[expert], start[expert + 1], BLOCK_ROWS):
            stop = min(row + BLOCK_ROWS, start[expert + 1])
            _backward_down(job, row, stop, start[job.experts], at)
            _backward_up(job, row, stop, start[job.experts], at)
        up, down = (at.grads[0], at.grads[1]), (at.grads[2], at.grads[3])
        hidden, size, columns = job.hidden, job.size, 2 * job.size
        _write_gradients(up, job.up_rank, hidden, columns, job.up_scale, expert, job.up_grad_A, job.up_grad_B)
        _write_gradients(down, job.down_rank, size, hidden, job.down_scale, expert, job.down_grad_A, job.down_grad_B)
        number = next_number(address)
    amx.end(before)
    memory[0] = 0  # numba frees an array after its last use.


def _run(
    kernel: Any, routing: Routing, gate: ClampedSwiglu, parts: tuple[Parts, Parts], tensors: Tensors, **more: Any
) -> None:
    """A kernel on a layer's tensors; `more` are further fields of its job, tensors by their addresses."""
    counts = np.array(routing.counts)
    given: dict[str, Any] = {"experts": len(counts), "order": np.argsort(-counts, kind="stable")}
    given |= {
        "start": np.concatenate(([0], counts.cumsum())),
        "token": routing.token_P,
    }
    given |= {"alpha": gate.alpha, "bound": gate.bound, "has_bias": tensors[1] is not None} | more
    for side, part, (weight, *others) in zip(("up", "down"), parts, (tensors[:4], tensors[4:]), strict=True):
        assert weight is not None
        weight = weight.to(torch.bfloat16)
        expert, row, _ = weight.stride()
        given |= {f"{side}_weight": weight, f"{side}_expert": 2 * expert, f"{side}_stride": 2 * row}
        given |= {f"{side}_in_rows": part.transposed, f"{side}_scale": part.scale}
        for name, tensor in zip(("bias", "A", "B"), others, strict=True):
            if tensor is not None:
                given[f"{side}_{name}"] = tensor.float().contiguous()
        given[f"{side}_rank"] = 0 if others[1] is None else others[1].shape[2]
    jit.run(kernel, JOB, given)


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
        factors = {
            "up_grad_A": tensors[2],
            "up_grad_B": tensors[3],
            "down_grad_A": tensors[6],
            "down_grad_B": tensors[7],
        }
        grads = {name: None if factor is None else torch.empty(factor.shape) for name, factor in factors.items()}
        row_weight_P = routing.weight_P1.float().contiguous()
        rows = {"grad": grad_TH.to(x_TH.dtype).contiguous(), "row_weight": row_weight_P, "out": out_PH}
        found = {name: grad for name, grad in grads.items() if grad is not None}
        _run(
            backward,
            routing,
            ctx.gate,
            ctx.parts,
            tensors,
            **ctx.sizes,
            **kept,
            **rows,
            **found,
            grad_weight=grad_weight_P,
        )
        grad_weight = grad_weight_P.index_select(0, routing.place_Tk.reshape(-1)).view(weight_Tk.shape)
        grad_hidden = combine(out_PH, routing.place_Tk, None).to(ctx.given)
        up_A, up_B, down_A, down_B = grads.values()
        of_tensors = None, None, up_A, up_B, None, None, down_A, down_B
        return grad_hidden, grad_weight.to(weight_Tk.dtype), *[None] * 4, *of_tensors
