"""The tool world pays for the right call and for nothing else."""

import json
from typing import Any

import pytest

from posttrain.chat.conversation import Message, call
from posttrain.worlds.registry import rows, start


def task(index: int = 0) -> dict[str, Any]:
    return list(rows("tools", "tasks", "heldout", index + 1, 11))[index]


def answer(text: str) -> Message:
    return Message(role="assistant", channel="final", content=text)


def test_the_solution_earns_every_part() -> None:
    for row in rows("tools", "tasks", "heldout", 300, 5):
        environment, solution = start(row), [Message(**message) for message in row["solution"]]
        assert environment.respond(solution[:2]) == [solution[2]]
        assert environment.respond(solution[3:]) == []
        score = environment.score()
        assert score.value == 1.0 and set(score.parts.values()) == {1.0}
        assert set(score.parts) == {"format", "tool", "arguments", "exact", "answer"}


def test_order_of_keys_is_free_but_types_are_not() -> None:
    row = task()
    tool, arguments = row["reference"]["tool"], {"count": 3, "city": "kelmo"}
    row["reference"]["arguments"] = arguments
    for given, exact in (
        ({"city": "kelmo", "count": 3}, 1.0),
        ({"city": "kelmo", "count": "3"}, 0.0),
        ({"city": "kelmo", "count": 3.0}, 0.0),
        ({"city": "kelmo", "count": 3, "day": 1}, 0.0),
        ({"city": "kelmo"}, 0.0),
    ):
        environment = start(row)
        environment.respond([call(tool, given)])
        assert environment.score().value == exact, given


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a":1,"a":2}', '{"a":NaN}', "[" * 100_000])
def test_a_call_that_is_no_object_has_no_format(text: str) -> None:
    environment = start(task())
    made = Message(role="assistant", channel="commentary", recipient="functions.x", content=text)
    assert json.loads(environment.respond([made])[0].content) == {"error": "bad json"}
    assert environment.score().parts["format"] == 0.0


def test_a_second_try_is_not_exact_and_the_result_only_follows_a_right_call() -> None:
    row = task()
    reference = row["reference"]
    environment = start(row)
    reply = environment.respond([call("nothing_here", reference["arguments"])])[0]
    assert reference["id"] not in reply.content
    reply = environment.respond([call(reference["tool"], reference["arguments"])])[0]
    assert reply.content == reference["result"]
    environment.respond([answer(reference["id"])])
    score = environment.score()
    assert score.value == 0.0 and score.parts["answer"] == 1.0


def test_the_prompt_does_not_hold_the_answer() -> None:
    for row in rows("tools", "tasks", "train", 500, 2):
        assert row["reference"]["id"] not in json.dumps(row["prompt"])
        assert row["reference"]["tool"] not in row["prompt"]["messages"][0]["content"]


def test_distractors_share_the_verb_or_the_noun() -> None:
    for row in rows("tools", "tasks", "train", 300, 2):
        verb, noun = row["reference"]["tool"].split("_")
        offered = [tool["name"].split("_") for tool in row["prompt"]["tools"]]
        assert 2 <= len(offered) <= 4 and offered.count([verb, noun]) == 1
        assert all(v == verb or n == noun for v, n in offered)


def test_no_call_scores_zero() -> None:
    environment = start(task())
    assert environment.respond([answer("done")]) == []
    assert set(environment.score().parts.values()) == {0.0}
