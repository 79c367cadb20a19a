"""Losses as pure functions over log-probabilities. Each returns a sum; the caller divides by the declared denominator,
taken over the whole global batch.

Axes: N target, S sequence, P pair.
"""

import torch


def sft_sum(logprob_N: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood. Denominator: target tokens."""
    return -logprob_N.sum()


def sequence_means(logprob_N: torch.Tensor, sequence_N: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Mean log-probability per target of each sequence [S]; `sequence_N` counts from 0."""
    sums_S = torch.zeros(num_sequences, dtype=logprob_N.dtype).index_add(0, sequence_N, logprob_N)
    return sums_S / torch.bincount(sequence_N, minlength=num_sequences)


def ipo_sum(
    chosen_P: torch.Tensor, rejected_P: torch.Tensor, reference_margin_P: torch.Tensor, beta: float
) -> torch.Tensor:
    """IPO (Azar et al. 2023, eq. 17) over mean log-probabilities per token. Denominator: pairs.

    The paper sums log-ratios; for completions of unequal length its authors average them over the tokens, and so does
    TRL. The target 1/(2β) is therefore in nats per token.
    """
    margin_P = (chosen_P - rejected_P) - reference_margin_P
    return ((margin_P - 1 / (2 * beta)) ** 2).sum()


def dr_grpo_sum(
    logprob_N: torch.Tensor, old_logprob_N: torch.Tensor, advantage_N: torch.Tensor, clip_low: float, clip_high: float
) -> torch.Tensor:
    """Clipped policy gradient per token (Dr. GRPO, Liu et al. 2025). Denominator: episodes × longest completion.

    A constant normaliser, and advantages that are not divided by the group's spread, keep the gradient unbiased by
    length and difficulty.
    """
    ratio_N = torch.exp(logprob_N - old_logprob_N)
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N).sum()


def group_advantages(scores: list[float | None]) -> list[float]:
    """Score minus the group's mean over its scorable members; an unscorable member gets 0 and trains nothing."""
    known = [score for score in scores if score is not None]
    mean = sum(known) / len(known) if known else 0.0
    return [0.0 if score is None else score - mean for score in scores]
