"""Objectives against TRL's own loss code and against cases worked by hand."""

import pytest
import torch

from posttrain.engine.objectives import dr_grpo_sum, group_advantages, ipo_sum, sequence_means


def test_sequence_means_by_hand():
    means = sequence_means(torch.tensor([-1.0, -3.0, -5.0]), torch.tensor([0, 0, 1]), 2)
    assert means.tolist() == [-2.0, -5.0]


def test_ipo_by_hand():
    # margins 0.5 and -1.0, references 0.1 and 0.2, target 1/(2*0.5) = 1: (0.4-1)^2 + (-1.2-1)^2
    loss = ipo_sum(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]), torch.tensor([0.1, 0.2]), beta=0.5)
    assert loss.item() == pytest.approx(0.36 + 4.84)


def test_dr_grpo_by_hand():
    logprob = torch.log(torch.tensor([0.5, 0.9, 0.1, 0.5]))
    old = torch.log(torch.tensor([0.5, 0.5, 0.5, 0.4]))
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    # ratios 1, 1.8, .2, 1.25; clipped to [.8, 1.28]: min(1,1), min(1.8,1.28), min(-.2,-.8), min(-1.25,-1.25)
    assert dr_grpo_sum(logprob, old, advantage, 0.2, 0.28).item() == pytest.approx(-(1 + 1.28 - 0.8 - 1.25))


def test_advantages_leave_unscorable_members_out():
    assert group_advantages([1.0, 0.0, None, 0.5]) == [0.5, -0.5, 0.0, 0.0]
    assert group_advantages([None, None]) == [0.0, 0.0]
