"""`glaive`: glaiveai/glaive-function-calling-v2, a whole dialogue as one text with `USER:` and `ASSISTANT:` in it."""

import json
import re
from typing import Any

from posttrain.data.formats.format import BadRow, Fields, Format, Record, from_json, kind, text
from posttrain.data.formats.turns import Turns, offered

SPEAKER = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
CALL = "<functioncall>"
END = "<|endoftext|>"
QUOTED_ARGUMENTS = re.compile(r"""^\s*\{\s*"name"\s*:\s*"([^"]+)"\s*,\s*"arguments"\s*:\s*'(.*)'\s*\}\s*$""", re.DOTALL)
"""The set writes a call's arguments as JSON text between single quotes, which is no JSON."""


def fields(record: Record) -> Fields:
    instructions, tools = _system(text(record, "system"))
    turns = Turns("chat")
    if instructions:
        turns.system(instructions)
    parts = SPEAKER.split(text(record, "chat"))
    if parts[0].strip():
        raise BadRow("chat", "does not begin with a speaker such as `USER:`")
    for speaker, said in zip(parts[1::2], parts[2::2], strict=True):
        said = said.replace(END, "").strip()
        match speaker:
            case "USER":
                turns.user(said)
            case "FUNCTION RESPONSE":
                turns.result(said)
            case _:
                _assistant(turns, said)
    return {"conversation": turns.conversation(offered(tools, "system"))}


def _system(said: str) -> tuple[str | None, list[Any]]:
    """The instructions, and the functions that stand behind them one after another; these replace their sentence."""
    said = said.strip().removeprefix("SYSTEM:").strip()
    start = said.find("{")
    if start < 0:
        return said or None, []
    tools, decoder = [], json.JSONDecoder()
    while start >= 0:
        try:
            value, end = decoder.raw_decode(said, start)
        except ValueError as error:
            raise BadRow("system", f"has a function that is not JSON: {error}") from None
        tools.append(value)
        start = said.find("{", end)
    return None, tools


def _assistant(turns: Turns, said: str) -> None:
    before, marker, called = said.partition(CALL)
    if not before.strip() and not marker:
        raise BadRow("chat", "the assistant says nothing in a turn")
    turns.assistant(before.strip())
    if marker:
        turns.call(*_call(called.strip()))


def _call(said: str) -> tuple[str, Any]:
    if quoted := QUOTED_ARGUMENTS.match(said):
        return quoted[1], from_json(quoted[2].replace("\\'", "'"), "chat")
    made = from_json(said, "chat")
    if not isinstance(made, dict) or not isinstance(made.get("name"), str):
        raise BadRow("chat", f"a call is {kind(made)} without a name")
    return made["name"], from_json(made.get("arguments", {}), "chat")


FORMAT = Format(
    columns=("system", "chat"), makes={"conversations": fields}, reads="glaiveai/glaive-function-calling-v2"
)
