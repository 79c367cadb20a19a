"""Grades a program by the values that one of its functions gives; the expected ones never leave this process."""

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.errors import MachineError
from posttrain.sandbox.calls import Caller, shared

CACHED_GRADES = 50_000


@dataclass(frozen=True)
class Grade:
    """One verdict per test; `passed` None: the sandbox could not tell, and a reward made of it would be luck."""

    passed: tuple[bool, ...] | None
    reason: str | None


def judge(caller: Caller, source: str, tests: Sequence[Sequence[Any]]) -> Grade:
    """Call `f` on each test's arguments and compare with its expected value, by type and value."""
    try:
        answer = caller.run(source, [arguments for arguments, _ in tests])
    except MachineError as error:
        return Grade(None, str(error))
    if "unknown" in answer:
        return Grade(None, str(answer["unknown"]))
    values = answer.get("values")
    if not isinstance(values, list) or len(values) != len(tests):
        return Grade((False,) * len(tests), str(answer.get("failure", "its answer has another length")))
    passed = tuple(value == ["value", repr(wanted)] for value, (_, wanted) in zip(values, tests, strict=True))
    return Grade(passed, None)


_grades: dict[tuple[int, str], Grade] = {}
_asking = threading.Lock()
"""The worker runs one program at a time."""


def grade(source: str, tests: Sequence[Sequence[Any]]) -> Grade:
    """`judge` with this process's shared worker; the same question is answered once."""
    key = (os.getpid(), json.dumps([source, tests]))
    with _asking:
        found = _grades.get(key) or judge(shared(), source, tests)
        if found.passed is not None:
            if len(_grades) >= CACHED_GRADES:
                _grades.clear()
            _grades[key] = found
    return found
