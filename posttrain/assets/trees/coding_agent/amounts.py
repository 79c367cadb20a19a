def rounded(cents: int, step: int) -> int:
    rest = cents % step
    if 2 * rest >= step:
        return cents + step - rest
    return cents - rest


def split_evenly(cents: int, people: int) -> list[int]:
    share, rest = cents // people, cents % people
    return [share + 1 if number < rest else share for number in range(people)]


def discounted(cents: int, percent: int) -> int:
    if percent <= 0:
        return cents
    if percent >= 100:
        return 0
    return cents - cents * percent // 100


def change(cents: int, coins: list[int]) -> list[int]:
    given = []
    for coin in sorted(coins, reverse=True):
        while cents >= coin:
            given.append(coin)
            cents -= coin
    return given


def interest(cents: int, percent: int, years: int) -> int:
    total = cents
    for _ in range(years):
        total += total * percent // 100
    return total - cents


def balance(entries: list[int], limit: int) -> int:
    total = 0
    for entry in entries:
        if total + entry < -limit:
            continue
        total += entry
    return total


def tax(income: int, brackets: list[tuple[int, int]]) -> int:
    owed, below = 0, 0
    for top, percent in brackets:
        if income > below:
            owed += (min(income, top) - below) * percent // 100
        below = top
    return owed


def cheapest(prices: dict[str, int], budget: int) -> list[str]:
    chosen = []
    for name in sorted(prices, key=lambda name: (prices[name], name)):
        if prices[name] > budget:
            break
        budget -= prices[name]
        chosen.append(name)
    return chosen
