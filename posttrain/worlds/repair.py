"""Repair world: a small function with one wrong line; the repair has to satisfy tests that were not shown."""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from posttrain.chat.conversation import Conversation, Message, Tool, call, tool_result
from posttrain.scoring.calls import first_call
from posttrain.scoring.functions import Grade, grade
from posttrain.scoring.score import Score
from posttrain.worlds.names import Split
from posttrain.worlds.programs import Arguments, Mutant, Program, draw, load, mutants, outcome, shown

MINIMUM_HIDDEN = 5
APPLY_PATCH = Tool(
    name="apply_patch",
    description="replace old by new, then run the test",
    parameters={
        "type": "object",
        "properties": {"old": {"type": "string"}, "new": {"type": "string"}},
        "required": ["old", "new"],
    },
)
REQUESTS = ("Fix f.", "Please fix f.", "This test fails.", "Make the test pass.", "f is wrong, fix it.")
FINALS = ("Fixed.", "Done.", "The test passes now.")


@dataclass(frozen=True)
class Case:
    """A program, one caught mutant of it, and tests with the values the right program gives."""

    program: Program
    mutant: Mutant
    visible: tuple[Arguments, Any]
    hidden: tuple[tuple[Arguments, Any], ...]

    @property
    def code(self) -> str:
        return self.program.code(self.mutant.body)


def assertion(arguments: Arguments | list[Any], expected: Any) -> str:
    return f"assert {shown(tuple(arguments))} == {expected!r}"


def case(rng: random.Random, split: Split) -> Case:
    """A case whose mutant both the visible test and hidden ones, with other inputs, catch; others are drawn again."""
    while True:
        program = draw(rng, split)
        options = mutants(program, rng)
        if not options:
            continue
        kinds = sorted({mutant.kind for mutant in options})
        kind = rng.choice(kinds)
        mutant = rng.choice([m for m in options if m.kind == kind])
        right, wrong = load(program.code()), load(program.code(mutant.body))
        tests = [(arguments, right(*arguments)) for arguments in program.inputs]
        caught = [i for i, (arguments, value) in enumerate(tests) if outcome(wrong, arguments) != repr(value)]
        if len(caught) < 2 or len(tests) <= MINIMUM_HIDDEN:
            continue
        shown_test = rng.choice(caught)
        hidden = tuple(test for i, test in enumerate(tests) if i != shown_test)
        if len(Counter(repr(value) for _, value in hidden)) < 2:
            continue
        return Case(program, mutant, tests[shown_test], hidden)


def explanation(kind: str) -> str:
    return f"The {kind} is wrong." if kind != "missing body" else "The body is missing."


def prompt(rng: random.Random, drawn: Case) -> Conversation:
    text = f"{rng.choice(REQUESTS)}\n\n{drawn.code}\n{assertion(*drawn.visible)}"
    return Conversation(messages=(Message(role="user", content=text),), tools=(APPLY_PATCH,))


def task(rng: random.Random, split: Split) -> dict[str, Any]:
    drawn = case(rng, split)
    solution = [
        Message(role="assistant", channel="analysis", content=explanation(drawn.mutant.kind)),
        call("apply_patch", {"old": drawn.mutant.wrong, "new": drawn.mutant.right}),
        tool_result("apply_patch", "test passed"),
        Message(role="assistant", channel="final", content=rng.choice(FINALS)),
    ]
    return {
        "world": "repair",
        "prompt": prompt(rng, drawn).model_dump(),
        "reference": {
            "code": drawn.code,
            "visible": [[list(arguments), value] for arguments, value in (drawn.visible,)],
            "hidden": [[list(arguments), value] for arguments, value in drawn.hidden],
            "kind": drawn.mutant.kind,
            "program": drawn.program.key,
        },
        "solution": [message.model_dump() for message in solution],
    }


class RepairEnvironment:
    """Applies patches and runs the shown test after each; a turn without a call ends the episode.

    Hidden tests run once, at the end, on the code as it then stands: only their verdict becomes the reward.
    """

    def __init__(self, row: dict[str, Any]) -> None:
        self.reference = row["reference"]
        self.code: str = self.reference["code"]
        self.well_formed: list[bool] = []

    def respond(self, messages: list[Message]) -> list[Message]:
        made = first_call(messages)
        if made is None:
            return []
        reply = self._apply(made.tool, made.arguments)
        self.well_formed.append(reply is None)
        return [tool_result(made.tool, reply if reply is not None else self._run_shown())]

    def _apply(self, tool: str, arguments: dict[str, Any] | None) -> str | None:
        """Change the code; an answer for the model where the call cannot be carried out."""
        if tool != "apply_patch":
            return "error: no such tool"
        if (
            arguments is None
            or set(arguments) != {"old", "new"}
            or not all(isinstance(v, str) for v in arguments.values())
        ):
            return "error: give old and new"
        found = self.code.count(arguments["old"]) if arguments["old"] else 0
        if found != 1:
            return f"error: old found {found} times"
        self.code = self.code.replace(arguments["old"], arguments["new"])
        return None

    def _run_shown(self) -> str:
        verdict = grade(self.code, self.reference["visible"])
        if verdict.passed is None:
            return f"error: {verdict.reason}"
        if all(verdict.passed):
            return "test passed"
        return f"test failed: {assertion(*self.reference['visible'][0])}"

    def score(self) -> Score:
        shown_verdict = grade(self.code, self.reference["visible"])
        hidden_verdict = grade(self.code, self.reference["hidden"])
        if shown_verdict.passed is None or hidden_verdict.passed is None:
            return Score(None, {}, shown_verdict.reason or hidden_verdict.reason)
        parts = {
            "format": float(bool(self.well_formed) and all(self.well_formed)),
            "visible": _share_all(shown_verdict),
            "hidden": _share_all(hidden_verdict),
        }
        return Score(parts["hidden"], parts, None)


def _share_all(verdict: Grade) -> float:
    """1 if there are tests and all passed: no tests earn nothing."""
    return float(bool(verdict.passed) and all(verdict.passed or ()))
