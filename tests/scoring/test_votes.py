"""Majority and pass@k against counting by hand."""

import itertools

import pytest

from posttrain.scoring.votes import majority, pass_at


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["2", "1", "2"], "2"),
        (["2", "1", "1", "2"], "1"),
        (["10", "9"], "9"),
        (["b", "a", "b", "a"], "a"),
        (["x", "3"], "3"),
        ([None, None, "7"], "7"),
        ([None, None], None),
        ([], None),
    ],
)
def test_most_votes_win_and_of_equals_the_lowest(answers: list[str | None], winner: str | None) -> None:
    assert majority(answers) == winner


@pytest.mark.parametrize(("samples", "passed", "k"), [(5, 2, 1), (5, 2, 2), (5, 2, 4), (6, 0, 3), (6, 6, 1)])
def test_pass_at_k_counts_the_draws_that_hold_a_success(samples: int, passed: int, k: int) -> None:
    outcomes = [True] * passed + [False] * (samples - passed)
    draws = list(itertools.combinations(outcomes, k))
    assert pass_at(k, samples, passed) == pytest.approx(sum(map(any, draws)) / len(draws))
