"""Losses as pure functions over log-probabilities. Each returns a sum; the caller divides by the declared denominator,
taken over the whole global batch.

Axes: N target, S sequence, P pair.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from posttrain.recipe.types import (
    Cispo,
    Dapo,
    Dpo,
    DrGrpo,
    GrpoObjective,
    Gspo,
    Ipo,
    Kto,
    Orpo,
    PreferenceObjective,
    SimPo,
)


def sft_sum(logprob_N: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood. Denominator: target tokens."""
    return -logprob_N.sum()


def sequence_sums(logprob_N: torch.Tensor, sequence_N: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Log-probability of each sequence's targets [S]; `sequence_N` counts from 0."""
    zeros_S = torch.zeros(num_sequences, dtype=logprob_N.dtype, device=logprob_N.device)
    return zeros_S.index_add(0, sequence_N, logprob_N)


def sequence_lengths(sequence_N: torch.Tensor, num_sequences: int) -> torch.Tensor:
    return torch.bincount(sequence_N, minlength=num_sequences)


# ---------------------------------------------------------------- preference


@dataclass(frozen=True)
class Pairs:
    """Summed log-probabilities [P, 2] of chosen and rejected completions, and their targets' number [P, 2]."""

    policy_P2: torch.Tensor
    lengths_P2: torch.Tensor
    reference_P2: torch.Tensor | None
    """Of the phase's input state; None for an objective without a reference."""


def preference_sum(objective: PreferenceObjective, pairs: Pairs, kl: float = 0.0) -> torch.Tensor:
    """Denominator: pairs; for KTO completions, so twice the pairs. `kl` is KTO's estimate for the whole batch."""
    match objective:
        case Ipo():
            return ipo_sum(_ratios(pairs) / pairs.lengths_P2, objective.beta)
        case Dpo():
            return dpo_sum(_ratios(pairs), objective.beta)
        case Kto():
            weights = objective.desirable_weight, objective.undesirable_weight
            return kto_sum(_ratios(pairs), kl, objective.beta, *weights)
        case Orpo():
            return orpo_sum(pairs.policy_P2 / pairs.lengths_P2, objective.odds_weight)
        case SimPo():
            return simpo_sum(pairs.policy_P2 / pairs.lengths_P2, objective.beta, objective.margin)
    raise AssertionError(objective)


def needs_reference(objective: PreferenceObjective) -> bool:
    return isinstance(objective, Ipo | Dpo | Kto)


def _ratios(pairs: Pairs) -> torch.Tensor:
    assert pairs.reference_P2 is not None
    return pairs.policy_P2 - pairs.reference_P2


def ipo_sum(mean_ratio_P2: torch.Tensor, beta: float) -> torch.Tensor:
    """IPO (Azar et al. 2023, eq. 17) over mean log-ratios per token.

    The paper sums log-ratios; for completions of unequal length its authors average them over the tokens, and so does
    TRL. The target 1/(2β) is therefore in nats per token.
    """
    return ((mean_ratio_P2[:, 0] - mean_ratio_P2[:, 1] - 1 / (2 * beta)) ** 2).sum()


def dpo_sum(ratio_P2: torch.Tensor, beta: float) -> torch.Tensor:
    """DPO (Rafailov et al. 2023, eq. 7) over summed log-ratios."""
    return -logsigmoid(beta * (ratio_P2[:, 0] - ratio_P2[:, 1])).sum()


def kto_sum(
    ratio_P2: torch.Tensor, kl: float, beta: float, desirable_weight: float, undesirable_weight: float
) -> torch.Tensor:
    """KTO (Ethayarajh et al. 2024, eq. 8): each completion against the divergence `kl`, not against its pair."""
    chosen = desirable_weight * (1 - torch.sigmoid(beta * (ratio_P2[:, 0] - kl)))
    rejected = undesirable_weight * (1 - torch.sigmoid(beta * (kl - ratio_P2[:, 1])))
    return (chosen + rejected).sum()


def orpo_sum(mean_P2: torch.Tensor, odds_weight: float) -> torch.Tensor:
    """ORPO (Hong et al. 2024, eq. 6): likelihood of the chosen completion and the log odds ratio, per token."""
    # log(1 − exp(x)) by the form that keeps its digits near 0.
    complement_P2 = torch.where(
        mean_P2 > -0.6931472, torch.log(-torch.expm1(mean_P2)), torch.log1p(-torch.exp(mean_P2))
    )
    odds_P2 = mean_P2 - complement_P2
    return (-mean_P2[:, 0] - odds_weight * logsigmoid(odds_P2[:, 0] - odds_P2[:, 1])).sum()


def simpo_sum(mean_P2: torch.Tensor, beta: float, margin: float) -> torch.Tensor:
    """SimPO (Meng et al. 2024, eq. 6): mean log-probabilities, no reference, and a margin to win by."""
    return -logsigmoid(beta * (mean_P2[:, 0] - mean_P2[:, 1]) - margin).sum()


# ---------------------------------------------------------------- policy gradient


@dataclass(frozen=True)
class Rollouts:
    """What is constant in a policy update, per sampled token [N] of the sequences [S]."""

    old_logprob_N: torch.Tensor
    advantage_N: torch.Tensor
    sequence_N: torch.Tensor
    """Counts from 0."""
    num_sequences: int
    weight_N: torch.Tensor | None = None
    """Truncated importance weights between sampler and trainer, where asked."""
    reference_logprob_N: torch.Tensor | None = None
    """Of the phase's input state, where a KL term is asked."""


def policy_sum(objective: GrpoObjective, logprob_N: torch.Tensor, rollouts: Rollouts, kl_weight: float) -> torch.Tensor:
    """One clipped policy gradient in its variants; see `policy_denominator` for what it is divided by."""
    log_ratio_N = logprob_N - rollouts.old_logprob_N
    advantage_N, owner_N = rollouts.advantage_N, rollouts.sequence_N
    length_N = sequence_lengths(owner_N, rollouts.num_sequences).index_select(0, owner_N)
    match objective:
        case Gspo():
            # One ratio per sequence: the geometric mean of its tokens' ratios.
            mean_S = sequence_sums(log_ratio_N / length_N, owner_N, rollouts.num_sequences)
            terms_N = clipped(
                mean_S.index_select(0, owner_N).exp(), advantage_N, objective.clip_low, objective.clip_high
            )
        case Cispo():
            capped_N = log_ratio_N.detach().exp().clamp(max=objective.ratio_cap)
            terms_N = -capped_N * advantage_N * logprob_N
        case DrGrpo() | Dapo():
            terms_N = clipped(log_ratio_N.exp(), advantage_N, objective.clip_low, objective.clip_high)
    if rollouts.weight_N is not None:
        terms_N = terms_N * rollouts.weight_N
    if rollouts.reference_logprob_N is not None:
        terms_N = terms_N + kl_weight * kl_terms(logprob_N, rollouts.reference_logprob_N)
    return (terms_N / length_N).sum() if isinstance(objective, Gspo) else terms_N.sum()


def policy_denominator(objective: GrpoObjective, episodes: int, longest: int, target_tokens: int) -> int:
    """Dr. GRPO (Liu et al. 2025) divides by a constant, which keeps the gradient unbiased by length; DAPO (Yu et al.
    2025) and CISPO (MiniMax 2025) by the sampled tokens; GSPO (Zheng et al. 2025) takes sequence means, so by episodes.
    """
    match objective:
        case DrGrpo():
            return episodes * longest
        case Gspo():
            return episodes
        case Dapo() | Cispo():
            return target_tokens
    raise AssertionError(objective)


def clipped(ratio_N: torch.Tensor, advantage_N: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """PPO's pessimistic term per token, with its sign turned: a loss."""
    return -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - low, 1 + high) * advantage_N)


def kl_terms(logprob_N: torch.Tensor, reference_N: torch.Tensor) -> torch.Tensor:
    """Schulman's estimate of KL(policy ‖ reference) per token: unbiased in expectation and never negative."""
    difference_N = reference_N - logprob_N
    return difference_N.exp() - difference_N - 1


def truncated_weights(trainer_N: torch.Tensor, sampler_N: torch.Tensor, cap: float) -> torch.Tensor:
    """Truncated importance sampling (Yao et al. 2025): what the sampler's own probabilities distort, up to `cap`."""
    return (trainer_N - sampler_N).exp().clamp(max=cap)


def group_advantages(scores: list[float | None], divide_by_spread: bool = False) -> list[float]:
    """Score minus the group's mean over its scorable members; an unscorable member gets 0 and trains nothing.

    `divide_by_spread` is GRPO's original scale, the sample standard deviation.
    """
    known = [score for score in scores if score is not None]
    mean = sum(known) / len(known) if known else 0.0
    scale = 1.0
    if divide_by_spread and len(known) > 1:
        scale = (sum((score - mean) ** 2 for score in known) / (len(known) - 1)) ** 0.5 + 1e-4
    return [0.0 if score is None else (score - mean) / scale for score in scores]
