"""Programs given as an answer: the code block of the final message, put into a tree and asked for values."""

from collections.abc import Mapping
from typing import Any

from posttrain.errors import MachineError, ScoringError
from posttrain.scoring import code
from posttrain.scoring.score import Score
from posttrain.scoring.text import fenced_code


def score_snippet(reference: Mapping[str, Any], final: str) -> Score:
    """1 where every test passes. `answer` holds them: Python asserts, or a list of `expression` and `expected`.

    `language`, `files` (the rest of the tree) and `answer_file` (where the answer is put) say how it is run; an answer
    without a code block is taken whole. Parts: `format`, `compiles`, `tests` (the share that passes), `exact`.
    """
    block = fenced_code(final)
    source = final if block is None else block
    if not source.strip():
        # An empty program would compile.
        return Score(0.0, {"format": 0.0, "compiles": 0.0, "tests": 0.0, "exact": 0.0})
    try:
        checks = read_checks(reference["answer"])
        edits = {reference["answer_file"]: source.rstrip() + "\n"}
        done = code.evaluate(
            code.shared_pool(), reference["language"], reference["files"], edits, (), checks, lint=False
        )
    except (ScoringError, MachineError) as error:
        return Score(None, {}, str(error))
    if done.unknown is not None:
        return Score(None, {}, done.unknown)
    share = sum(done.hidden) / len(checks)
    parts = {"format": float(block is not None), "compiles": float(done.compiles), "tests": share}
    return Score(float(share == 1), parts | {"exact": float(share == 1)})


def read_checks(tests: Any) -> tuple[code.Check, ...]:
    """ScoringError where they are none: an answer without a test cannot be right or wrong."""
    if isinstance(tests, str):
        checks = code.checks_from_asserts(tests)
    else:
        checks = tuple(code.Check(str(one["expression"]), str(one["expected"])) for one in tests)
    if not checks:
        raise ScoringError("the task has no tests")
    return checks
