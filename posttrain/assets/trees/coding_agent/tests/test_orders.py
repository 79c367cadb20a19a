from orders import (
    balanced,
    best_pair,
    longest_rise,
    median,
    merged,
    place_of,
    ranked,
    rotated,
    windows,
    without_repeats,
)


def test_merged():
    assert merged([1, 3, 5], [2, 3, 9]) == [1, 2, 3, 3, 5, 9]
    assert merged([], [1]) == [1]
    assert merged([4], []) == [4]


def test_place_of():
    values = [1, 4, 6, 9, 12]
    assert [place_of(values, one) for one in (1, 4, 6, 9, 12)] == [0, 1, 2, 3, 4]
    assert place_of(values, 5) == -1
    assert place_of([], 5) == -1


def test_longest_rise():
    assert longest_rise([1, 2, 2, 3, 4, 0]) == 3
    assert longest_rise([]) == 0
    assert longest_rise([5, 4]) == 1


def test_rotated():
    assert rotated([1, 2, 3, 4], 1) == [2, 3, 4, 1]
    assert rotated([1, 2, 3], 5) == [3, 1, 2]
    assert rotated([], 2) == []


def test_median():
    assert median([5, 1, 3]) == 3.0
    assert median([4, 1, 3, 2]) == 2.5


def test_without_repeats():
    assert without_repeats([1, 1, 1, 2, 1, 2], 2) == [1, 1, 2, 2]
    assert without_repeats([1, 1], 1) == [1]


def test_windows():
    assert windows([1, 2, 3, 4], 2) == [3, 5, 7]
    assert windows([1, 2], 3) == []


def test_balanced():
    assert balanced("(a(b)c)()")
    assert not balanced(")(")
    assert not balanced("(()")
    assert balanced("")


def test_ranked():
    assert ranked({"a": 5, "b": 7, "c": 5, "d": 1}) == {"a": 2, "b": 1, "c": 2, "d": 4}


def test_best_pair():
    assert best_pair([1, 8, 5, 3], 10) == (1, 8)
    assert best_pair([2, 9, 4], 13) == (9, 4)
    assert best_pair([1], 4) == (0, 0)
