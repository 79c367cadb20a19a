"""The worlds of nanochat's mixture, and the environments of questions and decisions."""

import json
import re
from typing import Any

import pytest

from posttrain.chat.conversation import Conversation, Message
from posttrain.scoring.boltzmann import boltzmann
from posttrain.scoring.numbers import marked_number
from posttrain.scoring.score import Score
from posttrain.worlds.identity import THEMES
from posttrain.worlds.registry import rows, start
from posttrain.worlds.spelling import HELDOUT


def talks(world: str, split: Any, count: int) -> list[Conversation]:
    return [Conversation.model_validate(row["conversation"]) for row in rows(world, "conversations", split, count, 3)]


def test_identity_has_the_mixtures_thousand_with_few_repeats() -> None:
    made = talks("identity", "train", 1000)
    assert len({talk.model_dump_json() for talk in made}) > 900
    assert all(talk.messages[-1].channel == "final" for talk in made)
    for theme in THEMES:
        assert not set(theme.questions) & set(theme.heldout_questions)
    asked = {message.content for talk in talks("identity", "heldout", 200) for message in talk.messages}
    assert not any(question in text for text in asked for theme in THEMES for question in theme.questions)


def test_spelling_is_right_and_its_heldout_words_are_its_own() -> None:
    for row in rows("spelling", "tasks", "train", 600, 3):
        asked = row["prompt"]["messages"][0]["content"]
        assert not HELDOUT & set(re.findall(r"[a-z]+", asked))
        environment = start(row)
        environment.respond([Message(**message) for message in row["solution"]])
        assert environment.score().value == 1.0
    assert len({json.dumps(row["prompt"]) for row in rows("spelling", "tasks", "train", 600, 3)}) > 500


@pytest.mark.parametrize(
    ("asked", "right"),
    [("Count the letter s in {}.", "count"), ("Write {} backwards.", "reverse"), ("Spell the word {}.", "spell")],
)
def test_spelling_by_hand(asked: str, right: str) -> None:
    wanted = {"count": lambda w: str(w.count("s")), "reverse": lambda w: w[::-1], "spell": "-".join}[right]
    seen = 0
    before, after = asked.split("{}")
    for row in rows("spelling", "tasks", "train", 3000, 1):
        text = row["prompt"]["messages"][0]["content"]
        if text.startswith(before) and text.endswith(after):
            assert row["reference"]["answer"] == wanted(text[len(before) : -len(after)])
            seen += 1
    assert seen > 3


def scored(world: str, reference: dict[str, Any], *said: Message) -> Score:
    environment = start({"world": world, "reference": reference})
    assert environment.respond(list(said)) == []
    return environment.score()


def final(text: str) -> Message:
    return Message(role="assistant", channel="final", content=text)


NUMBER = {"kind": "number", "answer": 1200.0, "tolerance": 0.01}
CHOICE = {"kind": "choice", "answer": "B", "choices": ["A", "B"]}


@pytest.mark.parametrize(
    ("reference", "said", "value", "formed"),
    [
        (NUMBER, "12 * 100\n#### 1,200", 1.0, 1.0),
        (NUMBER, "#### 1200.009", 1.0, 1.0),
        (NUMBER, "#### 1200.02", 0.0, 1.0),
        (NUMBER, "#### 7 or rather #### $1200", 1.0, 1.0),
        (NUMBER, "It is 1200.", 0.0, 0.0),
        (CHOICE, "B", 1.0, 1.0),
        (CHOICE, "(B).", 1.0, 1.0),
        (CHOICE, "A", 0.0, 1.0),
        (CHOICE, "It is B", 0.0, 0.0),
        ({"kind": "exact", "answer": "Green."}, " Green.\n", 1.0, 1.0),
        ({"kind": "exact", "answer": "Green."}, "Green", 0.0, 1.0),
    ],
)
def test_answers_are_compared_as_their_kind_says(
    reference: dict[str, Any], said: str, value: float, formed: float
) -> None:
    score = scored("answers", reference, final(said))
    assert (score.value, score.parts["format"]) == (value, formed)


def test_the_analysis_is_not_read() -> None:
    thought = Message(role="assistant", channel="analysis", content="#### 1200 [1] B")
    assert scored("answers", NUMBER, thought, final("No idea")).value == 0.0
    assert scored("decisions", {"rewards": [0.1, 0.9]}, thought, final("No idea")).value is None


@pytest.mark.parametrize(
    ("said", "value", "reason"),
    [
        ("I take [1].", 0.9, None),
        ("Not [1] but [0]", 0.1, None),
        ("[2]", None, "action 2 of 2"),
        ("one", None, "no action such as [0] in the final message"),
    ],
)
def test_a_decision_is_worth_its_reward_or_is_unscorable(said: str, value: float | None, reason: str | None) -> None:
    score = scored("decisions", {"rewards": [0.1, 0.9]}, final(said))
    assert (score.value, score.reason) == (value, reason)


def test_boltzmann_by_hand() -> None:
    assert boltzmann([1.0, 1.0], 0.05) == [0.5, 0.5]
    # ln 3 apart at temperature 1: one to three.
    assert boltzmann([0.0, 1.0986122886681098], 1.0) == pytest.approx([0.25, 0.75])
    assert boltzmann([-1e6, 1e6], 0.05) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [("#### 12", 12.0), ("####-3.5", -3.5), ("#### 1,234,567", 1234567.0), ("# 12", None), ("#### none", None)],
)
def test_the_marked_number(text: str, number: float | None) -> None:
    assert marked_number(text) == number
