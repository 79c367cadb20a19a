from spans import clamp, is_even, label, overlaps, rising, share, total


def test_clamp_keeps_to_its_limits() -> None:
    assert clamp(5, 1, 9) == 5
    assert clamp(0, 1, 9) == 1
    assert clamp(12, 1, 9) == 9


def test_overlaps() -> None:
    assert overlaps(1, 4, 4, 6)
    assert not overlaps(1, 3, 4, 6)


def test_total() -> None:
    assert total([]) == 0
    assert total([3, 4, 5]) == 12


def test_share() -> None:
    assert share(1, 4) == 25
    assert share(3, 0) == 0


def test_label() -> None:
    for percent, name in ((100, "full"), (51, "most"), (50, "some")):
        assert label(percent) == name


def test_is_even() -> None:
    assert is_even(4)
    assert not is_even(7)


def test_rising() -> None:
    assert rising([1, 2, 2, 5])
    assert not rising([3, 1])
