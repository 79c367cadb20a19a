from amounts import (
    balance,
    change,
    cheapest,
    discounted,
    interest,
    rounded,
    split_evenly,
    tax,
)


def test_rounded():
    assert rounded(12, 5) == 10
    assert rounded(13, 5) == 15
    assert rounded(15, 10) == 20
    assert rounded(20, 10) == 20


def test_split_evenly():
    assert split_evenly(10, 4) == [3, 3, 2, 2]
    assert split_evenly(9, 3) == [3, 3, 3]


def test_discounted():
    assert discounted(200, 25) == 150
    assert discounted(200, 0) == 200
    assert discounted(200, 100) == 0
    assert discounted(200, 1) == 198
    assert discounted(200, 99) == 2
    assert discounted(200, -5) == 200


def test_change():
    assert change(67, [5, 20, 10, 1]) == [20, 20, 20, 5, 1, 1]
    assert change(0, [1]) == []


def test_interest():
    assert interest(1000, 10, 2) == 210
    assert interest(1000, 10, 0) == 0


def test_balance():
    assert balance([10, -30, 5, -20], 10) == -5
    assert balance([-10], 10) == -10
    assert balance([-11], 10) == 0


def test_tax():
    assert tax(150, [(100, 10), (200, 20)]) == 20
    assert tax(100, [(100, 10), (200, 20)]) == 10
    assert tax(0, [(100, 10)]) == 0
    assert tax(900, [(100, 10), (200, 20)]) == 30


def test_cheapest():
    assert cheapest({"b": 3, "a": 3, "c": 9}, 6) == ["a", "b"]
    assert cheapest({"a": 1}, 0) == []
