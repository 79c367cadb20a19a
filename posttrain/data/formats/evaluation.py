"""`evaluation`: a prompt with its expected answer, as evaluation sets are written; `scorer` says how both compare."""

import math
from collections.abc import Callable
from typing import Any

from posttrain.chat.conversation import Message, call
from posttrain.data.formats.format import BadRow, Fields, Format, Record, from_json, items, kind, optional_text
from posttrain.data.formats.prompts import asked
from posttrain.data.formats.turns import answer

TOLERANCE = 1e-6
GROUPS = ("category", "difficulty")
"""What a scorecard is divided by."""


def task(record: Record) -> Fields:
    """Without a `scorer`, a number is compared as such and any other text has to stand in the answer."""
    expected = record.get("expected_answer")
    if expected is None or expected == "":
        raise BadRow("expected_answer", "is empty")
    name = optional_text(record, "scorer") or ("numeric" if _number(expected) is not None else "contains")
    if name not in SCORERS:
        raise BadRow("scorer", f"is {name!r}; there are {', '.join(SCORERS)}")
    groups = {group: found for group in GROUPS if (found := optional_text(record, group)) is not None}
    prompt = asked(record, record.get("prompt")).model_copy(update={"metadata": groups})
    identity = {"id": str(record["id"])} if record.get("id") not in (None, "") else {}
    return {**identity, "prompt": prompt, **SCORERS[name](record, expected)}


def _text(name: str) -> Callable[[Record, Any], Fields]:
    def compared(record: Record, expected: Any) -> Fields:
        if not isinstance(expected, str | int | float):
            raise BadRow("expected_answer", f"is {kind(expected)}, not text")
        said = str(expected)
        return {"world": "answers", "reference": {"kind": name, "answer": said}, "solution": (answer(said),)}

    return compared


def _numeric(record: Record, expected: Any) -> Fields:
    number, tolerance = _number(expected), record.get("tolerance", TOLERANCE)
    if number is None:
        raise BadRow("expected_answer", f"is {expected!r}, not a number")
    if not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise BadRow("tolerance", f"is {tolerance!r}, not a number from 0 on")
    reference = {"kind": "numeric", "answer": number, "tolerance": tolerance}
    return {"world": "answers", "reference": reference, "solution": (answer(str(expected)),)}


def _number(expected: Any) -> float | None:
    if isinstance(expected, bool) or not isinstance(expected, str | int | float):
        return None
    try:
        number = float(str(expected).replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _tool_call(record: Record, expected: Any) -> Fields:
    """One call with `name` and `arguments`, or a list of which any may be made."""
    given = from_json(expected, "expected_answer")
    calls = given if isinstance(given, list) else [given]
    for one in calls:
        named = isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("arguments"), dict)
        if not named:
            raise BadRow("expected_answer", "must be a call with `name` and `arguments`, or a list of such")
    if not calls:
        raise BadRow("expected_answer", "names no call")
    alternatives = [{"tool": one["name"], "arguments": one["arguments"]} for one in calls]
    solution = call(alternatives[0]["tool"], alternatives[0]["arguments"])
    return {"world": "calls", "reference": {"calls": alternatives}, "solution": (solution,)}


def _code(record: Record, expected: Any) -> Fields:
    files = record.get("files") or {}
    if not isinstance(files, dict):
        raise BadRow("files", f"is {kind(files)}, not an object of names and texts")
    if not isinstance(expected, str):
        for one in items(record, "expected_answer"):
            if not isinstance(one, dict) or {type(one.get(name)) for name in ("expression", "expected")} != {str}:
                raise BadRow("expected_answer", "must be asserts, or a list of `expression` and `expected` as text")
    written = optional_text(record, "solution")
    reference = {
        "kind": "code",
        "answer": expected,
        "language": optional_text(record, "language") or "python",
        "files": files,
        "answer_file": optional_text(record, "answer_file") or "solution.py",
    }
    solution: tuple[Message, ...] = (answer(f"```\n{written}\n```"),) if written else ()
    return {"world": "answers", "reference": reference, "solution": solution}


SCORERS: dict[str, Callable[[Record, Any], Fields]] = {
    "exact": _text("exact"),
    "contains": _text("contains"),
    "numeric": _numeric,
    "tool_call": _tool_call,
    "code": _code,
}

FORMAT = Format(
    columns=("prompt", "expected_answer"),
    makes={"tasks": task},
    reads="evaluation sets, with `id`, `category`, `difficulty` and `scorer`",
)
