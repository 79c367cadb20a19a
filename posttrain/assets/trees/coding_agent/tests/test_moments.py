from moments import (
    busiest,
    free_slots,
    is_leap,
    is_open,
    minutes_between,
    month_days,
    next_day,
    overlaps,
    shown,
)


def test_is_leap():
    assert is_leap(2024)
    assert not is_leap(2023)
    assert not is_leap(1900)
    assert is_leap(2000)


def test_month_days():
    assert [month_days(2023, month) for month in range(1, 13)] == [
        31,
        28,
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ]
    assert month_days(2024, 2) == 29


def test_next_day():
    assert next_day(2023, 2, 28) == (2023, 3, 1)
    assert next_day(2024, 2, 28) == (2024, 2, 29)
    assert next_day(2023, 12, 31) == (2024, 1, 1)
    assert next_day(2023, 11, 30) == (2023, 12, 1)


def test_shown():
    assert shown(59) == "0:59"
    assert shown(61) == "1:01"
    assert shown(3600) == "1:00:00"
    assert shown(3599) == "59:59"


def test_minutes_between():
    assert minutes_between((9, 30), (11, 0)) == 90
    assert minutes_between((23, 50), (0, 10)) == 20
    assert minutes_between((8, 0), (8, 0)) == 0


def test_is_open():
    assert is_open(9, 9, 17) and not is_open(17, 9, 17)
    assert is_open(23, 22, 4) and is_open(3, 22, 4)
    assert not is_open(4, 22, 4) and is_open(22, 22, 4)
    assert not is_open(5, 5, 5)


def test_overlaps():
    assert overlaps((1, 3), (2, 4))
    assert not overlaps((1, 2), (2, 3))
    assert not overlaps((2, 3), (1, 2))


def test_busiest():
    assert busiest([(1, 4), (2, 5), (4, 6)]) == 2
    assert busiest([]) == 0


def test_free_slots():
    assert free_slots([(2, 4)], 0, 8, 2) == [0, 4, 6]
    assert free_slots([(1, 2)], 0, 4, 2) == [2]
    assert free_slots([], 0, 1, 2) == []
