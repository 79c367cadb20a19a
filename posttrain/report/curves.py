"""Inline SVG of the report: curves of training, levels of the evaluated states, the timeline of phases.

Colours come from the page's style sheet by class, so that a figure follows light and dark.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from posttrain.recipe.check import HELD_OUT
from posttrain.report.comparison import MetricRow
from posttrain.report.read import GateRecord, PhaseRecord, number
from posttrain.report.words import amount, duration, plain

WIDTH, HEIGHT = 320, 168
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MOST_POINTS_DRAWN = 600

CURVES = {
    "loss": "loss",
    "gradient_norm": "gradient norm",
    "accuracy": "pair accuracy",
    "margin": "margin",
    "reward": "reward",
    "reward_accuracy": "reward accuracy",
    "zero_spread_groups": "groups without spread",
    "mean_new_tokens": "new tokens per episode",
    "tokens_per_second": "tokens per second",
    "expert_load_max": "busiest expert (even: 1)",
    "dead_experts": "experts without a token",
    "router_entropy": "router entropy, nats",
    f"{HELD_OUT}score": "score on held-out tasks",
}
"""Metrics of a training step that are drawn, in this order; those of held-out data in the panel of their namesake."""


@dataclass(frozen=True)
class Panel:
    title: str
    caption: str
    """What the marks are."""
    svg: Markup


def smoothing_window(count: int) -> int:
    """Steps that the smoothed line averages over: about a twentieth of the phase, odd; 1 is no smoothing."""
    window = count // 20 | 1
    return window if window >= 3 else 1


def smooth(values: Sequence[float] | np.ndarray, window: int) -> list[float]:
    """Centred moving mean; at the ends over the part of the window that exists."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    means: list[float] = ((sums[high] - sums[low]) / (high - low)).tolist()
    return means


