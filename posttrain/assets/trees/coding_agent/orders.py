def merged(first: list[int], second: list[int]) -> list[int]:
    found, left, right = [], 0, 0
    while left < len(first) and right < len(second):
        if first[left] <= second[right]:
            found.append(first[left])
            left += 1
        else:
            found.append(second[right])
            right += 1
    return found + first[left:] + second[right:]


def place_of(values: list[int], wanted: int) -> int:
    low, high = 0, len(values) - 1
    while low <= high:
        middle = (low + high) // 2
        if values[middle] == wanted:
            return middle
        if values[middle] < wanted:
            low = middle + 1
        else:
            high = middle - 1
    return -1


def longest_rise(values: list[int]) -> int:
    best, now = 0, 0
    for place, value in enumerate(values):
        if place > 0 and value > values[place - 1]:
            now += 1
        else:
            now = 1
        best = max(best, now)
    return best


def rotated(values: list[int], by: int) -> list[int]:
    if not values:
        return []
    cut = by % len(values)
    return values[cut:] + values[:cut]


def median(values: list[int]) -> float:
    ordered, half = sorted(values), len(values) // 2
    if len(values) % 2 == 1:
        return float(ordered[half])
    return (ordered[half - 1] + ordered[half]) / 2


def without_repeats(values: list[int], most: int) -> list[int]:
    found: list[int] = []
    for value in values:
        if found.count(value) < most:
            found.append(value)
    return found


def windows(values: list[int], size: int) -> list[int]:
    return [sum(values[at : at + size]) for at in range(len(values) - size + 1)]


def balanced(text: str) -> bool:
    depth = 0
    for letter in text:
        if letter == "(":
            depth += 1
        elif letter == ")":
            depth -= 1
        if depth < 0:
            return False
    return depth == 0


def ranked(scores: dict[str, int]) -> dict[str, int]:
    ranks = {}
    for name, score in scores.items():
        ranks[name] = 1 + sum(other > score for other in scores.values())
    return ranks


def best_pair(values: list[int], total: int) -> tuple[int, int]:
    best, apart = (0, 0), -1
    for place, first in enumerate(values):
        for second in values[place + 1 :]:
            off = abs(first + second - total)
            if apart < 0 or off < apart:
                best, apart = (first, second), off
    return best
