"""Judges gates from raw values: never from an average that something else computed, never from too few steps."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.recipe.check import HELD_OUT
from posttrain.recipe.spelling import did_you_mean
from posttrain.recipe.types import Gate

COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}

Row = Mapping[str, Any]


def judge(gate: Gate, metrics: Mapping[str, float | None], rows: Sequence[Row]) -> dict[str, Any]:
    """The verdict on one gate: `{"gate", "value", "passed", "reason"}`, as stored in the result.

    metrics: the result's own; rows: the raw lines of `metrics.jsonl`, where a later line replaces an earlier one of
    the same step.
    """
    value, fault = _by_value(gate, metrics) if gate.reduction == "value" else _by_steps(gate, rows)
    if fault is not None or value is None:
        return _verdict(gate, None, False, fault or "no value")
    passed = COMPARE[gate.comparison](value, gate.threshold)
    reason = f"{gate.metric} is {value:.6g}, must be {gate.comparison} {gate.threshold:g}"
    return _verdict(gate, value, passed, reason)


def _verdict(gate: Gate, value: float | None, passed: bool, reason: str) -> dict[str, Any]:
    return {"gate": gate.model_dump(mode="json"), "value": value, "passed": passed, "reason": reason}


def _by_value(gate: Gate, metrics: Mapping[str, float | None]) -> tuple[float | None, str | None]:
    if gate.metric not in metrics:
        return None, f"the result has no metric {gate.metric!r}{did_you_mean(gate.metric, metrics)}"
    value = metrics[gate.metric]
    if value is None or not math.isfinite(value):
        return None, f"{gate.metric} is not finite"
    return float(value), None


def _by_steps(gate: Gate, rows: Sequence[Row]) -> tuple[float | None, str | None]:
    sparse = gate.metric.startswith(HELD_OUT)
    rows = [row for row in rows if "step" in row and (gate.metric in row or not sparse)]
    by_step: dict[int, Any] = {row["step"]: row.get(gate.metric) for row in rows}
    values = [by_step[step] for step in sorted(by_step)]
    if len(values) < max(gate.minimum_steps, 1):
        return None, f"{len(values)} steps were recorded, the gate needs {max(gate.minimum_steps, 1)}"
    bad = [step for step, value in sorted(by_step.items()) if not _is_finite(value)]
    if bad:
        return None, f"{gate.metric} is missing or not finite at step {bad[0]}"
    match gate.reduction:
        case "last":
            return values[-1], None
        case "mean_last":
            window = values[-gate.window :]
            return math.fsum(window) / len(window), None
        case "max":
            return max(values), None
        case "min":
            return min(values), None
    raise AssertionError(gate.reduction)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def failed(verdicts: Sequence[Mapping[str, Any]], hard: bool) -> list[Mapping[str, Any]]:
    """The verdicts of hard (or of soft) gates that did not pass."""
    return [verdict for verdict in verdicts if not verdict["passed"] and verdict["gate"]["hard"] is hard]
