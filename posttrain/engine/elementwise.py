"""Norms and rotary embeddings on a processor: one pass each, in the types of the products beside them.

Kernels of `posttrain.engine.jit`. Axes: T token, H hidden or head, D head size.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import cfunc, njit

from posttrain.engine import jit
from posttrain.engine.jit import array_at, from_bfloat16, next_number, to_bfloat16

TOKENS = 64
"""Of a part that a thread takes."""

Tensor = torch.Tensor

NORM = np.dtype(
    [("next", "i8"), ("tokens", "i8"), ("size", "i8")]
    + [(name, "i8") for name in ("x", "weight", "scale", "out", "grad", "grad_x")]
    + [("epsilon", "f4")]
)
ROTATION = np.dtype(
    [("next", "i8"), ("tokens", "i8"), ("heads", "i8"), ("size", "i8")]
    + [(name, "i8") for name in ("x", "head_stride", "row_stride", "cos", "sin", "out")]
    + [("sign", "f4")]
)


@njit(cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _normed(
    x: np.ndarray, weight: np.ndarray, scale: np.ndarray, out: np.ndarray, start: int, stop: int, epsilon: np.float32
) -> None:
    size = x.shape[1]
    for row in range(start, stop):
        total = np.float32(0.0)
        for column in range(size):
            total += x[row, column] * x[row, column]
        here = np.float32(1.0) / np.sqrt(total / np.float32(size) + epsilon)
        scale[row] = here
        for column in range(size):
            out[row, column] = to_bfloat16(weight[column] * (x[row, column] * here))


@njit(cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _norm_gradients(
    x: np.ndarray, weight: np.ndarray, scale: np.ndarray, grad: np.ndarray, grad_x: np.ndarray, start: int, stop: int
) -> None:
    # d(w · x · s) with s = rsqrt(mean x²): s · (w · g) - x · s³ · mean(w · g · x)
    size = x.shape[1]
    for row in range(start, stop):
        total = np.float32(0.0)
        for column in range(size):
            total += weight[column] * from_bfloat16(grad[row, column]) * x[row, column]
        here = scale[row]
        along = here * here * here * total / np.float32(size)
        for column in range(size):
            grad_x[row, column] = here * weight[column] * from_bfloat16(grad[row, column]) - along * x[row, column]


@njit(cache=True)
def _norm_pass(address: int, backward: bool) -> None:
    job = array_at(address, (1,), NORM)[0]
    shape = (job.tokens, job.size)
    x, weight = array_at(job.x, shape, np.float32), array_at(job.weight, (job.size,), np.float32)
    scale = array_at(job.scale, (job.tokens,), np.float32)
    start = next_number(address) * TOKENS
    while start < job.tokens:
        stop = min(start + TOKENS, job.tokens)
        if backward:
            grad, grad_x = array_at(job.grad, shape, np.uint16), array_at(job.grad_x, shape, np.float32)
            _norm_gradients(x, weight, scale, grad, grad_x, start, stop)
        else:
            _normed(x, weight, scale, array_at(job.out, shape, np.uint16), start, stop, job.epsilon)
        start = next_number(address) * TOKENS


@cfunc("void(int64)", cache=True)
def _norm_forward(address: int) -> None:
    _norm_pass(address, False)


@cfunc("void(int64)", cache=True)
def _norm_backward(address: int) -> None:
    _norm_pass(address, True)


@njit(cache=True, fastmath={"contract"})
def _rotated(
    x: np.ndarray, cos: np.ndarray, sin: np.ndarray, out: np.ndarray, head: int, start: int, stop: int, sign: np.float32
) -> None:
    half = cos.shape[1]
    for row in range(start, stop):
        for column in range(half):
            first, second = from_bfloat16(x[row, column]), from_bfloat16(x[row, half + column])
            out[row, head, column] = to_bfloat16(first * cos[row, column] - second * (sin[row, column] * sign))
        for column in range(half):
            first, second = from_bfloat16(x[row, column]), from_bfloat16(x[row, half + column])
            out[row, head, half + column] = to_bfloat16(second * cos[row, column] + first * (sin[row, column] * sign))


@cfunc("void(int64)", cache=True)
def _rotation(address: int) -> None:
    job = array_at(address, (1,), ROTATION)[0]
    angles = (job.tokens, job.size // 2)
    cos, sin = array_at(job.cos, angles, np.float32), array_at(job.sin, angles, np.float32)
    out = array_at(job.out, (job.tokens, job.heads, job.size), np.uint16)
    start = next_number(address) * TOKENS
    while start < job.tokens:
        stop = min(start + TOKENS, job.tokens)
        for head in range(job.heads):
            x = array_at(job.x + head * job.head_stride, (job.tokens, job.row_stride // 2), np.uint16)
            _rotated(x, cos, sin, out, head, start, stop, job.sign)
        start = next_number(address) * TOKENS


class Norm(torch.autograd.Function):
    """RMS norm of a float32 [..., H] with a frozen weight, in bfloat16."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):  # type: ignore[no-untyped-def, override]
        x, weight = x.contiguous(), weight.float()
        out, scale = torch.empty(x.shape, dtype=torch.bfloat16), torch.empty(x.shape[:-1])
        sizes = {"tokens": scale.numel(), "size": x.shape[-1]}
        given = {**sizes, "x": x, "weight": weight, "scale": scale}
        jit.run(_norm_forward, NORM, {**given, "out": out, "epsilon": epsilon})
        ctx.save_for_backward(x, weight, scale)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        x, weight, scale = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        given = {**ctx.sizes, "x": x, "weight": weight, "scale": scale, "grad": grad, "grad_x": grad_x}
        jit.run(_norm_backward, NORM, given)
        return grad_x, None, None


