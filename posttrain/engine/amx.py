"""Matrix products of bfloat16 on the tile unit of Intel processors (AMX), for kernels of `posttrain.engine.jit`.

A product adds up tiles of 16 by 16 float32, each from 16 rows of A (32 bfloat16 one behind the other) and a packed tile
of B: 16 pairs of rows, the two values of a column side by side. Eight tile registers hold four sums, two tiles of A and
two of B. Registers are the thread's own and are put back as they were: oneDNN uses them as well.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.

Axes: M row of A, K along the sum, N column of B.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

SUM = 32
"""Values along the sum of one tile; products have a multiple of it, and a multiple of as many rows."""
COLUMNS = 16
"""Columns of one tile; products have a multiple of it."""
TILE_BYTES = 1024

_BYTE, _HALF, _WORD, _POINTER = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.PointerType()


def _instruction(name: str, tiles: int = 0) -> Callable[..., Any]:
    """What emits an instruction on registers, whose numbers are the first arguments' types, and memory."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = [ir.Constant(_BYTE, number.literal_value) for number in signature.args[:tiles]]
        for argument in arguments[tiles : tiles + 1]:
            values.append(builder.inttoptr(argument, _POINTER))
        values += arguments[tiles + 1 :]
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), values)

    return generate


@intrinsic(prefer_literal=True)
def _load_tile(context: Any, tile: Any, address: Any, stride: Any) -> Any:
    return types.void(tile, types.int64, types.int64), _instruction("tileloadd64", 1)


@intrinsic(prefer_literal=True)
def _store_tile(context: Any, tile: Any, address: Any, stride: Any) -> Any:
    return types.void(tile, types.int64, types.int64), _instruction("tilestored64", 1)


@intrinsic(prefer_literal=True)
def _zero_tile(context: Any, tile: Any) -> Any:
    return types.void(tile), _instruction("tilezero", 1)


@intrinsic(prefer_literal=True)
def _add_product(context: Any, total: Any, left: Any, right: Any) -> Any:
    return types.void(total, left, right), _instruction("tdpbf16ps", 3)


@intrinsic
def _load_configuration(context: Any, address: Any) -> Any:
    return types.void(types.int64), _instruction("ldtilecfg")


@intrinsic
def _store_configuration(context: Any, address: Any) -> Any:
    return types.void(types.int64), _instruction("sttilecfg")


@intrinsic
def _interleave(context: Any, first: Any, second: Any, out: Any) -> Any:
    """16 bfloat16 at each of two addresses become 16 pairs at the third."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.VectorType(_HALF, COLUMNS)
        first, second = (builder.load(builder.inttoptr(at, _POINTER), typ=kind, align=2) for at in arguments[:2])
        order = [lane // 2 + COLUMNS * (lane % 2) for lane in range(2 * COLUMNS)]
        pairs = builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_WORD, 2 * COLUMNS), order))
        builder.store(pairs, builder.inttoptr(arguments[2], _POINTER), align=2)

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _turn_pairs(context: Any, address: Any, stride: Any, out: Any) -> Any:
    """16 rows of 16 pairs, `stride` bytes apart, become 16 rows of the pairs that stood below each other."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, stride, out = arguments
        kind, order = ir.VectorType(_WORD, COLUMNS), ir.VectorType(_WORD, COLUMNS)
        rows = []
        for row in range(COLUMNS):
            at = builder.add(address, builder.mul(stride, ir.Constant(stride.type, row)))
            rows.append(builder.load(builder.inttoptr(at, _POINTER), typ=kind, align=2))
        # Four times, blocks of 1, 2, 4 and 8 lanes change places between rows as far apart.
        for step in (1, 2, 4, 8):
            low = [lane if not lane & step else lane - step + COLUMNS for lane in range(COLUMNS)]
            high = [lane + step if not lane & step else lane + COLUMNS for lane in range(COLUMNS)]
            for row in range(COLUMNS):
                if not row & step:
                    first, second = rows[row], rows[row + step]
                    rows[row] = builder.shuffle_vector(first, second, ir.Constant(order, low))
                    rows[row + step] = builder.shuffle_vector(first, second, ir.Constant(order, high))
        for row, value in enumerate(rows):
            place = builder.add(out, ir.Constant(out.type, 4 * COLUMNS * row))
            builder.store(value, builder.inttoptr(place, _POINTER), align=2)

    return types.void(types.int64, types.int64, types.int64), generate


CONFIGURATION = np.zeros(64, np.uint8)
"""Eight tiles of 16 rows of 64 bytes, palette 1."""
CONFIGURATION[0] = 1
CONFIGURATION[16:32].view(np.uint16)[:] = 64
CONFIGURATION[48:56] = 16


