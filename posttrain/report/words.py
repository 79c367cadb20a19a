"""Numbers as the report says them. A share is shown in per cent, a difference of shares in points."""

import math
from datetime import UTC, datetime

from posttrain.report.statistics import Comparison, Interval

MINUS = "\N{MINUS SIGN}"


def plain(value: float | None) -> str:
    """Four significant digits, without exponents where they can be avoided."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}".replace("-", MINUS)
    return f"{value:,.4g}".replace("-", MINUS) if abs(value) < 1e4 else f"{value:,.0f}".replace("-", MINUS)


def amount(value: float | None, share: bool) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if share else f"{value:.3f}".replace("-", MINUS)


def signed(value: float, share: bool) -> str:
    """A difference without its unit; a rounded zero has no sign."""
    text = f"{100 * value:+.1f}" if share else f"{value:+.3f}"
    return text.replace("-", MINUS) if float(text) else text[1:]


def gain(value: float, share: bool) -> str:
    return signed(value, share) + (" points" if share else "")


def span(interval: Interval | None, share: bool) -> str:
    """A difference's interval, as short as it can be."""
    if interval is None:
        return "no interval"
    return f"{signed(interval.low, share)} to {signed(interval.high, share)}"


def level_span(interval: Interval | None, share: bool) -> str:
    """A level's interval."""
    if interval is None:
        return "no interval"
    if share:
        return f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %"
    return f"{amount(interval.low, share)} to {amount(interval.high, share)}"


def verdict(found: Comparison) -> str:
    """One of: better, worse, no clear change, unchanged, nothing to compare."""
    if found.pairs == 0:
        return "nothing to compare"
    if found.unchanged:
        return "unchanged"
    if found.interval is None:
        return "no clear change"
    return "better" if found.interval.above_zero else "worse" if found.interval.below_zero else "no clear change"


def sentence(found: Comparison, share: bool) -> str:
    """The comparison in one sentence."""
    match verdict(found):
        case "nothing to compare":
            return "No case was scored on both sides."
        case "unchanged":
            return f"Nothing changed: all {found.pairs:,} cases score the same."
        case word:
            reading = {
                "better": "the whole interval is above 0",
                "worse": "the whole interval is below 0",
                "no clear change": "the interval includes 0" if found.interval else "one case has no interval",
            }[word]
            cases = f"{found.pairs:,} paired case" + ("s" if found.pairs != 1 else "")
            bounds = f" (95 % interval {span(found.interval, share)})" if found.interval else ""
            return f"{gain(found.difference, share)}{bounds} on {cases}: {word}, {reading}."


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
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
        return "–"
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return "–"
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def short(digest: str | None) -> str:
    """The first twelve digits of a digest."""
    return digest.removeprefix("sha256:")[:12] if digest else "–"


def probability(value: float) -> str:
    return "p < 0.0001" if value < 0.0001 else f"p = {value:.4f}"
