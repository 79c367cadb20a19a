"""What a training phase's steps say: what they cost, and whether the phase began to learn its rows by heart."""

from dataclasses import dataclass

from posttrain.recipe.check import HELD_OUT
from posttrain.report import words
from posttrain.report.read import PhaseRecord, Row, number

NOTABLE_RISE = 0.01
"""Of the held-out loss, as a share of its lowest value; less may be chance."""
LATER_LOOKS = 2
"""Looks after the lowest one that must all be above it."""


@dataclass(frozen=True)
class Overfitting:
    step: int
    """Of the last look at the held-out loss."""
    what: str


def overfitting(phase: PhaseRecord) -> Overfitting | None:
    """A held-out loss that rises while the training loss falls; none where there is too little to say so."""
    held = ((int(row["step"]), number(row.get(f"{HELD_OUT}loss"))) for row in phase.metrics)
    looks = [(step, loss) for step, loss in held if loss is not None]
    best = min(range(len(looks)), key=lambda place: looks[place][1], default=0)
    if len(looks) - 1 - best < LATER_LOOKS:
        return None
    (low_step, low), (step, last) = looks[best], looks[-1]
    then = _training_loss(phase.metrics, looks[best - 1][0] if best else 0, low_step)
    now = _training_loss(phase.metrics, looks[-2][0], step)
    if then is None or now is None or now >= then or last < low + NOTABLE_RISE * abs(low):
        return None
    return Overfitting(
        step,
        f"early warning: the held-out loss rose from {words.plain(low)} (step {low_step}) to {words.plain(last)} "
        f"(step {step}) while the training loss fell from {words.plain(then)} to {words.plain(now)}: the phase learns "
        f"its rows by heart. Fewer steps or more rows would help",
    )


def _training_loss(rows: tuple[Row, ...], after: int, up_to: int) -> float | None:
    """Mean over the steps between two looks."""
    losses = [loss for row in rows if after < row["step"] <= up_to and (loss := number(row.get("loss"))) is not None]
    return sum(losses) / len(losses) if losses else None


def cost(phase: PhaseRecord) -> str:
    """Speed and memory of the steps in words; empty where no step recorded any."""
    rows = [row for row in phase.metrics if number(row.get("seconds"))]
    seconds = sum(row["seconds"] for row in rows)
    told = []
    if seconds and all(number(row.get("tokens")) is not None for row in rows):
        told.append(f"{words.plain(round(sum(row['tokens'] for row in rows) / seconds))} tokens/s")
    if rows and all(number(row.get("peak_flops_share")) is not None for row in rows):
        share = sum(row["peak_flops_share"] * row["seconds"] for row in rows) / seconds
        told.append(f"{words.amount(share, True)} of peak FLOP/s")
    if peaks := [peak for row in rows if (peak := number(row.get("peak_memory_bytes"))) is not None]:
        told.append(f"{words.size(max(peaks))} of memory at most")
    return ", ".join(told)
