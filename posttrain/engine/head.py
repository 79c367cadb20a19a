"""Log-probabilities at target positions, in chunks, so that the full logits never exist at once.

Axes: T row position, N target, C target of one chunk, H hidden, V vocabulary.
"""

import torch

CHUNK = 2048


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Gemma's soft cap: softcap · tanh(logits / softcap)."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, target_N, temperature, softcap):  # type: ignore[no-untyped-def, override]
        logprob_N = torch.empty(len(target_N), dtype=torch.float32, device=hidden_NH.device)
        lse_N = torch.empty_like(logprob_N)
        for start in range(0, len(target_N), CHUNK):
            chunk = slice(start, start + CHUNK)
            logits_CV = capped(hidden_NH[chunk] @ weight_VH.T, softcap).float() / temperature
            lse_N[chunk] = torch.logsumexp(logits_CV, dim=-1)
            logprob_N[chunk] = logits_CV.gather(1, target_N[chunk, None])[:, 0] - lse_N[chunk]
        ctx.save_for_backward(hidden_NH, weight_VH, target_N, lse_N)
        ctx.temperature, ctx.softcap = temperature, softcap
        return logprob_N

    @staticmethod
    def backward(ctx, grad_N):  # type: ignore[no-untyped-def, override]
        hidden_NH, weight_VH, target_N, lse_N = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_NH)
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(target_N), CHUNK):
            chunk = slice(start, start + CHUNK)
            logits_CV = capped(hidden_NH[chunk] @ weight_VH.T, ctx.softcap).float() / ctx.temperature
            # d logprob / d logits = onehot(target) − softmax
            grad_CV = torch.exp(logits_CV - lse_N[chunk, None]).neg_()
            grad_CV.scatter_add_(1, target_N[chunk, None], torch.ones_like(grad_CV[:, :1]))
            grad_CV *= grad_N[chunk, None] / ctx.temperature
            if ctx.softcap is not None:
                # tanh' = 1 − tanh², and the capped logit is softcap · tanh.
                grad_CV *= 1 - (logits_CV * ctx.temperature / ctx.softcap) ** 2
            grad_CV = grad_CV.to(hidden_NH.dtype)
            grad_hidden[chunk] = grad_CV @ weight_VH
            if grad_weight is not None:
                grad_weight += grad_CV.T @ hidden_NH[chunk]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VH.dtype), None, None, None


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
    return _ChunkedLogProbs.apply(hidden_NH, weight_VH, target_N, temperature, softcap)
