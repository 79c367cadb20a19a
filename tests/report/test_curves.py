"""Curves: the smoothing by hand, ticks that enclose the data, points where the numbers say."""

import itertools
import math
import re

import numpy as np
import pytest

from posttrain.report import curves
from posttrain.report.read import read_run
from tests.report.runs import FakeRun, gate, phase


def test_the_moving_mean_is_centred_and_shrinks_at_the_ends():
    assert curves.smooth([1.0, 2.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
    assert curves.smooth([1.0, 2.0, 6.0], 1) == [1.0, 2.0, 6.0]


def test_the_window_is_odd_and_about_a_twentieth():
    assert [curves.smoothing_window(count) for count in (1, 10, 40, 60, 320)] == [1, 1, 3, 3, 17]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.0, 0.0), (-3.2, 17), (0.251, 0.252), (1e-9, 3e-9), (5e6, 7e7), (-2, -2), (0.6, 1.0)]
)
def test_ticks_are_even_and_enclose_the_range(low, high):
    ticks = curves.nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9 * abs(low) and ticks[-1] >= high - 1e-9 * abs(high)
    assert 2 <= len(ticks) <= 8
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps))


def test_a_panel_places_points_by_their_values(tmp_path):
    made = FakeRun(tmp_path / "run", [phase("sft", "sft", [gate("low", "loss", "<=", 2.0)], model="base", dataset="d")])
    made.steps("sft", [{"step": step, "loss": loss} for step, loss in ((1, 0.0), (2, 4.0), (3, 1.0))])
    made.steps("sft", [{"step": 4, "loss": None}])
    (sft,) = read_run(made.run).phases
    (panel,) = curves.phase_curves(sft)
    x = re.findall(r'<circle cx="([\d.]+)"', panel.svg)
    y = [float(value) for value in re.findall(r'cy="([\d.]+)"', panel.svg)]
    assert [float(value) for value in x] == [curves.LEFT, (curves.LEFT + curves.WIDTH - curves.RIGHT) / 2, 310.0]
    bottom, top = curves.HEIGHT - curves.BOTTOM, curves.TOP
    assert y == pytest.approx([bottom, top, bottom - (bottom - top) / 4], abs=0.06)
    assert f'y1="{(bottom + top) / 2:.1f}" y2="{(bottom + top) / 2:.1f}" class="threshold"' in panel.svg
    assert panel.caption == "dots: raw; line: joins them; dashed: gate; 1 step without a number"


def test_a_far_threshold_does_not_flatten_the_curve():
    panel = curves.curve_panel("loss", [(1, 0.5), (2, 0.4)], [100.0], missing=0)
    assert "threshold" not in panel.svg and "gate" not in panel.caption


@pytest.mark.parametrize("points", [[(1, 2.0)], [(1, 2.0), (2, 2.0)], [(5, 0.0), (6, 0.0)]])
def test_one_point_and_constant_curves_are_drawn(points):
    panel = curves.curve_panel("loss", points, [], missing=0)
    assert "nan" not in panel.svg and panel.svg.count("<circle") == len(points)
    under = re.findall(r">([^<>]*)</text>", panel.svg)[-2:]
    first, last = points[0][0], points[-1][0]
    assert under[1] == f"step {last}" and (under[0] == str(first)) == (len(points) > 1)


def test_long_curves_are_thinned_and_say_so():
    panel = curves.curve_panel("loss", [(step, math.sin(step)) for step in range(1, 5001)], [], missing=0)
    assert panel.svg.count("<circle") <= curves.MOST_POINTS_DRAWN
    assert panel.caption.startswith("dots: lowest and highest of every 17 raw values; line: mean of 251 steps")


def test_a_spike_in_a_long_curve_is_kept():
    values = np.sin(np.arange(100_003) / 500)
    values[31_415], values[100_002] = 40.0, -40.0
    places, length = curves.thinned(values, 600)
    assert {31_415, 100_002} <= {*places} and len(places) <= 600 and length == 334
    assert curves.thinned(values[:600], 600) == (list(range(600)), 1)


def test_bars_follow_each_other_without_the_idle_time(tmp_path):
    made = FakeRun(tmp_path / "run", [phase("merge", name, model="base") for name in ("a", "b", "c")])
    made.complete("a", 30.0)
    made.clock += 9999
    made.complete("b", 10.0)
    first, second, third = curves.timeline(read_run(made.run).phases)
    assert (first.left, first.width, second.left, second.width, third) == (0, 75, 75, 25, None)


def test_ticks_of_a_narrow_range_are_told_apart() -> None:
    assert curves.tick_texts(curves.nice_ticks(1.2951, 1.2953)) == ["1.2951", "1.29515", "1.2952", "1.29525", "1.2953"]
    assert curves.tick_texts(curves.nice_ticks(0.0, 1.0)) == ["0", "0.25", "0.5", "0.75", "1"]
