"""`sharegpt`: `conversations` of `{from, value}`, with calls and observations as LLaMA-Factory writes them."""

from typing import Any

from posttrain.data.formats.format import BadRow, Fields, Format, Record, from_json, items, kind, optional_text
from posttrain.data.formats.turns import Turns, offered

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "function_call": "call",
    "observation": "result",
    "tool": "result",
}


def spoken(turn: Any, place: int) -> tuple[str, str]:
    """Who speaks, as the dataset calls it, and what."""
    field = f"conversations[{place}]"
    if not isinstance(turn, dict):
        raise BadRow(field, f"is {kind(turn)}, not an object")
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str):
        raise BadRow(f"{field}.from", f"is {kind(speaker)}, not text")
    if not isinstance(value, str):
        raise BadRow(f"{field}.value", f"is {kind(value)}, not text")
    return speaker, value


def fields(record: Record) -> Fields:
    turns = Turns("conversations")
    if system := optional_text(record, "system"):
        turns.system(system)
    for place, turn in enumerate(items(record, "conversations")):
        speaker, value = spoken(turn, place)
        match SPEAKERS.get(speaker):
            case "system":
                turns.system(value)
            case "user":
                turns.user(value)
            case "assistant":
                turns.assistant(value)
            case "call":
                _calls(turns, from_json(value, f"conversations[{place}].value"), place)
            case "result":
                turns.result(value)
            case _:
                raise BadRow(f"conversations[{place}].from", f"is {speaker!r}; known: {', '.join(SPEAKERS)}")
    return {"conversation": turns.conversation(offered(record.get("tools") or None, "tools"))}


def _calls(turns: Turns, made: Any, place: int) -> None:
    for one in made if isinstance(made, list) else [made]:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise BadRow(f"conversations[{place}].value", "a call has no name")
        turns.call(one["name"], from_json(one.get("arguments"), f"conversations[{place}].value"))


FORMAT = Format(
    columns=("conversations",),
    makes={"conversations": fields},
    reads="ShareGPT files, with `system` and `tools` where there are some",
)
