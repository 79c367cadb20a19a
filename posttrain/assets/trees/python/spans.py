"""Spans of numbers: where they lie, how long they are, how a share of them is called."""


def clamp(value: int, low: int, high: int) -> int:
    if value < low:
        return low
    if value > high:
        return high
    return value


def overlaps(first: int, last: int, start: int, stop: int) -> bool:
    return first <= stop and start <= last


def total(lengths: list[int]) -> int:
    found = 0
    for length in lengths:
        found += length
    return found


def share(part: int, whole: int) -> int:
    if whole == 0:
        return 0
    return 100 * part // whole


def label(percent: int) -> str:
    if percent >= 100:
        return "full"
    if percent > 50:
        return "most"
    return "some"


def is_even(number: int) -> bool:
    return number % 2 == 0


def rising(values: list[int]) -> bool:
    for place in range(1, len(values)):
        if values[place] < values[place - 1]:
            return False
    return True
