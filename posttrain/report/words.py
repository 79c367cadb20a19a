"""Numbers as the report says them. A share is shown in per cent, a difference of shares in points."""

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the terminal's summary says numbers without loading numpy
    from posttrain.report.statistics import Comparison, Interval

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
"""Stands where a number would, if there were one."""


def plain(value: float | None, digits: int = 4) -> str:
    """So many significant digits, without exponents where they can be avoided."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}".replace("-", MINUS)
    return f"{value:,.{digits}g}".replace("-", MINUS) if abs(value) < 1e4 else f"{value:,.0f}".replace("-", MINUS)


def amount(value: float | None, share: bool) -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{100 * value:.1f} %" if share else f"{value:.3f}".replace("-", MINUS)


def signed(value: float, share: bool) -> str:
    """A difference without its unit; a rounded zero has no sign."""
    text = f"{100 * value:+.1f}" if share else f"{value:+.3f}"
    return text.replace("-", MINUS) if float(text) else text[1:]


def gain(value: float, share: bool) -> str:
    return signed(value, share) + (" points" if share else "")


def span(interval: "Interval | None", share: bool) -> str:
    """A difference's interval, as short as it can be."""
    if interval is None:
        return "no interval"
    return f"{signed(interval.low, share)} to {signed(interval.high, share)}"


def level_span(interval: "Interval | None", share: bool) -> str:
    """A level's interval."""
    if interval is None:
        return "no interval"
    if share:
        return f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %"
    return f"{amount(interval.low, share)} to {amount(interval.high, share)}"


def verdict(found: "Comparison") -> str:
    """One of: better, worse, no clear change, unchanged, nothing to compare.

    A bootstrap over a handful of changed cases is too sure of itself: for scores of 0 and 1 the exact test must agree.
    """
    if found.pairs == 0:
        return "nothing to compare"
    if found.unchanged:
        return "unchanged"
    if found.interval is None or overruled(found):
        return "no clear change"
    return "better" if found.interval.above_zero else "worse" if found.interval.below_zero else "no clear change"


def overruled(found: "Comparison") -> bool:
    """The interval leaves out 0, but the exact McNemar test finds too few changed cases to say so."""
    clear = found.interval is not None and (found.interval.above_zero or found.interval.below_zero)
    return clear and found.mcnemar_p is not None and found.mcnemar_p > 0.05


def sentence(found: "Comparison", share: bool) -> str:
    """The comparison in one sentence."""
    match verdict(found):
        case "nothing to compare":
            return "No case was scored on both sides."
        case "unchanged":
            return f"Nothing changed: all {found.pairs:,} cases score the same."
        case word:
            reading = "the interval includes 0" if found.interval else "one case has no interval"
            if overruled(found):
                reading = (
                    f"only {found.improved + found.worsened} cases changed (exact McNemar p = {found.mcnemar_p:.2f})"
                )
            elif word != "no clear change":
                reading = f"the whole interval is {'above' if word == 'better' else 'below'} 0"
            cases = f"{found.pairs:,} paired case" + ("s" if found.pairs != 1 else "")
            bounds = f" (95 % interval {span(found.interval, share)})" if found.interval else ""
            return f"{gain(found.difference, share)}{bounds} on {cases}: {word}, {reading}."


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def moment(unix_seconds: float | None) -> str:
    if unix_seconds is None:
        return NOTHING
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return NOTHING
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def short(digest: str | None) -> str:
    """The first twelve digits of a digest."""
    return digest.removeprefix("sha256:")[:12] if digest else NOTHING


def probability(value: float) -> str:
    return "p < 0.0001" if value < 0.0001 else f"p = {value:.4f}"


def bound(comparison: str, threshold: float | None) -> str:
    """What a gate demands, as it is written by hand."""
    return f"{comparison.replace('<=', '≤').replace('>=', '≥')} {plain(threshold)}"
