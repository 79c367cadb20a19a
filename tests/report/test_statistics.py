"""Statistics against SciPy, and against numbers worked by hand."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from posttrain.report import statistics


def rows(values):
    return [(f"case-{i}", value) for i, value in enumerate(values)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shape", ["binary", "normal", "skewed"])
def test_bca_interval_equals_scipy_within_monte_carlo_error(seed, shape):
    random = np.random.default_rng(seed)
    count = int(random.integers(20, 250))
    if shape == "binary":
        differences = random.binomial(1, 0.7, count).astype(float) - random.binomial(1, 0.3, count)
    elif shape == "normal":
        differences = random.normal(0.2, 1.0, count)
    else:
        differences = random.exponential(1.0, count) - 0.9
    ours = statistics.bootstrap_interval(differences, resamples=20_000, seed=seed)
    theirs = stats.bootstrap(
        (differences,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(seed + 99)
    ).confidence_interval
    # The end of the interval is a tail quantile of 20 000 means: 1 sd of it is about 0.02 of their sd; binary means
    # step by 1/n.
    sd = differences.std() / math.sqrt(count)
    allowed = 0.12 * sd + (1.01 / count if shape == "binary" else 0.0)
    assert ours.low == pytest.approx(theirs.low, abs=allowed)
    assert ours.high == pytest.approx(theirs.high, abs=allowed)


def test_counts_and_gathered_resamples_have_one_distribution(monkeypatch):
    differences = np.array([1.0] * 30 + [0.0] * 60 + [-1.0] * 10)
    counted = statistics.bootstrap_interval(differences, resamples=40_000)
    monkeypatch.setattr(statistics, "MOST_DISTINCT_FOR_COUNTS", 0)
    monkeypatch.setattr(statistics, "RESAMPLED_AT_ONCE", 1_000)
    gathered = statistics.bootstrap_interval(differences, resamples=40_000)
    assert counted.low == pytest.approx(gathered.low, abs=0.011)
    assert counted.high == pytest.approx(gathered.high, abs=0.011)


def test_bootstrap_is_seeded():
    values = np.random.default_rng(3).normal(size=80)
    assert statistics.bootstrap_interval(values) == statistics.bootstrap_interval(values)
    assert statistics.bootstrap_interval(values) != statistics.bootstrap_interval(values, seed=1)


def test_bootstrap_covers_the_true_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    intervals = [statistics.bootstrap_interval(random.normal(0.5, 1.0, 60), resamples=1000) for _ in range(300)]
    covered = sum(interval.low <= 0.5 <= interval.high for interval in intervals)
    assert 270 <= covered <= 296  # 285 expected, sd 3.8


def test_values_without_spread_say_so():
    interval = statistics.bootstrap_interval(np.ones(50))
    assert (interval.low, interval.high) == (1.0, 1.0)
    assert "no spread" in interval.method
    assert statistics.bootstrap_interval(np.ones(1)) is None
    assert statistics.t_interval(np.ones(1)) is None


@pytest.mark.parametrize("seed", range(5))
def test_t_interval_equals_scipy(seed):
    random = np.random.default_rng(seed)
    before = random.normal(size=int(random.integers(2, 300)))
    after = before + random.normal(0.1, 0.5, size=len(before))
    ours = statistics.t_interval(after - before)
    theirs = stats.ttest_rel(after, before).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("degrees", [1, 2, 3, 7.5, 30, 199, 5000])
@pytest.mark.parametrize("level", [0.005, 0.4, 0.5, 0.9, 0.975, 0.9999])
def test_t_quantile_equals_scipy(degrees, level):
    assert statistics.t_quantile(level, degrees) == pytest.approx(stats.t.ppf(level, degrees), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("improved", "worsened"), [(0, 0), (1, 0), (3, 1), (5, 5), (9, 2), (40, 21), (180, 3), (700, 640)]
)
def test_mcnemar_equals_scipy(improved, worsened):
    total = improved + worsened
    expected = stats.binomtest(improved, total, 0.5).pvalue if total else 1.0
    assert statistics.mcnemar_exact(improved, worsened) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("successes", "count"), [(0, 7), (7, 7), (1, 200), (93, 200), (199, 200), (4, 9)])
def test_wilson_equals_scipy(successes, count):
    ours = statistics.wilson_interval(successes, count)
    theirs = stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert statistics.wilson_interval(0, 0) is None


def test_comparison_worked_by_hand():
    before = [("a", 0.0), ("b", 0.0), ("c", 1.0), ("d", None), ("e", 1.0), ("only-before", 1.0), ("nan", math.nan)]
    after = [("e", 0.0), ("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 1.0), ("only-after", 1.0), ("nan", 1.0), ("x", None)]
    found = statistics.compare(before, after)
    assert found.pairs == 4  # a, b, c, e
    assert (found.before_mean, found.after_mean, found.difference) == (0.5, 0.75, 0.25)
    assert (found.improved, found.worsened) == (2, 1)
    assert found.mcnemar_p == pytest.approx(1.0)  # 2 * P(X <= 1 | 3, 1/2) = 2 * 4/8
    assert (found.before_only, found.after_only, found.unscorable) == (1, 2, 2)


def test_pairs_follow_ids_and_not_positions():
    values = np.random.default_rng(1).normal(size=40)
    after = list(rows(values + 1.0))
    np.random.default_rng(2).shuffle(after)
    pairs = statistics.pair(rows(values), [(str(key), float(value)) for key, value in after])
    assert np.allclose(pairs.after - pairs.before, 1.0)


def test_a_repeated_id_is_counted_and_its_last_row_stands():
    found = statistics.compare([("a", 0.0), ("a", 1.0), ("b", 1.0)], [("a", 1.0), ("b", 1.0)])
    assert found.repeated == 1
    assert found.before_mean == 1.0
    assert found.unchanged


def test_nothing_shared_compares_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = statistics.compare([("a", 1.0)], [("b", 1.0)])
    assert found.pairs == 0
    assert found.interval is None
    assert not found.unchanged
    assert found.mcnemar_p is None


def test_scores_that_are_not_binary_have_no_mcnemar():
    assert statistics.compare(rows([0.5, 1.0]), rows([1.0, 1.0])).mcnemar_p is None
