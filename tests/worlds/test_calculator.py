"""The calculator's arithmetic, what it refuses, and what an episode with it earns."""

from fractions import Fraction

import pytest

from posttrain.chat.conversation import Message, call
from posttrain.worlds.calculator import shown, value
from posttrain.worlds.registry import rows, start


@pytest.mark.parametrize(
    ("expression", "number"),
    [("2 + 3 * 4", 14), ("(2 + 3) * 4", 20), ("-7 + 2", -5), ("1 / 3", Fraction(1, 3)), ("0.1 + 0.2", Fraction(3, 10))],
)
def test_values_are_exact(expression: str, number: int | Fraction) -> None:
    assert value(expression) == number


@pytest.mark.parametrize(
    "expression",
    [
        "", "2 +", "2 ** 9", "9 // 2", "x", "f(1)", "__import__('os')", "'a' * 9", "True", "1j", "1e999", "1 / 0",
        "1 / (2 - 2)", "(" * 150 + "1", "1 + " * 60 + "1", "*".join(["9" * 20] * 9), "[1][0]", "1 if 1 else 2", "\0",
    ],
)  # fmt: skip
def test_what_is_no_arithmetic_is_refused_with_a_reason(expression: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        value(expression)


def test_numbers_as_they_are_shown() -> None:
    shown_as = {Fraction(12): "12", Fraction(-1, 2): "-0.5", Fraction(1, 3): "0.333333", Fraction(200): "200"}
    assert {number: shown(number) for number in shown_as} == shown_as


def test_the_solution_earns_every_part_and_is_what_the_tool_says() -> None:
    for row in rows("calculator", "tasks", "heldout", 200, 1):
        environment, solution = start(row), [Message(**message) for message in row["solution"]]
        assert environment.respond(solution[:2]) == [solution[2]]
        assert environment.respond(solution[3:]) == []
        assert environment.score().parts == {"exact": 1.0, "format": 1.0, "used": 1.0}


def test_a_faulty_call_is_an_observation_and_costs_the_format() -> None:
    row = next(rows("calculator", "tasks", "train", 1, 0))
    environment = start(row)
    for made, reply in (
        (call("calculate", {"expression": "1 / 0"}), "error: division by zero"),
        (call("calculate", {"formula": "1"}), "error: give expression"),
        (call("other", {"expression": "1"}), "error: no such tool"),
        (Message(role="assistant", channel="commentary", recipient="functions.calculate", content="{"), "error: give"),
    ):
        assert environment.respond([made])[0].content.startswith(reply)
    environment.respond([Message(role="assistant", channel="final", content=f"It is {row['reference']['answer']}.")])
    assert environment.score().parts == {"exact": 1.0, "format": 0.0, "used": 0.0}


def test_the_value_does_not_stand_in_the_prompt() -> None:
    for row in rows("calculator", "tasks", "train", 300, 0):
        assert shown(Fraction(row["reference"]["answer"])) not in row["prompt"]["messages"][0]["content"].split()
