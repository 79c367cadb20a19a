def is_leap(year: int) -> bool:
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def month_days(year: int, month: int) -> int:
    if month == 2:
        return 29 if is_leap(year) else 28
    if month in (4, 6, 9, 11):
        return 30
    return 31


def next_day(year: int, month: int, day: int) -> tuple[int, int, int]:
    if day < month_days(year, month):
        return (year, month, day + 1)
    if month < 12:
        return (year, month + 1, 1)
    return (year + 1, 1, 1)


def shown(seconds: int) -> str:
    minutes, rest = seconds // 60, seconds % 60
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}"


def minutes_between(start: tuple[int, int], end: tuple[int, int]) -> int:
    apart = (end[0] - start[0]) * 60 + end[1] - start[1]
    if apart < 0:
        apart += 24 * 60
    return apart


def is_open(hour: int, opens: int, closes: int) -> bool:
    if opens <= closes:
        return opens <= hour < closes
    return hour >= opens or hour < closes


def overlaps(first: tuple[int, int], second: tuple[int, int]) -> bool:
    return first[0] < second[1] and second[0] < first[1]


def busiest(visits: list[tuple[int, int]]) -> int:
    best = 0
    for start, _ in visits:
        there = 0
        for begin, end in visits:
            if begin <= start < end:
                there += 1
        best = max(best, there)
    return best


def free_slots(
    taken: list[tuple[int, int]], start: int, end: int, size: int
) -> list[int]:
    found = []
    at = start
    while at + size <= end:
        if any(overlaps((at, at + size), one) for one in taken):
            at += 1
        else:
            found.append(at)
            at += size
    return found
