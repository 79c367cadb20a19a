"""Log-probabilities at target positions, in chunks, so that the full logits never exist at once.

Axes: T row position, N target, C target of one chunk, H hidden, V vocabulary.
"""

from collections.abc import Iterator

import torch

from posttrain.engine.fusing import fused

CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**28}
"""Logits that exist at once, at most: on a CPU so many as its caches hold."""
SMALLEST_CHUNK = 256
"""Targets of one chunk, at least, however large the vocabulary is."""


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Gemma's soft cap: softcap · tanh(logits / softcap)."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


class _ChunkedLogProbs(torch.autograd.Function):
    """log p(target | hidden), and its derivative by the hidden state in the same pass.

    d logprob / d hidden = (onehot − softmax) · W needs the logits, which are gone when the backward pass comes: so it
    is computed while they are there and costs no second product with W. Only a trained head computes them again.
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, target_N, temperature, softcap, keep):  # type: ignore[no-untyped-def, override]
        logprob_N = torch.empty(len(target_N), dtype=torch.float32, device=hidden_NH.device)
        slope_NH = torch.empty_like(hidden_NH) if keep else None
        for chunk in _chunks(len(target_N), len(weight_VH), hidden_NH.device):
            raw_CV = hidden_NH[chunk] @ weight_VH.T
            logprob_N[chunk], slope_CV = _logprob_and_slope(raw_CV, target_N[chunk], temperature, softcap, keep)
            if slope_NH is not None:
                torch.mm(slope_CV, weight_VH, out=slope_NH[chunk])
        ctx.save_for_backward(slope_NH, hidden_NH, weight_VH, target_N)
        ctx.temperature, ctx.softcap = temperature, softcap
        return logprob_N

    @staticmethod
    def backward(ctx, grad_N):  # type: ignore[no-untyped-def, override]
        slope_NH, hidden_NH, weight_VH, target_N = ctx.saved_tensors
        grad_hidden = slope_NH * grad_N[:, None].to(slope_NH.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
            for chunk in _chunks(len(target_N), len(weight_VH), hidden_NH.device):
                raw_CV = hidden_NH[chunk] @ weight_VH.T
                _, slope_CV = _logprob_and_slope(raw_CV, target_N[chunk], ctx.temperature, ctx.softcap, True)
                grad_weight += (slope_CV * grad_N[chunk, None].to(slope_CV.dtype)).T @ hidden_NH[chunk]
            grad_weight = grad_weight.to(weight_VH.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _chunks(targets: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    size = max(SMALLEST_CHUNK, CHUNK_LOGITS[device.type] // vocabulary)
    for start in range(0, targets, size):
        yield slice(start, start + size)


@fused
def _logprob_and_slope(
    raw_CV: torch.Tensor, target_C: torch.Tensor, temperature: float, softcap: float | None, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(target), and with `keep` d logprob / d raw in raw's type, of raw = hidden · W."""
    logits_CV = capped(raw_CV, softcap).float()
    if temperature != 1:
        logits_CV = logits_CV / temperature
    lse_C1 = torch.logsumexp(logits_CV, dim=-1, keepdim=True)
    target_C1 = target_C[:, None]
    logprob_C = (logits_CV.gather(1, target_C1) - lse_C1)[:, 0]
    if not keep:
        return logprob_C, None
    # tanh' = 1 − tanh², and the capped logit is softcap · tanh.
    bend_CV = None if softcap is None else 1 - (logits_CV * (temperature / softcap)) ** 2
    if raw_CV.device.type == "cpu":
        # The logits may be raw's own memory, which nobody reads again.
        slope_CV = logits_CV.sub_(lse_C1).exp_().neg_()
        slope_CV.scatter_add_(1, target_C1, torch.ones_like(lse_C1))
    else:
        # Without a scatter it is one kernel.
        hit_CV = torch.arange(raw_CV.shape[1], device=raw_CV.device) == target_C1
        slope_CV = hit_CV.float() - (logits_CV - lse_C1).exp()
    if temperature != 1:
        slope_CV = slope_CV / temperature
    if bend_CV is not None:
        slope_CV = slope_CV * bend_CV
    return logprob_C, slope_CV.to(raw_CV.dtype)


def target_logprobs(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    source_N: torch.Tensor,
    target_N: torch.Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Float32 log-probability [N] of token `target_N[n]` as predicted from row position `source_N[n]`."""
    hidden_NH = hidden_TH.index_select(0, source_N)
    if torch.is_autocast_enabled(hidden_NH.device.type):
        dtype = torch.get_autocast_dtype(hidden_NH.device.type)
        hidden_NH, weight_VH = hidden_NH.to(dtype), weight_VH.to(dtype)
    return _ChunkedLogProbs.apply(hidden_NH, weight_VH, target_N, temperature, softcap, torch.is_grad_enabled())
