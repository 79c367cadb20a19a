"""What kernels that numba compiles share: memory by address, bfloat16, exponentials, and torch's threads to run them.

A kernel is a C function of one address, that of a record which says what to do; all threads run it at once and take
numbers of parts from a counter at its beginning. Compiled kernels are kept beside this file, or where numba may write.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

ONE = 0x3F80
"""1 in bfloat16."""

_HALF, _WORD, _POINTER = ir.IntType(16), ir.IntType(32), ir.PointerType()


def run(kernel: Any, record: np.dtype, given: dict[str, Any]) -> None:
    """A kernel with a record's fields, tensors and arrays as their addresses, on as many threads as torch uses.

    Where torch has GNU OpenMP its own threads do it: others would compete with these, which wait actively.
    """
    job = np.zeros(1, record)
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        job[name] = value.ctypes.data if isinstance(value, np.ndarray) else value
    starter(kernel, job)()


def starter(kernel: Any, job: np.ndarray) -> Callable[[], object]:
    """What runs a kernel on a record that stays where it is; its counter must be 0 each time."""
    threads, process = torch.get_num_threads(), ctypes.CDLL(None)
    if threads == 1 or not hasattr(process, "GOMP_parallel"):
        return partial(kernel.ctypes, job.ctypes.data)
    given = ctypes.c_void_p(kernel.address), ctypes.c_void_p(job.ctypes.data), threads, 0
    return partial(process.GOMP_parallel, *given)


@intrinsic
def next_number(context: Any, address: Any) -> Any:
    """The int64 at an address, which is then one more; threads never get the same."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], _POINTER)
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(types.int64), generate


@intrinsic
def _pointer(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _POINTER)

    return types.voidptr(types.int64), generate


@njit(inline="always", cache=True)
def array_at(address: int, shape: tuple[int, ...], dtype: Any) -> Any:
    return carray(_pointer(address), shape, dtype)


@njit(inline="always", cache=True)
def fill_up(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


@intrinsic
def to_bfloat16(context: Any, value: Any) -> Any:
    """Bits of a float32 rounded to nearest even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], _WORD)
        half = ir.Constant(_WORD, 0x7FFF)
        last = builder.and_(builder.lshr(bits, ir.Constant(_WORD, 16)), ir.Constant(_WORD, 1))
        rounded = builder.lshr(builder.add(builder.add(bits, half), last), ir.Constant(_WORD, 16))
        return builder.trunc(rounded, _HALF)

    return types.uint16(types.float32), generate


@intrinsic
def from_bfloat16(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = builder.shl(builder.zext(arguments[0], _WORD), ir.Constant(_WORD, 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _power_of_two(context: Any, exponent: Any) -> Any:
    """The float32 of an exponent from -126 to 127."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        biased = builder.add(arguments[0], ir.Constant(_WORD, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(_WORD, 23)), ir.FloatType())

    return types.float32(types.int32), generate


@njit(cache=True, fastmath={"contract"})
def _exp_of(rest: np.float32, whole: np.float32) -> np.float32:
    """2**whole · exp(rest) for |rest| up to ln 2 / 2: the polynomial of Cephes' expf."""
    exp = np.float32(1.9875691500e-4) * rest + np.float32(1.3981999507e-3)
    exp = exp * rest + np.float32(8.3334519073e-3)
    exp = exp * rest + np.float32(4.1665795894e-2)
    exp = exp * rest + np.float32(1.6666665459e-1)
    exp = exp * rest + np.float32(5.0000001201e-1)
    return (exp * rest * rest + rest + np.float32(1.0)) * _power_of_two(np.int32(whole))


@njit(cache=True, fastmath={"contract"})
def exp(value: np.float32) -> np.float32:
    """e**value in float32, of values cut to -87 and 87; loops over it are vectorised."""
    value = min(max(value, np.float32(-87.0)), np.float32(87.0))
    whole = np.floor(value * np.float32(1.44269504) + np.float32(0.5))
    return _exp_of(value - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4), whole)


@njit(cache=True, fastmath={"contract"})
def exp2(value: np.float32) -> np.float32:
    """2**value in float32, of values cut to -126 and 126."""
    value = min(max(value, np.float32(-126.0)), np.float32(126.0))
    whole = np.floor(value + np.float32(0.5))
    return _exp_of((value - whole) * np.float32(0.693147181), whole)
