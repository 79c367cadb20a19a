"""Packed rows hold every document once, whole, and next to no room is lost."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.mixture import Mixture, Part
from posttrain.data.packed_rows import PackedRows, best_fit, pack_epoch
from posttrain.errors import DataError

LAWS = {"median 450": (450, 0.8, 8192), "median 3000": (3000, 1.0, 32768)}


def lognormal(number: int, median: int, sigma: float, cap: int) -> np.ndarray:
    drawn = np.exp(np.random.default_rng(0).normal(np.log(median), sigma, number))
    return np.clip(drawn.astype(np.int64), 1, cap)


def whole(number: int, seed: int = 0) -> Mixture:
    return Mixture((Part(number, None, 1),), seed)


def test_best_fit_worked_by_hand() -> None:
    # 7 and 6 open rows; 4 fits the second exactly, 3 the first; 2 opens a third, which 1 joins.
    assert best_fit([4, 7, 2, 6, 3, 1], 10) == [[1, 4], [3, 0], [2, 5]]
    # Into the fullest row with room, not the first: 2 joins 7 rather than 5.
    assert best_fit([5, 7, 2], 10) == [[1, 2], [0]] and best_fit([], 10) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 90))
def test_best_fit_is_what_searching_every_row_finds(lengths: list[int], row_tokens: int) -> None:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else row_tokens) - length)
    rows = best_fit(lengths, row_tokens)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert sorted(row_tokens - sum(lengths[place] for place in row) for row in rows) == sorted(rooms)


@pytest.mark.parametrize("law", LAWS)
def test_rows_are_full(law: str) -> None:
    median, sigma, cap = LAWS[law]
    lengths = lognormal(20_000, median, sigma, cap)
    rows = pack_epoch(whole(len(lengths)).epoch(0), lengths, cap, [0, 0])
    assert np.sort(np.concatenate(rows)).tolist() == list(range(len(lengths)))
    filled = np.array([lengths[row].sum() for row in rows])
    assert filled.max() <= cap
    assert filled.mean() / cap >= 0.999


def test_lengths_that_leave_room_everywhere_are_packed_all_the_same() -> None:
    lengths = np.full(5000, 600)
    rows = pack_epoch(np.arange(5000), lengths, 1000, [0])
    assert sorted(row.tolist() for row in rows) == [[number] for number in range(5000)]


def test_rows_follow_the_seeded_order() -> None:
    """Documents of the first row stand near the front of the order, whatever their length."""
    lengths = lognormal(20_000, *LAWS["median 450"])
    documents = whole(20_000).epoch(0)
    rank = np.empty(20_000, dtype=np.int64)
    rank[documents] = np.arange(20_000)
    rows = pack_epoch(documents, lengths, 8192, [0, 0])
    ranks = np.array([rank[row].mean() for row in rows])
    assert np.corrcoef(ranks, np.arange(len(rows)))[0, 1] > 0.95
    # Long and short rows alike come early and late.
    documents_per_row = np.array([len(row) for row in rows])
    assert abs(np.corrcoef(documents_per_row, np.arange(len(rows)))[0, 1]) < 0.1


def test_steps_read_every_row_of_every_epoch_once_and_resume_anywhere() -> None:
    rng = random.Random(0)
    lengths = np.array([rng.randint(1, 100) for _ in range(300)])
    mixture = whole(300, seed=5)
    expected = [row for epoch in range(3) for row in pack_epoch(mixture.epoch(epoch), lengths, 100, [5, epoch])]
    steps = len(expected) // 4
    through = PackedRows(mixture, lengths, 100)
    read = [row for step in range(1, steps + 1) for row in through.rows_of_step(step, 4)]
    assert [row.tolist() for row in read] == [row.tolist() for row in expected[: 4 * steps]]
    resumed = PackedRows(mixture, lengths, 100).rows_of_step(steps, 4)
    assert [row.tolist() for row in resumed] == [row.tolist() for row in read[-4:]]


def test_a_document_longer_than_a_row_is_refused() -> None:
    with pytest.raises(DataError, match="sample 1 has 11 tokens and a row only 10; lower the dataset's max_tokens"):
        PackedRows(whole(2), np.array([10, 11]), 10)