@njit(cache=True)
def begin() -> np.ndarray:
    """Sets the thread's tile registers up for the products here; returns what `end` puts back."""
    before = np.zeros(64, np.uint8)
    _store_configuration(before.ctypes.data)
    _load_configuration(CONFIGURATION.ctypes.data)
    return before


@njit(cache=True)
def end(before: np.ndarray) -> None:
    _load_configuration(before.ctypes.data)


@njit(cache=True)
def pack(matrix: int, stride: int, rows: int, columns: int, out: int, out_rows: int) -> None:
    """B [rows, columns] with its columns side by side in memory, as rows of a packed B of `out_rows` rows in all.

    Addresses and strides in bytes, whole tiles. `out` is where the packed B's first of these rows is.
    """
    # Memory is read in its order; what is written stays in the caches.
    for pair in range(rows // 2):
        for panel in range(columns // COLUMNS):
            first = matrix + 2 * pair * stride + panel * 2 * COLUMNS
            _interleave(first, first + stride, out + panel * (out_rows // SUM) * TILE_BYTES + pair * 64)


@njit(cache=True)
def pack_turned(matrix: int, stride: int, rows: int, columns: int, out: int, out_rows: int) -> None:
    """The same of a B with its rows side by side in memory: [columns, rows]."""
    for panel in range(columns // COLUMNS):
        for tile in range(rows // SUM):
            place = out + (panel * (out_rows // SUM) + tile) * TILE_BYTES
            _turn_pairs(matrix + panel * COLUMNS * stride + tile * 2 * SUM, stride, place)


@njit(cache=True)
def product(
    left: int,
    left_stride: int,
    right: int,
    along: int,
    columns: int,
    out: int,
    out_stride: int,
    rows: int,
    panel_stride: int,
) -> None:
    """Float32 A · B at `out`; `rows` is a multiple of 32, addresses and strides are in bytes.

    `panel_stride`: from 16 columns of the packed B to the next ones, which have perhaps more rows than these.
    """
    tiles = along // SUM
    for panel in range(columns // COLUMNS // 2):
        first = right + 2 * panel * panel_stride
        second = first + panel_stride
        for block in range(rows // 32):
            upper = left + block * 32 * left_stride
            lower = upper + 16 * left_stride
            _zero_tile(0)
            _zero_tile(1)
            _zero_tile(2)
            _zero_tile(3)
            for tile in range(tiles):
                _load_tile(4, upper + tile * 64, left_stride)
                _load_tile(6, first + tile * TILE_BYTES, 64)
                _load_tile(5, lower + tile * 64, left_stride)
                _load_tile(7, second + tile * TILE_BYTES, 64)
                _add_product(0, 4, 6)
                _add_product(2, 5, 6)
                _add_product(1, 4, 7)
                _add_product(3, 5, 7)
            place = out + block * 32 * out_stride + panel * 128
            _store_tile(0, place, out_stride)
            _store_tile(1, place + 64, out_stride)
            _store_tile(2, place + 16 * out_stride, out_stride)
            _store_tile(3, place + 16 * out_stride + 64, out_stride)
    if columns // COLUMNS % 2:
        panel = columns // COLUMNS - 1
        for block in range(rows // 16):
            _zero_tile(0)
            for tile in range(tiles):
                _load_tile(4, left + block * 16 * left_stride + tile * 64, left_stride)
                _load_tile(6, right + panel * panel_stride + tile * TILE_BYTES, 64)
                _add_product(0, 4, 6)
            _store_tile(0, out + block * 16 * out_stride + panel * 64, out_stride)


@njit(cache=True)
def turn_packed(packed: int, tiles: int, out: int) -> None:
    """Packed tiles of a B as tiles of A = Bᵀ, each 1,024 bytes one behind the other."""
    for tile in range(tiles):
        _turn_pairs(packed + tile * TILE_BYTES, 64, out + tile * TILE_BYTES)


@njit(cache=True)
def add_product(
    left: int,
    left_stride: int,
    block_stride: int,
    tile_stride: int,
    right: int,
    along: int,
    columns: int,
    out: int,
    out_stride: int,
    rows: int,
) -> None:
    """Adds A · B to the float32 at `out`; `rows` is a multiple of 16.

    `block_stride` and `tile_stride` lead to the next 16 rows of A and to its next 32 columns.
    """
    tiles = along // SUM
    for block in range(rows // 16):
        for panel in range(columns // COLUMNS):
            place = out + block * 16 * out_stride + panel * 64
            _load_tile(0, place, out_stride)
            for tile in range(tiles):
                _load_tile(4, left + block * block_stride + tile * tile_stride, left_stride)
                _load_tile(6, right + (panel * tiles + tile) * TILE_BYTES, 64)
                _add_product(0, 4, 6)
            _store_tile(0, place, out_stride)
