"""An action is read from the final message, and a table says what it is worth."""

import math

import pytest

from posttrain.chat.conversation import Message
from posttrain.scoring.boltzmann import boltzmann
from posttrain.scoring.decisions import named_action, score_decision
from posttrain.worlds.registry import start

TABLE = {"q_values": [1.0, 3.0, 2.5], "rewards": [0.1, 0.6, 0.3]}


def test_boltzmann_by_hand() -> None:
    # e^0 : e^-1 : e^-3, over their sum 1 + 0.367879 + 0.049787 = 1.417666
    assert boltzmann([-1.0, -1.5, -2.5], tau=0.5) == pytest.approx([0.705385, 0.259496, 0.035119], abs=1e-6)
    assert boltzmann([7.0, 7.0], tau=0.05) == [0.5, 0.5]
    assert boltzmann([0.0, -1000.0], tau=0.05) == [1.0, 0.0]
    assert math.fsum(boltzmann([0.3, -4.0, 2.0, 9.5, 9.4], tau=0.05)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "action"),
    [("[2]", 2), ("first [0], no: [1].", 1), ("[12]", 12), ("", None), ("2", None), ("[-1]", None), ("[a]", None)],
)
def test_the_last_action_in_brackets_counts(text: str, action: int | None) -> None:
    assert named_action(text) == action


def test_every_part_by_hand() -> None:
    score = score_decision(TABLE, "So [2]")
    assert score.value == 0.3 and score.answer == "2"
    assert score.parts == {"reward": 0.3, "optimal": 0.0, "q_value": 2.5, "regret": 0.5}
    assert score_decision(TABLE, "[1]").parts == {"reward": 0.6, "optimal": 1.0, "q_value": 3.0, "regret": 0.0}
    assert score_decision({"rewards": [0.4, 0.6]}, "[0]").parts == {"reward": 0.4, "optimal": 0.0}


@pytest.mark.parametrize("text", ["", "two", "[3]", "[99999999999999999999999999]", "[" + "9" * 10_000 + "]"])
def test_what_names_no_action_of_the_table_is_unscorable_and_not_zero(text: str) -> None:
    score = score_decision(TABLE, text)
    assert score.value is None and score.reason and score.answer is None and score.parts == {}


def test_equal_values_are_all_optimal() -> None:
    tied = {"q_values": [2.0, 2.0, 1.0], "rewards": [0.4, 0.4, 0.2]}
    assert [score_decision(tied, f"[{n}]").parts["optimal"] for n in range(3)] == [1.0, 1.0, 0.0]


def test_thoughts_are_not_read() -> None:
    row = {"world": "decisions", "reference": TABLE}
    environment = start(row)
    assert environment.respond([Message(role="assistant", channel="analysis", content="[1] is best")]) == []
    assert environment.score().value is None
    environment.respond([Message(role="assistant", channel="final", content="[0]")])
    assert environment.score().value == 0.1
