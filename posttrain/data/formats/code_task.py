"""`code_task`: a description, the code to begin with and its tests, as the TUI system's GRPO task files are written."""

import ast

from posttrain.chat.coding_agent import PROMPT
from posttrain.chat.conversation import Conversation, Message
from posttrain.data.formats.format import BadRow, Fields, Format, Record, optional_text, text
from posttrain.errors import ScoringError
from posttrain.scoring.code import Check
from posttrain.scoring.snippets import read_checks
from posttrain.worlds.code.environment import TOOLS, solution

FILE, TESTS = "solution.py", "test_solution.py"
SUITE = "# ruff: noqa\n# mypy: ignore-errors\nfrom solution import *\n\n\ndef test_solution():\n"
UNWRITTEN = "# Write the solution in place of this line.\n"
"""What a file says that is to be written from nothing: a patch replaces text that is there."""


def task(record: Record) -> Fields:
    """The asserts are the checks; a file of them is what `run_tests` runs. `task_type` is the row's tier."""
    language = optional_text(record, "language") or "python"
    if language != "python":
        raise BadRow("language", f"is {language!r}; tasks of this shape are Python, others come from `data mutate`")
    starter = optional_text(record, "starter_code") or UNWRITTEN
    asserts = _asserts(text(record, "tests"))
    checks = [[check.expression, check.expected] for line in asserts for check in _checks(line)]
    if not checks:
        raise BadRow("tests", "hold no assert")
    suite = SUITE + "".join(f"    {ast.unparse(line)}\n" for line in asserts)
    reference = {
        "language": language,
        "tree": {FILE: starter, TESTS: suite},
        "visible": checks,
        "hidden": [],
    }
    request = f"{text(record, 'description').strip()}\n\nThe code is in {FILE}, its tests in {TESTS}."
    prompt = Conversation(messages=(Message(role="user", content=request),), tools=TOOLS, instructions=PROMPT)
    written, tier = optional_text(record, "solution"), optional_text(record, "task_type")
    patch = {"path": FILE, "old": starter, "new": written or ""}
    return {
        "world": "code",
        "prompt": prompt,
        "reference": reference,
        "solution": tuple(solution(reference, patch, "It does what was asked for.")) if written else (),
        **({"tier": tier} if tier else {}),
    }


def _asserts(tests: str) -> list[ast.stmt]:
    """Those of the file, and of its `test…` functions without parameters; what is imported is there anyway."""
    try:
        body = ast.parse(tests).body
    except (SyntaxError, ValueError) as error:
        raise BadRow("tests", f"are no Python: {error}") from None
    found: list[ast.stmt] = []
    for line in body:
        match line:
            case ast.ImportFrom(module="solution"):
                continue
            case ast.FunctionDef(args=ast.arguments(posonlyargs=[], args=[], kwonlyargs=[])) if line.name[:4] == "test":
                found += line.body
            case _:
                found.append(line)
    return found


def _checks(line: ast.stmt) -> tuple[Check, ...]:
    """BadRow names the line that is no assert, or compares with no value."""
    try:
        return read_checks("\n" * (line.lineno - 1) + ast.unparse(line))
    except ScoringError as error:
        raise BadRow("tests", str(error)) from None


FORMAT = Format(
    columns=("description", "starter_code", "tests"),
    makes={"tasks": task},
    reads="TUI task files for GRPO, with `solution`, `task_type` and `language` where there are some",
)