class Rotation(torch.autograd.Function):
    """The rotary embedding of a bfloat16 [1, H, T, D] whose halves are rotated, by float32 [1, T, D / 2]."""

    @staticmethod
    def forward(ctx, x_1HTD, cos_1TD, sin_1TD):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(cos_1TD, sin_1TD)
        return _rotate(x_1HTD, cos_1TD, sin_1TD, 1.0)

    @staticmethod
    def backward(ctx, grad_1HTD):  # type: ignore[no-untyped-def, override]
        cos_1TD, sin_1TD = ctx.saved_tensors
        return _rotate(grad_1HTD, cos_1TD, sin_1TD, -1.0), None, None


def _rotate(x_1HTD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor, sign: float) -> Tensor:
    x_1HTD = x_1HTD if x_1HTD.stride(3) == 1 else x_1HTD.contiguous()
    _, heads, tokens, size = x_1HTD.shape
    out_THD = x_1HTD.new_empty(tokens, heads, size)
    given: dict[str, Any] = {"tokens": tokens, "heads": heads, "size": size, "sign": sign, "out": out_THD}
    given |= {"x": x_1HTD, "head_stride": 2 * x_1HTD.stride(1), "row_stride": 2 * x_1HTD.stride(2)}
    jit.run(_rotation, ROTATION, {**given, "cos": cos_1TD.contiguous(), "sin": sin_1TD.contiguous()})
    return out_THD.transpose(0, 1)[None]


def norm(module: Any, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    """A norm module's forward pass, by the kernel where its input and weight are what it takes."""

    def normed(hidden: Tensor) -> Any:
        wanted = torch.is_autocast_enabled("cpu") and hidden.device.type == "cpu"
        if not wanted or hidden.dtype != torch.float32 or module.weight.requires_grad:
            return forward(hidden)
        return Norm.apply(hidden, module.weight, module.variance_epsilon)

    return normed


def rotary(apply: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """transformers' `apply_rotary_pos_emb`, by the kernel where its inputs are what it takes."""

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        takes = q.dtype == k.dtype == torch.bfloat16 and q.device.type == "cpu" and cos.dtype == torch.float32
        if not takes or len(q) != 1 or 2 * cos.shape[-1] != q.shape[-1] or cos.shape[:2] != (1, q.shape[2]):
            return apply(q, k, cos, sin)
        return Rotation.apply(q, cos, sin), Rotation.apply(k, cos, sin)

    return rotated
