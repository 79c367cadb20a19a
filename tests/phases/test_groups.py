"""Which tasks a step rolls out, which episodes are masked, and which groups are trained on."""

import numpy as np
import pytest

from posttrain.data.order import Samples
from posttrain.errors import PhaseFault, RecipeError
from posttrain.phases.groups import Curriculum, chosen, mask
from posttrain.recipe.check import check
from posttrain.recipe.types import EVERY_EPISODE, Stage
from posttrain.recipes.duel import duel

TASKS = [{"tier": tier} for tier in ("easy", "hard", "easy", "hard", "easy", None)]
LENGTHS = [10, 20, 30, 40, 50, 60]


def episode(tokens, score, ended="done", sampled=None):
    kept = sampled or [1] * len(tokens)
    return {"tokens": tokens, "sampled": kept, "score": score, "reason": None, "ended": ended}


def phase_with(**changes):
    [phase] = [phase for phase in duel().phases if phase.kind == "grpo"]
    return phase.model_copy(update={"groups_per_step": 2, **changes})


def curriculum(*stages, **changes):
    return Curriculum(phase_with(curriculum=stages, **changes), Samples(Turning(len(TASKS))), TASKS, LENGTHS)


class Turning:
    """A mixture whose epochs turn the order by one."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def epoch(self, number):
        return np.roll(np.arange(self.count), number)


def stage(from_step, longest, turns=1, tiers=None):
    return Stage(from_step=from_step, max_prompt_tokens=longest, max_turns=turns, tiers=tiers)


def test_masked_episodes_are_counted_by_reason_and_keep_the_rest():
    group = [
        episode([1, 2, 3, 4], 1.0),
        episode([1, 2, 3, 4], 1.0),
        episode([5, 6, 7, 8], 0.5, ended="length"),
        episode([9, 9, 9, 9], 0.0, sampled=[1, 0, 0, 1]),
        episode([9], None),
    ]
    group[4]["reason"] = "no action"
    mask(group, EVERY_EPISODE.model_copy(update={"at_least_tokens": 3, "duplicates": "masked"}))
    assert [one["reason"] for one in group] == [None, "duplicate", "truncated", "too short", "no action"]
    assert [one["score"] for one in group] == [1.0, None, None, None, None]


def test_without_filters_only_cut_off_episodes_are_masked_and_those_may_be_scored():
    group = [episode([1], 1.0), episode([1], 1.0), episode([2], 0.5, ended="length")]
    mask(group, EVERY_EPISODE.model_copy(update={"overlong": "scored"}))
    assert [one["score"] for one in group] == [1.0, 1.0, 0.5]
    mask(group, EVERY_EPISODE)
    assert [one["score"] for one in group] == [1.0, 1.0, None]


def test_the_first_groups_with_spread_are_trained_on():
    flat, mixed = [episode([1], 1.0), episode([2], 1.0)], [episode([1], 1.0), episode([2], 0.0)]
    lone = [episode([1], 1.0), episode([2], None)]
    assert chosen([flat, mixed, lone, mixed, mixed], 2) == [1, 3]
    assert chosen([flat, mixed, lone], 2) == [0, 1]


def test_stages_open_tasks_by_length_and_tier_and_set_the_turns():
    first = (stage(1, 30, 1, ("easy",)), stage(3, 100, 4, ("hard",)))
    plan = curriculum(*first, stage(5, 100, 8), spare_groups=1)
    assert {*plan.of_step(1), *plan.of_step(2)} == {0, 2}
    assert {*plan.of_step(3), *plan.of_step(4)} == {1, 3}
    later = [number for step in range(5, 9) for number in plan.of_step(step)]
    assert len(later) == 12 and sorted(later[:6]) == sorted(later[6:]) == [0, 1, 2, 3, 4, 5]
    assert [plan.sampling(step).max_turns for step in (1, 2, 3, 5, 60)] == [1, 1, 4, 8, 8]
    assert plan.of_step(4) == curriculum(*first, spare_groups=1).of_step(4)


def test_a_stage_without_tasks_is_named():
    with pytest.raises(PhaseFault, match=r"from step 1: none of 6 tasks .* at most 5 tokens \(the shortest has 10\)"):
        curriculum(stage(1, 5))


def test_stages_out_of_order_are_faults():
    recipe = duel()
    phases = tuple(
        phase.model_copy(update={"curriculum": (stage(2, 9), stage(2, 9), stage(99, 9))})
        if phase.kind == "grpo"
        else phase
        for phase in recipe.phases
    )
    with pytest.raises(RecipeError) as caught:
        check(recipe.model_copy(update={"phases": phases}))
    for words in (
        "the first stage begins at step 1",
        "2 is not later than the stage before it, 2",
        "after the phase's last",
    ):
        assert words in str(caught.value)
