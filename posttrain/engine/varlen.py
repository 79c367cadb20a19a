"""Attention over packed rows in one call for all documents: the FlashAttention kernel inside PyTorch.

The kernel knows nothing of sinks and shared prefixes. Sinks are folded in through the log-sum-exp afterwards (see
`posttrain.engine.attention`); a segment with a prefix gets both laid one after the other as its keys, and as a causal
mask is aligned to the last key, its queries see the whole prefix.

Axes: T row position, S gathered key position, H query head, K key-value head, D head size, N segment.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Lanes:
    """A row's segments as the kernel takes them."""

    starts_q_N: Tensor
    """Where each segment's queries begin, and the end of the last, [N + 1] int32."""
    starts_k_N: Tensor
    longest_q: int
    longest_k: int
    pieces: tuple[tuple[int, int], ...] | None
    """Row ranges whose keys, one after another, are what `starts_k_N` counts; None where that is the row itself."""

    def gather(self, x_TKD: Tensor) -> Tensor:
        if self.pieces is None:
            return x_TKD
        return torch.cat([x_TKD[start:stop] for start, stop in self.pieces])

    def scatter(self, x_SKD: Tensor, length: int) -> Tensor:
        """The gradient of `gather`, added up in float32 and in one order."""
        if self.pieces is None:
            return x_SKD
        total_TKD = x_SKD.new_zeros(length, *x_SKD.shape[1:], dtype=torch.float32)
        at = 0
        for start, stop in self.pieces:
            total_TKD[start:stop] += x_SKD[at : at + stop - start]
            at += stop - start
        return total_TKD.to(x_SKD.dtype)


def lanes(segments: Sequence[tuple[int, int, tuple[int, int] | None]], device: torch.device) -> Lanes:
    """Of segments (start, stop, prefix) that fill a row from its beginning, in order."""
    pieces, starts_q, starts_k = [], [0], [0]
    for start, stop, prefix in segments:
        own = [(start, stop)] if prefix is None else [prefix, (start, stop)]
        pieces += own
        starts_q.append(stop)
        starts_k.append(starts_k[-1] + sum(end - begin for begin, end in own))
    shared = any(prefix is not None for *_, prefix in segments)
    return Lanes(
        torch.tensor(starts_q, dtype=torch.int32).to(device, non_blocking=True),
        torch.tensor(starts_k, dtype=torch.int32).to(device, non_blocking=True),
        max(after - before for before, after in pairwise(starts_q)),
        max(after - before for before, after in pairwise(starts_k)),
        tuple(pieces) if shared else None,
    )


@contextmanager
def _in_one_order() -> Iterator[None]:
    """The kernel adds up the queries' gradient in one order only where that is asked for without leave to warn."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class FlashKernel:
    """FlashAttention 2 as it is inside PyTorch, for float16 or bfloat16 on CUDA.

    Each of the N segments is causal to its last key and sees at most `window` keys, itself included.
    """

    def forward(
        self, q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, lanes: Lanes, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output [T, H, D] and float32 log-sum-exp [H, T]."""
        out_THD, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
            q_THD, k_SKD, v_SKD, *self._layout(lanes), 0.0, True, False, scale=scale, **self._window(window)
        )
        return out_THD, lse_HT

    def backward(
        self,
        grad_THD: Tensor,
        q_THD: Tensor,
        k_SKD: Tensor,
        v_SKD: Tensor,
        out_THD: Tensor,
        lse_HT: Tensor,
        lanes: Lanes,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values, for an output and a log-sum-exp that may have a sink in them."""
        # The random state is dropout's, and there is none.
        unused = torch.empty(2, dtype=torch.uint64, device=q_THD.device), torch.empty(0, device=q_THD.device)
        tensors = grad_THD, q_THD, k_SKD, v_SKD, out_THD, lse_HT
        with _in_one_order():
            return torch.ops.aten._flash_attention_backward(
                *tensors, *self._layout(lanes), 0.0, True, *unused, scale=scale, **self._window(window)
            )

    def _layout(self, lanes: Lanes) -> tuple[Tensor, Tensor, int, int]:
        return lanes.starts_q_N, lanes.starts_k_N, lanes.longest_q, lanes.longest_k

    def _window(self, window: int | None) -> dict[str, int]:
        return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


FLASH = FlashKernel()


class VarlenAttention(torch.autograd.Function):
    """The row's attention with sinks: [1, H, T, D] in, [1, H, T, D] out."""

    @staticmethod
    def forward(ctx, q_1HTD, k_1KTD, v_1KTD, sinks_H, lanes, window, scale, kernel):  # type: ignore[no-untyped-def, override]
        q_THD, k_TKD, v_TKD = (tensor[0].transpose(0, 1) for tensor in (q_1HTD, k_1KTD, v_1KTD))
        out_THD, lse_HT = kernel.forward(q_THD, lanes.gather(k_TKD), lanes.gather(v_TKD), lanes, window, scale)
        if sinks_H is not None:
            with_sink_HT = torch.logaddexp(lse_HT, sinks_H.to(lse_HT.dtype)[:, None])
            out_THD = out_THD * torch.exp(lse_HT - with_sink_HT).T[:, :, None].to(out_THD.dtype)
            lse_HT = with_sink_HT
        ctx.save_for_backward(q_1HTD, k_1KTD, v_1KTD, sinks_H, out_THD, lse_HT)
        ctx.lanes, ctx.window, ctx.scale, ctx.kernel = lanes, window, scale, kernel
        return out_THD.transpose(0, 1)[None]

    @staticmethod
    def backward(ctx, grad_1HTD):  # type: ignore[no-untyped-def, override]
        q_1HTD, k_1KTD, v_1KTD, sinks_H, out_THD, lse_HT = ctx.saved_tensors
        lanes: Lanes = ctx.lanes
        grad_THD, q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (grad_1HTD, q_1HTD, k_1KTD, v_1KTD))
        keys, values = lanes.gather(k_TKD), lanes.gather(v_TKD)
        grad_THD = grad_THD.contiguous()
        dq_THD, dk_SKD, dv_SKD = ctx.kernel.backward(
            grad_THD, q_THD, keys, values, out_THD, lse_HT, lanes, ctx.window, ctx.scale
        )
        length = len(k_TKD)
        grads = dq_THD, lanes.scatter(dk_SKD, length), lanes.scatter(dv_SKD, length)
        grad_q, grad_k, grad_v = (grad.transpose(0, 1)[None] for grad in grads)
        grad_sinks = None
        if sinks_H is not None and ctx.needs_input_grad[3]:
            share_HT = torch.exp(sinks_H.float()[:, None] - lse_HT)
            grad_sinks = -(share_HT * (grad_THD.float() * out_THD.float()).sum(-1).T).sum(-1).to(sinks_H.dtype)
        return grad_q, grad_k, grad_v, grad_sinks, None, None, None, None
