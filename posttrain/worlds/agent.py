"""Agent world: coding trajectories that read, patch, run the tests, and react to a failure."""

import random
from typing import Any

from posttrain.chat.conversation import Conversation, Message, Tool, call, tool_result
from posttrain.worlds.names import Split, name
from posttrain.worlds.programs import Mutant, load, mutants, outcome
from posttrain.worlds.repair import FINALS, Case, assertion, case, explanation, prompt

READ_FILE = Tool(
    name="read_file",
    description="show a file",
    parameters={"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
)
EDIT_FILE = Tool(
    name="edit_file",
    description="replace old by new in a file",
    parameters={
        "type": "object",
        "properties": {"path": {"type": "string"}, "old": {"type": "string"}, "new": {"type": "string"}},
        "required": ["path", "old", "new"],
    },
)
RUN_TESTS = Tool(
    name="run_tests", description="run the tests", parameters={"type": "object", "properties": {}, "required": []}
)
REQUESTS = ("A test of {} fails. Fix it.", "Please fix the test of {}.", "The tests in {} fail, fix them.")


def _thought(text: str) -> Message:
    return Message(role="assistant", channel="analysis", content=text)


def _final(rng: random.Random) -> Message:
    return Message(role="assistant", channel="final", content=rng.choice(FINALS))


def _outcome(drawn: Case, code: str) -> str:
    """What running the shown test on `code` says; the code is this file's own."""
    arguments, expected = drawn.visible
    passed = outcome(load(code), arguments) == repr(expected)
    return "test passed" if passed else f"test failed: {assertion(arguments, expected)}"


def _short(rng: random.Random, drawn: Case) -> Conversation:
    """The code stands in the request: patch, result, answer."""
    start = prompt(rng, drawn)
    messages = (
        *start.messages,
        _thought(explanation(drawn.mutant.kind)),
        call("apply_patch", {"old": drawn.mutant.wrong, "new": drawn.mutant.right}),
        tool_result("apply_patch", _outcome(drawn, drawn.program.code())),
        _final(rng),
    )
    return start.model_copy(update={"messages": messages})


def _shortcut(rng: random.Random, drawn: Case) -> Conversation:
    """The wrong line returns what the shown test wants: it passes, and the hidden tests would not."""
    expected = repr(drawn.visible[1])
    patch = {"old": drawn.mutant.wrong, "new": f"return {expected}"}
    if patch["old"].endswith(":"):
        return _short(rng, drawn)
    result = _outcome(drawn, drawn.code.replace(patch["old"], patch["new"]))
    if result != "test passed":
        return _short(rng, drawn)
    start = prompt(rng, drawn)
    messages = (
        *start.messages,
        _thought(f"The test wants {expected}."),
        call("apply_patch", patch),
        tool_result("apply_patch", result),
        _final(rng),
    )
    return start.model_copy(update={"messages": messages})


def _second_mistake(rng: random.Random, drawn: Case) -> Mutant | None:
    """Another wrong version of the same line that the shown test catches."""
    at = [i for i, pair in enumerate(zip(drawn.program.body, drawn.mutant.body, strict=True)) if pair[0] != pair[1]]
    others = [
        m
        for m in mutants(drawn.program, rng)
        if m.right == drawn.mutant.right
        and m.body[at[0]] != drawn.program.body[at[0]]
        and m.wrong not in (drawn.mutant.wrong, "pass")
        and _outcome(drawn, drawn.program.code(m.body)) != "test passed"
    ]
    return rng.choice(others) if others else None


def _correcting(rng: random.Random, drawn: Case) -> Conversation:
    """A wrong patch, which is not trained on, its failure, then the right one."""
    mistake = _second_mistake(rng, drawn)
    if mistake is None:
        return _short(rng, drawn)
    start = prompt(rng, drawn)
    patched = drawn.code.replace(drawn.mutant.wrong, mistake.wrong)
    messages = (
        *start.messages,
        call("apply_patch", {"old": drawn.mutant.wrong, "new": mistake.wrong}, train=False),
        tool_result("apply_patch", _outcome(drawn, patched)),
        _thought(f"Not yet. {explanation(drawn.mutant.kind)}"),
        call("apply_patch", {"old": mistake.wrong, "new": drawn.mutant.right}),
        tool_result("apply_patch", _outcome(drawn, patched.replace(mistake.wrong, drawn.mutant.right))),
        _final(rng),
    )
    return start.model_copy(update={"messages": messages})


def _long(rng: random.Random, drawn: Case, split: Split) -> Conversation:
    """The code has to be read first: read, edit, run the tests, answer."""
    path = f"{name(rng, split)}.py"
    messages = (
        Message(role="user", content=rng.choice(REQUESTS).format(path)),
        _thought(f"Read {path}."),
        call("read_file", {"path": path}),
        tool_result("read_file", f"{drawn.code}\n{assertion(*drawn.visible)}"),
        _thought(explanation(drawn.mutant.kind)),
        call("edit_file", {"path": path, "old": drawn.mutant.wrong, "new": drawn.mutant.right}),
        tool_result("edit_file", "ok"),
        call("run_tests", {}),
        tool_result("run_tests", _outcome(drawn, drawn.program.code())),
        _final(rng),
    )
    return Conversation(messages=messages, tools=(READ_FILE, EDIT_FILE, RUN_TESTS))


def conversation(rng: random.Random, split: Split) -> dict[str, Any]:
    drawn, shape = case(rng, split), rng.random()
    if shape < 0.25:
        made = _short(rng, drawn)
    elif shape < 0.65:
        made = _shortcut(rng, drawn)
    elif shape < 0.75:
        made = _correcting(rng, drawn)
    else:
        made = _long(rng, drawn, split)
    return {"conversation": made.model_dump()}
