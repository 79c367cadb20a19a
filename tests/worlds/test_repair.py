"""Repair tasks: their mutants are caught, and only code that passes the hidden tests is paid for."""

import json
from typing import Any

from posttrain.chat.conversation import Message, call, tool_result
from posttrain.worlds.programs import FAMILIES, load
from posttrain.worlds.registry import rows, start
from posttrain.worlds.repair import MINIMUM_HIDDEN


def outcomes(code: str, tests: list[list[Any]]) -> list[bool]:
    function = load(code)
    passed = []
    for arguments, expected in tests:
        try:
            passed.append(repr(function(*arguments)) == repr(expected))
        except (TypeError, ValueError, NameError):
            passed.append(False)
    return passed


def patch(row: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = json.loads(row["solution"][1]["content"])
    return found


def test_every_task_is_caught_by_shown_and_hidden_tests_and_its_solution_passes_all() -> None:
    kinds = set()
    for row in rows("repair", "tasks", "train", 1500, 4):
        reference, change = row["reference"], patch(row)
        kinds.add(reference["kind"])
        assert reference["code"].count(change["old"]) == 1
        assert not any(outcomes(reference["code"], reference["visible"]))
        assert not all(outcomes(reference["code"], reference["hidden"]))
        repaired = reference["code"].replace(change["old"], change["new"])
        assert all(outcomes(repaired, reference["visible"] + reference["hidden"]))
        assert len(reference["hidden"]) >= MINIMUM_HIDDEN
        shown = [json.dumps(arguments) for arguments, _ in reference["visible"]]
        assert not set(shown) & {json.dumps(arguments) for arguments, _ in reference["hidden"]}
    assert kinds >= {"boundary", "negated condition", "missing body", "constant", "arithmetic", "boolean", "operator"}


def test_families_are_many() -> None:
    assert len(FAMILIES) >= 10
    assert len({row["reference"]["program"] for row in rows("repair", "tasks", "train", 3000, 4)}) > 1500


def test_hidden_tests_are_not_in_the_prompt() -> None:
    for row in rows("repair", "tasks", "train", 300, 4):
        text = row["prompt"]["messages"][0]["content"]
        assert text.count("assert") == 1
        assert "hidden" not in json.dumps(row["prompt"])


def test_the_solution_is_paid_and_the_sandbox_agrees_with_the_generator() -> None:
    for row in rows("repair", "tasks", "heldout", 40, 4):
        environment, solution = start(row), [Message(**message) for message in row["solution"]]
        assert environment.respond(solution[:2]) == [tool_result("apply_patch", "test passed")]
        assert environment.respond(solution[3:]) == []
        assert environment.score().parts == {"format": 1.0, "visible": 1.0, "hidden": 1.0}
        untouched = start(row).score()
        assert untouched.value == 0.0 and untouched.parts == {"format": 0.0, "visible": 0.0, "hidden": 0.0}


def scalar_row() -> dict[str, Any]:
    code = 'def f(a):\n    """a plus 2"""\n    return a - 2\n'
    hidden = [[[n], n + 2] for n in range(1, 7)]
    return {"world": "repair", "reference": {"code": code, "visible": [[[10], 12]], "hidden": hidden}}


def test_hard_coding_the_shown_test_passes_it_and_earns_nothing() -> None:
    environment = start(scalar_row())
    reply = environment.respond([call("apply_patch", {"old": "return a - 2", "new": "return 12"})])
    assert reply == [tool_result("apply_patch", "test passed")]
    assert environment.score().parts == {"format": 1.0, "visible": 1.0, "hidden": 0.0}
    assert environment.score().value == 0.0


def test_a_failure_is_shown_and_can_be_repaired() -> None:
    environment = start(scalar_row())
    reply = environment.respond([call("apply_patch", {"old": "a - 2", "new": "a + 3"})])
    assert reply[0].content == "test failed: assert f(10) == 12"
    reply = environment.respond([call("apply_patch", {"old": "a + 3", "new": "a + 2"})])
    assert reply[0].content == "test passed"
    assert environment.score().value == 1.0


def test_a_patch_that_cannot_be_applied_changes_nothing() -> None:
    for made, told in (
        (call("apply_patch", {"old": "zzz", "new": "a"}), "error: old found 0 times"),
        (call("apply_patch", {"old": "a", "new": "b"}), "error: old found"),
        (call("apply_patch", {"old": "", "new": "b"}), "error: old found 0 times"),
        (call("apply_patch", {"old": 1, "new": "b"}), "error: give old and new"),
        (call("apply_patch", {"old": "a"}), "error: give old and new"),
        (call("run", {}), "error: no such tool"),
    ):
        environment = start(scalar_row())
        assert environment.respond([made])[0].content.startswith(told)
        score = environment.score()
        assert score.value == 0.0 and score.parts["format"] == 0.0
