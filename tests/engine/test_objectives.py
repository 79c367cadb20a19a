"""Objectives against TRL's own loss code, run on the same log-probabilities, and against cases worked by hand."""

from types import SimpleNamespace

import pytest
import torch
from trl import DPOTrainer, GRPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from posttrain.engine.objectives import (
    Pairs,
    Rollouts,
    group_advantages,
    policy_denominator,
    policy_sum,
    preference_sum,
    sequence_sums,
    truncated_weights,
)
from posttrain.engine.reference import kl_estimate
from posttrain.recipe.types import Cispo, Dapo, Dpo, DrGrpo, Gspo, Ipo, Kto, Orpo, SimPo

LENGTHS = [[5, 3], [2, 7], [6, 6], [1, 4]]
"""Targets of chosen and rejected, by pair."""


def random_logprobs(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return -torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 3


class Collected(dict):
    """TRL's metric lists, which nobody reads here."""

    def __missing__(self, key):
        self[key] = []
        return self[key]


ACCELERATOR = SimpleNamespace(
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
    device=torch.device("cpu"),
    num_processes=1,
    sync_gradients=False,
    unwrap_model=lambda model: model,
)


def trl_outputs(logprob_ST: torch.Tensor) -> SimpleNamespace:
    """What TRL's fused head returns: the log-probabilities, and zeros where it only feeds metrics."""
    zeros = torch.zeros_like(logprob_ST)
    return SimpleNamespace(log_probs=logprob_ST, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None)


def padded(rows: list[int], values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token values [S, T] with zeros behind each row's length, and their mask."""
    mask = torch.arange(values.shape[1]) < torch.tensor(rows)[:, None]
    return values * mask, mask


# ---------------------------------------------------------------- preference


def pair_batch():
    """Policy and reference log-probabilities per token, chosen rows first as TRL stacks them."""
    rows = [length[0] for length in LENGTHS] + [length[1] for length in LENGTHS]
    policy_ST, mask_ST = padded(rows, random_logprobs(0, (8, 7)))
    reference_ST, _ = padded(rows, random_logprobs(1, (8, 7)))
    return policy_ST.requires_grad_(), reference_ST, mask_ST


def as_pairs(policy_ST: torch.Tensor, reference_ST: torch.Tensor) -> Pairs:
    return Pairs(policy_ST.sum(1).view(2, -1).T, torch.tensor(LENGTHS), reference_ST.sum(1).view(2, -1).T)


def trl_dpo_loss(loss_type: str, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """DPOTrainer's own loss code over a model that answers with our log-probabilities."""
    policy_ST, reference_ST, mask_ST = pair_batch()
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        accelerator=ACCELERATOR,
        _metrics={"train": Collected()},
        _total_train_tokens=0,
        _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    left = torch.zeros(8, 1, dtype=torch.long)
    inputs = {
        "input_ids": torch.cat([left, torch.ones(8, 7, dtype=torch.long)], 1),
        "attention_mask": torch.cat([left + 1, mask_ST.long()], 1),
        "completion_mask": torch.cat([left, mask_ST.long()], 1),
        "ref_chosen_logps": reference_ST.sum(1)[:4],
        "ref_rejected_logps": reference_ST.sum(1)[4:],
    }

    def model(**kwargs):
        return trl_outputs(policy_ST)

    loss = DPOTrainer._compute_loss(stand_in, model, inputs, return_outputs=False)
    return loss, policy_ST


@pytest.mark.parametrize(
    ("objective", "loss_type"), [(Ipo(kind="ipo", beta=0.3), "ipo"), (Dpo(kind="dpo", beta=0.3), "sigmoid")]
)
def test_paired_objectives_equal_trl(objective, loss_type):
    theirs, their_policy = trl_dpo_loss(loss_type, objective.beta)
    policy_ST, reference_ST, _ = pair_batch()
    ours = preference_sum(objective, as_pairs(policy_ST, reference_ST)) / len(LENGTHS)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(policy_ST.grad, their_policy.grad)


def test_kto_equals_trl():
    policy_ST, reference_ST, mask_ST = pair_batch()
    kl_policy, kl_reference = random_logprobs(2, (8, 7)), random_logprobs(3, (8, 7)) * 1.5
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        accelerator=ACCELERATOR,
        _metrics={"train": Collected()},
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda model, batch: kl_policy.sum(1),
    )
    left = torch.zeros(8, 1, dtype=torch.long)
    inputs = {
        "input_ids": torch.cat([left, torch.ones(8, 7, dtype=torch.long)], 1),
        "attention_mask": torch.cat([left + 1, mask_ST.long()], 1),
        "completion_mask": torch.cat([left, mask_ST.long()], 1),
        "label": torch.arange(8) < 4,
        "ref_logps": reference_ST.sum(1),
        "ref_KL_logps": kl_reference.sum(1),
    }

    def model(**kwargs):
        return trl_outputs(policy_ST)

    theirs = KTOTrainer._compute_loss(stand_in, model, inputs, return_outputs=False)
    objective = Kto(kind="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    kl = kl_estimate(kl_policy.sum(1), kl_reference.sum(1))
    assert kl > 0.5
    ours = preference_sum(objective, as_pairs(policy_ST, reference_ST), kl) / 8
    torch.testing.assert_close(ours, theirs)


def test_orpo_equals_trl():
    policy_ST, _, _ = pair_batch()
    pairs = Pairs(policy_ST.sum(1).view(2, -1).T, torch.tensor(LENGTHS), None)
    mean_P2 = pairs.policy_P2 / pairs.lengths_P2
    stand_in = SimpleNamespace(beta=0.4, accelerator=ACCELERATOR)
    odds, *_ = ORPOTrainer.odds_ratio_loss(stand_in, mean_P2[:, 0], mean_P2[:, 1])
    # The trainer subtracts the mean of the odds term from the likelihood of the chosen completions.
    theirs = (-mean_P2[:, 0]).mean() - odds.mean()
    ours = preference_sum(Orpo(kind="orpo", odds_weight=0.4), pairs) / len(LENGTHS)
    torch.testing.assert_close(ours, theirs)


def test_simpo_equals_trl():
    policy_ST, _, _ = pair_batch()
    pairs = Pairs(policy_ST.sum(1).view(2, -1).T, torch.tensor(LENGTHS), None)
    mean_P2 = pairs.policy_P2 / pairs.lengths_P2
    stand_in = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=2.0, label_smoothing=0.0, accelerator=ACCELERATOR
    )
    losses, *_ = CPOTrainer.cpo_loss(stand_in, mean_P2[:, 0], mean_P2[:, 1])
    ours = preference_sum(SimPo(kind="simpo", beta=2.0, margin=0.7), pairs)
    torch.testing.assert_close(ours, losses.sum())


def test_ipo_by_hand():
    # Mean margins 0.5 and -1.0, references 0.1 and 0.2, target 1/(2*0.5) = 1: (0.4-1)^2 + (-1.2-1)^2
    pairs = Pairs(
        torch.tensor([[-2.0, -1.5], [-2.0, -2.0]]),
        torch.tensor([[2, 1], [1, 2]]),
        torch.tensor([[-2.0, -1.1], [-1.0, -2.4]]),
    )
    assert preference_sum(Ipo(kind="ipo", beta=0.5), pairs).item() == pytest.approx(0.36 + 4.84)


# ---------------------------------------------------------------- policy gradient

ROWS = [4, 7, 1, 5]
ADVANTAGES = [1.3, -0.4, 0.9, -1.8]
VARIANTS = {
    "dr_grpo": (DrGrpo(kind="dr_grpo", clip_low=0.2, clip_high=0.28), {"loss_type": "dr_grpo"}),
    "dapo": (Dapo(kind="dapo", clip_low=0.2, clip_high=0.28), {"loss_type": "dapo"}),
    "gspo": (
        Gspo(kind="gspo", clip_low=0.2, clip_high=0.28),
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "cispo": (Cispo(kind="cispo", ratio_cap=1.2), {"loss_type": "cispo", "epsilon_high": 1.2}),
}


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize("sampler_ratio_cap", [None, 1.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_policy_variants_equal_trl(variant, sampler_ratio_cap, kl_weight):
    objective, settings = VARIANTS[variant]
    logprob_ST, mask_ST = padded(ROWS, random_logprobs(4, (4, 7)))
    old_ST, reference_ST, sampler_ST = (logprob_ST + 0.4 * random_logprobs(seed, (4, 7)) + 0.6 for seed in (5, 6, 7))
    weight_ST = None if sampler_ratio_cap is None else truncated_weights(old_ST, sampler_ST, sampler_ratio_cap)
    policy_ST = logprob_ST.clone().requires_grad_()
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        beta=kl_weight,
        use_vllm=weight_ST is not None,
        vllm_importance_sampling_correction=True,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        current_gradient_accumulation_steps=1,
        max_completion_length=7,
        _entropy_bonus_enabled=False,
        accelerator=ACCELERATOR,
        _metrics={"train": Collected()},
        _get_per_token_logps_and_entropies=lambda *a, **k: (policy_ST, torch.zeros(4, 7), None),
        **{"importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.28, **settings},
    )
    inputs = {
        "prompt_ids": torch.ones(4, 2, dtype=torch.long),
        "prompt_mask": torch.ones(4, 2),
        "completion_ids": torch.ones(4, 7, dtype=torch.long),
        "completion_mask": mask_ST.float(),
        "advantages": torch.tensor(ADVANTAGES),
        "old_per_token_logps": old_ST,
        "ref_per_token_logps": reference_ST,
        "importance_sampling_ratio": weight_ST,
        "num_items_in_batch": mask_ST.sum(),
    }
    theirs = GRPOTrainer._compute_loss(stand_in, stand_in.model, inputs)

    packed = logprob_ST[mask_ST].requires_grad_()
    owner_N = torch.arange(4)[:, None].expand(4, 7)[mask_ST]
    rollouts = Rollouts(
        old_ST[mask_ST],
        torch.tensor(ADVANTAGES)[owner_N],
        owner_N,
        4,
        None if weight_ST is None else weight_ST[mask_ST],
        reference_ST[mask_ST] if kl_weight else None,
    )
    denominator = policy_denominator(objective, 4, 7, sum(ROWS))
    ours = policy_sum(objective, packed, rollouts, kl_weight) / denominator
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    assert packed.grad.abs().max() > 0
    torch.testing.assert_close(packed.grad, policy_ST.grad[mask_ST])


def test_clipping_by_hand():
    logprob = torch.log(torch.tensor([0.5, 0.9, 0.1, 0.5]))
    old = torch.log(torch.tensor([0.5, 0.5, 0.5, 0.4]))
    rollouts = Rollouts(old, torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.zeros(4, dtype=torch.long), 1)
    # Ratios 1, 1.8, .2, 1.25; clipped to [.8, 1.28]: min(1,1), min(1.8,1.28), min(-.2,-.8), min(-1.25,-1.25)
    total = policy_sum(VARIANTS["dr_grpo"][0], logprob, rollouts, 0.0)
    assert total.item() == pytest.approx(-(1 + 1.28 - 0.8 - 1.25))


def test_sequence_sums_by_hand():
    assert sequence_sums(torch.tensor([-1.0, -3.0, -5.0]), torch.tensor([0, 0, 1]), 2).tolist() == [-4.0, -5.0]


def test_advantages_leave_unscorable_members_out():
    assert group_advantages([1.0, 0.0, None, 0.5]) == [0.5, -0.5, 0.0, 0.0]
    assert group_advantages([None, None]) == [0.0, 0.0]
    # Sample standard deviation of 1, 0 and 0.5 is 0.5.
    assert group_advantages([1.0, 0.0, None, 0.5], divide_by_spread=True) == pytest.approx([1, -1, 0, 0], abs=3e-4)