def thinned(values: np.ndarray, most: int) -> tuple[list[int], int]:
    """Places of at most so many values, the lowest and the highest of every stretch among them; and its length."""
    if len(values) <= most:
        return list(range(len(values))), 1
    length = -(-2 * len(values) // most)
    whole = np.arange(0, len(values) - length + 1, length)
    stretches = values[: len(whole) * length].reshape(-1, length)
    rest = values[len(whole) * length :]
    places = [whole + stretches.argmin(1), whole + stretches.argmax(1)]
    places += [len(values) - len(rest) + np.array([rest.argmin(), rest.argmax()])] * bool(len(rest))
    return np.unique(np.concatenate(places)).tolist(), length


def phase_curves(phase: PhaseRecord) -> list[Panel]:
    """One panel per metric of the phase's steps that has a number in it."""

    def points(metric: str) -> list[tuple[float, float]]:
        return [(row["step"], value) for row in phase.metrics if (value := number(row.get(metric))) is not None]

    return list(panels(points, phase.gates, len(phase.metrics)).values())


Points = Sequence[tuple[float, float]] | np.ndarray
"""Steps and values: pairs, or an array [N, 2]."""


def panels(points_of: Callable[[str], Points], gates: Sequence[GateRecord], num_steps: int) -> dict[str, Panel]:
    """By metric, of those that have a number in one of the steps."""
    found = {}
    for metric, title in CURVES.items():
        points = points_of(metric)
        if len(points):
            thresholds = [gate.threshold for gate in gates if gate.metric == metric and gate.threshold is not None]
            held_out = points_of(HELD_OUT + metric)
            found[metric] = curve_panel(title, points, thresholds, num_steps - len(points), held_out)
    return found


def curve_panel(title: str, points: Points, thresholds: Sequence[float], missing: int, held_out: Points = ()) -> Panel:
    """Raw values as dots, their moving mean as a line, gate thresholds as dashed lines, held-out data as rings."""
    steps_values = np.asarray(points, np.float64)
    dots, stretch = thinned(steps_values[:, 1], MOST_POINTS_DRAWN)
    window = smoothing_window(len(points))
    line = smooth(steps_values[:, 1], window)
    steps, values = steps_values[:, 0].tolist(), steps_values[:, 1].tolist()
    x = _scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    # A threshold far from the curve would flatten it: such a gate stands in the gates table only.
    drawn = [*values, *(float(value) for _, value in held_out)]
    low, high = min(drawn), max(drawn)
    reach = (high - low) or abs(high) or 1.0
    shown = [value for value in thresholds if low - reach / 2 <= value <= high + reach / 2]
    ticks = nice_ticks(min([low, *shown]), max([high, *shown]))
    y = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    # A dot that no line leads to has to be seen by itself.
    dot = 'r="1.6" class="raw"' if len(points) > 1 else 'r="3.6" class="level"'
    marks = [f'<circle cx="{x(steps[at]):.1f}" cy="{y(values[at]):.1f}" {dot}/>' for at in dots]
    marks += [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}" class="threshold"/>' for v in shown
    ]
    if len(points) > 1:
        places = sorted({*range(0, len(points), math.ceil(len(points) / MOST_POINTS_DRAWN)), len(points) - 1})
        path = "M" + "L".join(f"{x(steps[at]):.1f} {y(line[at]):.1f}" for at in places)
        marks.append(f'<path d="{path}" class="smooth"/>')
    if len(held_out):
        joined = "M" + "L".join(f"{x(s):.1f} {y(v):.1f}" for s, v in held_out)
        marks.append(f'<path d="{joined}" class="held"/>')
        marks += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3" class="held"/>' for s, v in held_out]
    told = f"{title}: {plain(values[0])} at step {plain(steps[0])}, {plain(values[-1])} at step {plain(steps[-1])}"
    labels = [(x(steps[-1]), f"step {plain(steps[-1])}", "end" if len(points) > 1 else "middle")]
    if len(points) > 1:
        labels.insert(0, (x(steps[0]), plain(steps[0]), "start"))
    caption = f"dots: {'raw' if stretch == 1 else f'lowest and highest of every {stretch} raw values'}"
    caption += f"; line: mean of {window} steps" if window > 1 else "; line: joins them" if len(points) > 1 else ""
    caption += "; rings: held-out data" if len(held_out) else ""
    caption += "; dashed: gate" if shown else ""
    caption += f"; {missing} step{'s' if missing > 1 else ''} without a number" if missing else ""
    return Panel(title, caption, _svg(told, _grid(ticks, y) + "".join(marks) + _labels(labels)))


def level_panel(row: MetricRow) -> Panel | None:
    """The metric's level in each evaluated state, with the 95 % interval of each level."""
    cells = [cell for cell in row.cells if cell.mean is not None]
    if len(cells) < 2:
        return None
    ends = [
        v for c in cells for v in (c.mean, *((c.interval.low, c.interval.high) if c.interval else ())) if v is not None
    ]
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0] if row.share else nice_ticks(min(ends), max(ends))
    y = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    x = _scale(0, len(cells) - 1, LEFT + 14, WIDTH - RIGHT - 14)
    marks = ""
    path = "M" + "L".join(f"{x(at):.1f} {y(cell.mean or 0.0):.1f}" for at, cell in enumerate(cells))
    marks += f'<path d="{path}" class="join"/>'
    labels = []
    for at, cell in enumerate(cells):
        level = cell.mean or 0.0
        if cell.interval:
            marks += (
                f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{y(cell.interval.low):.1f}" '
                f'y2="{y(cell.interval.high):.1f}" class="whisker"/>'
            )
        told = escape(f"{cell.evaluation.model}: {amount(level, row.share)}")
        marks += f'<circle cx="{x(at):.1f}" cy="{y(level):.1f}" r="3.6" class="level"><title>{told}</title></circle>'
        anchor = "start" if at == 0 else "end" if at == len(cells) - 1 else "middle"
        place = LEFT if at == 0 else WIDTH - RIGHT if at == len(cells) - 1 else x(at)
        if at in (0, len(cells) - 1) or len(cells) <= 4:
            labels.append((place, cell.evaluation.model, anchor))
    levels = ", ".join(f"{cell.evaluation.model} {amount(cell.mean, row.share)}" for cell in cells)
    figure = _grid(ticks, y, row.share) + marks + _labels(labels)
    return Panel(row.part, "", _svg(f"{row.dataset} {row.part}: {levels}", figure))


