"""Paired statistics of two answer lists. numpy only; SciPy is the oracle of the tests."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

RESAMPLES = 10_000
MOST_DISTINCT_FOR_COUNTS = 32
RESAMPLED_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Interval:
    low: float
    high: float
    method: str

    @property
    def above_zero(self) -> bool:
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        return self.high < 0


@dataclass(frozen=True)
class Pairs:
    """Two lists of scores matched by id, in the order of the first."""

    ids: tuple[str, ...]
    before: Values
    after: Values
    before_only: int
    after_only: int
    unscorable: int
    """Ids on both sides with no value on at least one of them: left out on both."""
    repeated: int
    """Further rows with an id seen before on the same side; the last one counts."""


@dataclass(frozen=True)
class Comparison:
    """`after` against `before` over the pairs they share."""

    pairs: int
    before_mean: float
    after_mean: float
    difference: float
    interval: Interval | None
    """95 % interval of the mean paired difference; none for fewer than two pairs."""
    improved: int
    worsened: int
    mcnemar_p: float | None
    """Exact two-sided McNemar p; only for scores that are all 0 or 1."""
    before_only: int
    after_only: int
    unscorable: int
    repeated: int

    @property
    def unchanged(self) -> bool:
        return self.pairs > 0 and self.improved == 0 and self.worsened == 0


def pair(before: Iterable[tuple[str, float | None]], after: Iterable[tuple[str, float | None]]) -> Pairs:
    """Match two lists of (id, value); a value of None is unscorable, as is one that is not finite."""
    first, first_repeated = _by_id(before)
    second, second_repeated = _by_id(after)
    shared = [key for key in first if key in second]
    scored = [(key, a, b) for key in shared if (a := first[key]) is not None and (b := second[key]) is not None]
    return Pairs(
        ids=tuple(key for key, _, _ in scored),
        before=np.array([a for _, a, _ in scored], dtype=np.float64),
        after=np.array([b for _, _, b in scored], dtype=np.float64),
        before_only=len(first) - len(shared),
        after_only=len(second) - len(shared),
        unscorable=len(shared) - len(scored),
        repeated=first_repeated + second_repeated,
    )


def _by_id(rows: Iterable[tuple[str, float | None]]) -> tuple[dict[str, float | None], int]:
    found: dict[str, float | None] = {}
    repeated = 0
    for key, value in rows:
        repeated += key in found
        found[key] = value if value is not None and math.isfinite(value) else None
    return found, repeated


def compare(before: Iterable[tuple[str, float | None]], after: Iterable[tuple[str, float | None]]) -> Comparison:
    """Paired comparison by id, with a BCa bootstrap interval of the mean difference."""
    pairs = pair(before, after)
    differences = pairs.after - pairs.before
    improved, worsened = int((differences > 0).sum()), int((differences < 0).sum())
    binary = len(differences) > 0 and is_binary(pairs.before) and is_binary(pairs.after)
    return Comparison(
        pairs=len(pairs.ids),
        before_mean=float(pairs.before.mean()) if len(differences) else math.nan,
        after_mean=float(pairs.after.mean()) if len(differences) else math.nan,
        difference=float(differences.mean()) if len(differences) else math.nan,
        interval=bootstrap_interval(differences),
        improved=improved,
        worsened=worsened,
        mcnemar_p=mcnemar_exact(improved, worsened) if binary else None,
        before_only=pairs.before_only,
        after_only=pairs.after_only,
        unscorable=pairs.unscorable,
        repeated=pairs.repeated,
    )


def is_binary(values: Values) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def bootstrap_interval(
    values: Values, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """Bias-corrected and accelerated (BCa) bootstrap interval of the mean (Efron 1987), seeded.

    Values without spread give the interval of length 0 that the bootstrap has there, and `method` says so.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return None
    mean = float(values.mean())
    if np.ptp(values) == 0.0:
        return Interval(float(values[0]), float(values[0]), "no spread: every value is the same")
    means = _resampled_means(values, resamples, np.random.default_rng(seed))
    # Ties with the observed mean count half; rounding must not decide on which side a tie falls.
    slack = 1e-12 * float(np.abs(values).max())
    share_below = (float((means < mean - slack).mean()) + float((means <= mean + slack).mean())) / 2
    normal = NormalDist()
    bias = normal.inv_cdf(min(max(share_below, 0.5 / resamples), 1 - 0.5 / resamples))
    # The jackknife's deviations of a mean are the values' own, divided by n - 1.
    deviations = (values - mean) / (len(values) - 1)
    acceleration = float((deviations**3).sum()) / (6 * float((deviations**2).sum()) ** 1.5)

    def corrected(level: float) -> float:
        shifted = bias + normal.inv_cdf(level)
        return normal.cdf(bias + shifted / (1 - acceleration * shifted))

    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [corrected(tail), corrected(1 - tail)])
    return Interval(float(low), float(high), "BCa bootstrap")


def _resampled_means(values: Values, resamples: int, random: np.random.Generator) -> Values:
    """Means of samples drawn with replacement; few distinct values are drawn as multinomial counts, which is the same
    distribution at a fraction of the work."""
    count = len(values)
    distinct, frequencies = np.unique(values, return_counts=True)
    if len(distinct) <= MOST_DISTINCT_FOR_COUNTS:
        drawn = random.multinomial(count, frequencies / count, size=resamples)
        # Not a matrix product: that would wake the threads of a BLAS for a few thousand numbers.
        return np.asarray((drawn * distinct).sum(axis=1) / count, dtype=np.float64)
    means = np.empty(resamples, dtype=np.float64)
    rows = max(1, RESAMPLED_AT_ONCE // count)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        means[start : start + size] = values[random.integers(0, count, size=(size, count))].mean(axis=1)
    return means


def t_interval(values: Values, confidence: float = 0.95) -> Interval | None:
    """Student's t interval of the mean: exact where the values are normal; on differences, the paired t interval."""
    values = np.asarray(values, dtype=np.float64)
    count = len(values)
    if count < 2:
        return None
    half = t_quantile((1 + confidence) / 2, count - 1) * float(values.std(ddof=1)) / math.sqrt(count)
    mean = float(values.mean())
    return Interval(mean - half, mean + half, "Student's t")


def t_quantile(level: float, degrees: float) -> float:
    """Inverse of Student's t distribution function, by bisection to the last bits."""
    if level < 0.5:
        return -t_quantile(1 - level, degrees)
    low, high = 0.0, 1.0
    while _t_cdf(high, degrees) < level:
        low, high = high, high * 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _t_cdf(middle, degrees) < level else (low, middle)
    return middle


def _t_cdf(value: float, degrees: float) -> float:
    """Distribution function for value >= 0."""
    return 1 - _regularised_beta(degrees / (degrees + value * value), degrees / 2, 0.5) / 2


def _regularised_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b) by Lentz's continued fraction (Numerical Recipes, 6.4)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _regularised_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 500):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return front * fraction / a


def mcnemar_exact(improved: int, worsened: int) -> float:
    """Exact two-sided McNemar p over the discordant pairs of binary scores."""
    discordant = improved + worsened
    tail = sum(math.comb(discordant, k) for k in range(min(improved, worsened) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def wilson_interval(successes: float, count: int, confidence: float = 0.95) -> Interval | None:
    """Wilson's score interval of a rate, without continuity correction."""
    if count == 0:
        return None
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / count
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return Interval(max(0.0, centre - half), min(1.0, centre + half), "Wilson")
