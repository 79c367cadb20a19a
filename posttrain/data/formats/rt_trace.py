"""`rt_trace`: traces of the RT system: a prompt, numbered steps, a final answer."""

from typing import Any

from posttrain.chat.conversation import reasoned
from posttrain.data.formats.format import BadRow, Fields, Format, Record, items, kind, text

MOST_PROMPT = MOST_ANSWER = 50_000
MOST_STEPS, MOST_STEP = 1000, 20_000


def fields(record: Record) -> Fields:
    """Each step is a message of the analysis, which Gemma's turns number; the answer is final."""
    prompt, final = _bounded(record, "prompt", MOST_PROMPT), _bounded(record, "final_answer", MOST_ANSWER)
    steps, meta = _steps(record), record.get("meta") or {}
    if not isinstance(meta, dict):
        raise BadRow("meta", f"is {kind(meta)}, not an object")
    metadata = {"trace": {"trace_version": text(record, "trace_version"), "steps": steps, "meta": meta}}
    made = reasoned(prompt, [step["content"] for step in steps], final)
    return {"conversation": made.model_copy(update={"metadata": metadata})}


def _steps(record: Record) -> list[dict[str, Any]]:
    steps = items(record, "steps")
    if len(steps) > MOST_STEPS:
        raise BadRow("steps", f"has {len(steps)} steps; at most {MOST_STEPS} are allowed")
    for place, step in enumerate(steps):
        if not isinstance(step, dict):
            raise BadRow(f"steps[{place}]", f"is {kind(step)}, not an object")
        if not isinstance(step.get("i"), int) or isinstance(step["i"], bool):
            raise BadRow(f"steps[{place}].i", f"is {kind(step.get('i'))}, not a number")
        for field in ("type", "content"):
            if not isinstance(step.get(field), str) or not step[field]:
                raise BadRow(f"steps[{place}].{field}", "is empty or no text")
        if len(step["content"]) > MOST_STEP:
            raise BadRow(f"steps[{place}].content", f"has {len(step['content'])} characters; at most {MOST_STEP}")
    numbers = [step["i"] for step in steps]
    if len(set(numbers)) < len(numbers):
        raise BadRow("steps", "has the same `i` twice")
    if numbers[0] not in (0, 1) or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise BadRow("steps", "`i` does not count up by one from 0 or 1")
    return [{"i": step["i"], "type": step["type"], "content": step["content"]} for step in steps]


def _bounded(record: Record, column: str, most: int) -> str:
    value = text(record, column)
    if len(value) > most:
        raise BadRow(column, f"has {len(value)} characters; at most {most} are allowed")
    return value


FORMAT = Format(
    columns=("trace_version", "prompt", "final_answer", "steps"),
    makes={"conversations": fields},
    reads="RT traces",
)
