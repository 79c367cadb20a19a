"""`hermes`: NousResearch/hermes-function-calling-v1, calls and results between XML tags in the turns' text."""

import ast
import re
from typing import Any

from posttrain.data.formats.calls import call_task
from posttrain.data.formats.format import BadRow, Fields, Format, Record, from_json, items, kind
from posttrain.data.formats.sharegpt import spoken
from posttrain.data.formats.turns import Turns, as_text, offered

SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
TOOLS = re.compile(r"<tools>\s*(.*?)\s*</tools>", re.DOTALL)
CALLS = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
RESULTS = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
THOUGHTS = re.compile(r"<(scratch_pad|scratchpad|think)>\s*(.*?)\s*</\1>", re.DOTALL)


def fields(record: Record) -> Fields:
    turns, tools = Turns("conversations"), offered(record.get("tools") or None, "tools")
    for place, turn in enumerate(items(record, "conversations")):
        speaker, value = spoken(turn, place)
        field = f"conversations[{place}].value"
        match SPEAKERS.get(speaker, speaker):
            case "system":
                # The text in front of the tools explains tags, which no chat format of ours uses.
                if shown := TOOLS.search(value):
                    tools = tools or offered(_value(shown[1], field), field)
                elif not tools:
                    turns.system(value)
            case "user":
                turns.user(value)
            case "assistant":
                _assistant(turns, value, field)
            case "tool":
                _results(turns, value)
            case _:
                raise BadRow(f"conversations[{place}].from", f"is {speaker!r}; system, human, gpt and tool are known")
    return {"conversation": turns.conversation(tools)}


def _assistant(turns: Turns, value: str, field: str) -> None:
    thoughts = "\n\n".join(found[2] for found in THOUGHTS.finditer(value))
    said = CALLS.sub("", THOUGHTS.sub("", value)).strip()
    called = [_value(found, field) for found in CALLS.findall(value)]
    if not (said or thoughts or called):
        raise BadRow(field, "is empty")
    turns.assistant(said, thoughts)
    for one in called:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise BadRow(field, "a call has no name")
        turns.call(one["name"], _value(one.get("arguments", {}), field))


def _results(turns: Turns, value: str) -> None:
    for found in RESULTS.findall(value) or [value.strip()]:
        try:
            made = _value(found, "")
        except BadRow:
            made = None
        if isinstance(made, dict) and "content" in made:
            name = made.get("name")
            turns.result(as_text(made["content"]), name if isinstance(name, str) else None)
        else:
            turns.result(found)


def _value(said: Any, field: str) -> Any:
    """JSON, or the Python literal that some rows have in its place."""
    if not isinstance(said, str):
        return said
    try:
        return from_json(said, field)
    except BadRow as not_json:
        try:
            value = ast.literal_eval(said)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise not_json from None
    if not isinstance(value, dict | list):
        raise BadRow(field, f"is {kind(value)}, not an object")
    return value


FORMAT = Format(
    columns=("conversations",),
    makes={"conversations": fields, "tasks": lambda record: call_task(fields(record))},
    reads="NousResearch/hermes-function-calling-v1, every subset",
)
