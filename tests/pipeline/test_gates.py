"""Gates judged from rows written by hand."""

import math
from typing import Any

import pytest

from posttrain.pipeline.gates import judge
from posttrain.recipe.types import Gate


def gate(**fields: Any) -> Gate:
    defaults: dict[str, Any] = dict(
        name="g", metric="loss", reduction="last", window=2, comparison="<=", threshold=1.0, minimum_steps=0, hard=True
    )
    return Gate(**(defaults | fields))


def rows(*losses: Any) -> list[dict[str, Any]]:
    return [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]


@pytest.mark.parametrize(("reduction", "value"), [("last", 2.0), ("mean_last", 1.5), ("max", 4.0), ("min", 1.0)])
def test_reductions(reduction: str, value: float) -> None:
    assert judge(gate(reduction=reduction), {}, rows(4.0, 1.0, 2.0))["value"] == value


@pytest.mark.parametrize(("comparison", "passes"), [("<=", True), (">=", True), ("<", False), (">", False)])
def test_comparison_at_the_threshold(comparison: str, passes: bool) -> None:
    assert judge(gate(comparison=comparison), {}, rows(1.0))["passed"] is passes


def test_too_few_steps_fail_however_good_they_are() -> None:
    verdict = judge(gate(minimum_steps=3), {}, rows(0.1, 0.1))
    assert not verdict["passed"] and verdict["reason"] == "2 steps were recorded, the gate needs 3"
    assert not judge(gate(), {}, [])["passed"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "low"])
def test_a_value_that_is_not_finite_fails_even_outside_the_window(bad: Any) -> None:
    verdict = judge(gate(), {}, rows(0.1, bad, 0.1))
    assert not verdict["passed"] and "step 2" in verdict["reason"]


def test_a_step_recorded_twice_counts_once_with_its_last_value() -> None:
    verdict = judge(gate(reduction="mean_last"), {}, [*rows(5.0, 5.0), *rows(1.0, 0.0)])
    assert verdict["value"] == 0.5


def test_values_of_the_result() -> None:
    by_value = gate(reduction="value", metric="held.exact", comparison=">=", threshold=0.85)
    assert judge(by_value, {"held.exact": 0.85}, [])["passed"]
    assert not judge(by_value, {"held.exact": None}, [])["passed"]
    assert "did you mean held.exactly?" in judge(by_value, {"held.exactly": 1.0}, [])["reason"]


def test_a_held_out_metric_is_judged_where_it_was_computed() -> None:
    measured = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "held_out_loss": 2.5}, {"step": 3, "loss": 1.0}]
    verdict = judge(gate(metric="held_out_loss", threshold=2.6, minimum_steps=1), {}, measured)
    assert verdict["value"] == 2.5 and verdict["passed"]
    too_few = judge(gate(metric="held_out_loss", minimum_steps=2), {}, measured)
    assert not too_few["passed"] and "1 steps were recorded" in too_few["reason"]
    assert "missing" in judge(gate(metric="margin"), {}, measured)["reason"]