def change_bar(before: float, after: float, low: float, high: float) -> Markup:
    """A share before and after on a track of 0 to 100 %; the band is the difference's interval laid at `before`."""

    def at(share: float) -> float:
        return 4 + 292 * min(max(share, 0.0), 1.0)

    kind = "up" if low > 0 else "down" if high < 0 else "even"
    band_low, band_high = at(before + low), at(before + high)
    told = f"{amount(before, True)} before, {amount(after, True)} after"
    return Markup(
        f'<svg viewBox="0 0 300 16" preserveAspectRatio="xMinYMid" class="change {kind}" role="img" '
        f'aria-label="{escape(told)}">'
        '<line x1="4" x2="296" y1="8" y2="8" class="track"/>'
        f'<rect x="{band_low:.1f}" width="{max(band_high - band_low, 1):.1f}" y="3" height="10" rx="3" class="band"/>'
        f'<line x1="{at(before):.1f}" x2="{at(after):.1f}" y1="8" y2="8" class="move"/>'
        f'<circle cx="{at(before):.1f}" cy="8" r="3.5" class="was"/>'
        f'<circle cx="{at(after):.1f}" cy="8" r="4" class="is"/></svg>'
    )


@dataclass(frozen=True)
class Bar:
    """A phase's place on the timeline, in per cent of the run's width; none where it has no times."""

    left: float
    width: float


def timeline(phases: Sequence[PhaseRecord]) -> list[Bar | None]:
    """Phases in time order without the idle time between attempts: each bar starts where the one before ends."""
    total = sum(phase.seconds or 0.0 for phase in phases)
    bars: list[Bar | None] = []
    done = 0.0
    for phase in phases:
        if phase.seconds is None or total <= 0:
            bars.append(None)
            continue
        bars.append(Bar(100 * done / total, 100 * phase.seconds / total))
        done += phase.seconds
    return bars


def timeline_bar(phase: PhaseRecord, bar: Bar | None) -> Markup:
    """One row of the timeline."""
    if bar is None:
        return Markup('<svg viewBox="0 0 100 6" preserveAspectRatio="none" class="bar"></svg>')
    width = max(bar.width, 0.6)
    left = min(bar.left, 100 - width)
    return Markup(
        f'<svg viewBox="0 0 100 6" preserveAspectRatio="none" class="bar" role="img" '
        f'aria-label="{escape(phase.name)}: {escape(duration(phase.seconds))}">'
        f'<rect x="0" width="100" y="2.5" height="1" class="track"/>'
        f'<rect x="{left:.2f}" width="{width:.2f}" y="0" height="6" class="kind-{escape(phase.kind)}"/></svg>'
    )


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that enclose [low, high]."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        spread = abs(low) / 2 or 0.5
        low, high = low - spread, high + spread
    rough = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """With as many digits as tell neighbours apart."""
    for digits in range(4, 12):
        texts = [plain(float(f"{tick:.12g}"), digits) for tick in ticks]
        if len({*texts}) == len(texts):
            break
    return texts


class _scale:
    """Linear map of a value range to pixels; a range of length 0 falls on its middle."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        if self.high == self.low:
            return (self.start + self.end) / 2
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _grid(ticks: Sequence[float], y: "_scale", share: bool = False) -> str:
    lines = ""
    texts = [f"{100 * tick:.0f} %" for tick in ticks] if share else tick_texts(ticks)
    for tick, text in zip(ticks, texts, strict=True):
        lines += f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" class="grid"/>'
        lines += f'<text x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{escape(text)}</text>'
    return lines


def _labels(labels: Sequence[tuple[float, str, str]]) -> str:
    return "".join(
        f'<text x="{place:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{escape(text)}</text>'
        for place, text, anchor in labels
    )


def _svg(told: str, inside: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="panel" role="img" aria-label="{escape(told)}">{inside}</svg>'
    )
