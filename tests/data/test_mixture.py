"""Mixtures give exact counts in an order that depends on counts, weights and seed alone."""

import random

import numpy as np
import pytest

from posttrain.data.mixture import Mixture, Part, counts_until_empty, turns, whole_weights
from posttrain.data.order import Samples


def mixed(*parts: tuple[int, float | None, int], seed: int = 0) -> Mixture:
    return Mixture(tuple(Part(*part) for part in parts), seed)


def owners(mixture: Mixture, samples: np.ndarray) -> np.ndarray:
    ends = np.cumsum([part.samples for part in mixture.parts])
    return np.searchsorted(ends, samples, side="right")


def test_without_weights_the_order_is_one_seeded_permutation() -> None:
    mixture = mixed((5, None, 1), (3, None, 1), seed=7)
    for epoch in range(3):
        expected = np.random.default_rng([7, epoch]).permutation(8)
        assert mixture.epoch(epoch).tolist() == expected.tolist()


def test_a_repeated_part_comes_so_often_in_an_epoch() -> None:
    mixture = mixed((4, None, 3), (5, None, 1))
    assert mixture.counts == (12, 5) and len(mixture) == 17
    assert np.bincount(mixture.epoch(2)).tolist() == [3] * 4 + [1] * 5


def test_turns_worked_by_hand() -> None:
    # Times (2k + 1) / 2s: part 0 at 1/6, 3/6, 5/6; part 1 at 3/6, after the earlier part's at the same time.
    assert turns([3, 1], 9).tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert turns([1, 1, 1], 4).tolist() == [0, 1, 2, 0]
    assert turns([0, 2], 3).tolist() == [1, 1, 1]


def test_every_part_has_its_share_at_every_point_and_exactly_after_each_period() -> None:
    rng = random.Random(0)
    for _ in range(200):
        shares = [rng.randint(1, 40) for _ in range(rng.randint(1, 5))]
        period = sum(shares)
        whose = turns(shares, 2 * period + 3)
        so_far = np.cumsum(whose[:, None] == np.arange(len(shares)), axis=0)
        expected = np.arange(1, len(whose) + 1)[:, None] * np.array(shares) / period
        assert np.abs(so_far - expected).max() <= 1.5
        assert so_far[period - 1].tolist() == shares and so_far[2 * period - 1].tolist() == [2 * s for s in shares]


def test_shares_too_large_for_64_bits_take_the_same_turns() -> None:
    primes = [999_983, 999_979, 999_961, 999_959]
    assert turns(primes, 400).tolist() == turns([10**6] * 4, 400).tolist()


def test_an_epoch_ends_where_a_part_has_no_more() -> None:
    rng = random.Random(1)
    for _ in range(500):
        number = rng.randint(1, 4)
        shares = [rng.randint(0, 9) for _ in range(number)]
        stock = [rng.randint(1, 30) for _ in range(number)]
        if not any(shares):
            continue
        counts = counts_until_empty(shares, stock)
        whose = turns(shares, sum(counts) + 1)
        assert np.bincount(whose[:-1], minlength=number).tolist() == counts
        assert counts[whose[-1]] == stock[whose[-1]]
        assert all(count <= most for count, most in zip(counts, stock, strict=True))


def test_a_weight_is_a_share_of_the_samples() -> None:
    assert whole_weights([0.1, 0.3]) == [1, 3] and whole_weights([70, 30, 0.5]) == [140, 60, 1]
    mixture = mixed((100, 1, 1), (300, 0.5, 1))
    assert mixture.counts == (100, 50)
    # Read twice in an epoch, the first gives 200 samples before it ends, and the second 100.
    assert mixed((100, 1, 2), (300, 0.5, 1)).counts == (200, 100)
    for epoch in range(3):
        assert np.bincount(owners(mixture, mixture.epoch(epoch))).tolist() == [100, 50]


def test_a_part_is_read_whole_before_any_of_it_comes_again() -> None:
    mixture = mixed((7, 1, 2), (37, 3, 1), seed=3)
    assert mixture.counts[0] == 13
    drawn = np.concatenate([mixture.epoch(epoch) for epoch in range(14)])
    small = drawn[drawn < 7]
    assert len(small) == 14 * mixture.counts[0]
    for start in range(0, len(small) - 6, 7):
        assert sorted(small[start : start + 7].tolist()) == list(range(7))


def test_a_part_that_lost_all_its_rows_takes_no_turns() -> None:
    mixture = mixed((0, 2.0, 1), (6, 1.0, 1))
    assert mixture.counts == (0, 6) and sorted(mixture.epoch(0).tolist()) == list(range(6))


@pytest.mark.parametrize("parts", [((10, None, 1),), ((10, 1, 2), (30, 2.5, 1))])
def test_a_step_is_found_without_the_steps_before_it(parts: tuple[tuple[int, float | None, int], ...]) -> None:
    mixture = mixed(*parts)
    through = Samples(mixture)
    steps = [through.of_step(step, 7) for step in range(1, 20)]
    assert [Samples(mixture).of_step(step, 7) for step in range(1, 20)] == steps
    whole = np.concatenate([mixture.epoch(epoch) for epoch in range(19 * 7 // len(mixture) + 1)])
    assert [sample for step in steps for sample in step] == whole[: 19 * 7].tolist()
