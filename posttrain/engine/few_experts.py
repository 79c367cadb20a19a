"""Chosen experts of a decode step with few slots and small experts, in one kernel of `posttrain.engine.jit`.

Asking every expert is one product, most of which is thrown away; asking the chosen ones by products of torch starts too
many of them. Here threads take some units of one expert after another, for the rows that chose it, four at a time.

Axes as in `posttrain.engine.decode`.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from posttrain.engine import jit
from posttrain.engine.jit import array_at, exp, next_number

UNITS, ROWS = 16, 4
"""That are computed at once: as many sums as fit into registers."""

Tensor = torch.Tensor

JOB = np.dtype(
    [(name, "i8") for name in ("next", "slots", "per_token", "x", "chosen", "score", "gated")]
    + [(name, "i8") for name in ("up", "experts", "inputs", "size", "width")]
    + [(name, "f4") for name in ("gate_most", "up_least", "up_most", "always")]
)


@intrinsic
def _sums(
    context: Any,
    first: Any,
    second: Any,
    third: Any,
    fourth: Any,
    weights: Any,
    ups: Any,
    stride: Any,
    count: Any,
    out: Any,
) -> Any:
    """Four rows of `count` float32 times 16 columns, and 16 more `ups` bytes behind these: [4, 2, 16] at `out`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *rows, weights, ups, stride, count, out = arguments
        number, kind, pointer = ir.FloatType(), ir.VectorType(ir.FloatType(), UNITS), ir.PointerType()
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), "llvm.fma.v16f32")
        sums = [cgutils.alloca_once(builder, kind) for _ in range(2 * ROWS)]
        for total in sums:
            builder.store(ir.Constant(kind, [0.0] * UNITS), total)
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), UNITS), [0] * UNITS)
        with cgutils.for_range(builder, count) as loop:
            at = builder.add(weights, builder.mul(loop.index, stride))
            columns = [
                builder.load(builder.inttoptr(place, pointer), typ=kind, align=4)
                for place in (at, builder.add(at, ups))
            ]
            for row, address in enumerate(rows):
                place = builder.add(address, builder.mul(loop.index, ir.Constant(loop.index.type, 4)))
                value = builder.load(builder.inttoptr(place, pointer), typ=number, align=4)
                alone = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.IntType(32)(0))
                spread = builder.shuffle_vector(alone, alone, everywhere)
                for half, column in enumerate(columns):
                    total = sums[2 * row + half]
                    builder.store(builder.call(fma, [spread, column, builder.load(total, typ=kind)]), total)
        for index, total in enumerate(sums):
            place = builder.add(out, ir.Constant(out.type, 4 * UNITS * index))
            builder.store(builder.load(total, typ=kind), builder.inttoptr(place, pointer), align=4)

    return types.void(*[types.int64] * 9), generate


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def _gate(sums: np.ndarray, rows: np.ndarray, score: np.ndarray, job: Any, first: int, gated: np.ndarray) -> None:
    """`decode._Experts._activation` of a block of units, weighted."""
    one = np.float32(1.0)
    for row in range(len(rows)):
        for unit in range(UNITS):
            gate = min(sums[row, 0, unit], job.gate_most)
            up = min(max(sums[row, 1, unit], job.up_least), job.up_most)
            gated[rows[row], first + unit] = gate / (one + exp(-gate)) * up * score[row]


@cfunc("void(int64)", cache=True)
def _forward(address: int) -> None:
    job = array_at(address, (1,), JOB)[0]
    chosen = array_at(job.chosen, (job.slots, job.per_token), np.int64)
    scores = array_at(job.score, (job.slots, job.per_token), np.float32)
    gated = array_at(job.gated, (job.slots, job.experts * job.width), np.float32)
    rows, score = np.empty(job.slots, np.int64), np.empty(job.slots, np.float32)
    sums = np.empty((ROWS, 2, UNITS), np.float32)
    blocks = job.size // UNITS
    number = next_number(address)
    while number < job.experts * blocks:
        expert, block = number // blocks, number % blocks
        count = 0
        for slot in range(job.slots):
            for choice in range(job.per_token):
                if chosen[slot, choice] == expert:
                    rows[count], score[count] = slot, scores[slot, choice]
                    count += 1
        weights = job.up + 8 * UNITS * job.inputs * number
        first = expert * job.width + block * UNITS
        for row in range(0, count, ROWS):
            last = min(row + ROWS, count)
            places = (
                job.x + 4 * job.inputs * rows[row],
                job.x + 4 * job.inputs * rows[min(row + 1, last - 1)],
                job.x + 4 * job.inputs * rows[min(row + 2, last - 1)],
                job.x + 4 * job.inputs * rows[last - 1],
            )
            _sums(
                places[0], places[1], places[2], places[3],
                weights, 4 * UNITS, 8 * UNITS, job.inputs, sums.ctypes.data,
            )  # fmt: skip
            _gate(sums, rows[row:last], score[row:last], job, first, gated)
        if job.width > job.size and block == 0:
            for row in range(count):
                gated[rows[row], expert * job.width + job.size] = job.always * score[row]
        number = next_number(address)
    sums[0, 0, 0] = 0  # numba frees an array after its last use.


class ChosenExperts:
    """Gated units of the experts that each slot chose, zeros for the others'."""

    def __init__(self, up_2IX: Tensor, experts: int, size: int, alpha: float, limit: float, always: float) -> None:
        self.width = up_2IX.shape[2] // experts
        """Units of an expert, the one that is always on included."""
        up_2IENU = up_2IX.unflatten(2, (experts, self.width))[..., :size].unflatten(3, (-1, UNITS))
        self.up_ENI2U = up_2IENU.permute(2, 3, 1, 0, 4).contiguous()
        """Of each block of units what a thread reads, one value behind the other."""
        self.units = experts * self.width
        self.job = np.zeros(1, JOB)
        self.changing = np.frombuffer(self.job, np.int64, count=7)
        """The fields up to `gated`."""
        for name, value in {
            "experts": experts, "inputs": up_2IX.shape[1], "size": size, "width": self.width,
            "up": self.up_ENI2U.data_ptr(), "gate_most": limit * alpha, "up_least": (1 - limit) * alpha,
            "up_most": (1 + limit) * alpha, "always": always,
        }.items():  # fmt: skip
            self.job[name] = value
        self.start = jit.starter(_forward, self.job)

    def __call__(self, x_BI: Tensor, expert_Bk: Tensor, score_Bk: Tensor) -> Tensor:
        """[B, X]."""
        gated_BX = x_BI.new_zeros(len(x_BI), self.units)
        addresses = (tensor.data_ptr() for tensor in (x_BI, expert_Bk, score_Bk, gated_BX))
        self.changing[:] = 0, *expert_Bk.shape, *addresses
        self.start()
        return gated_BX
