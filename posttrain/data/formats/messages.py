"""`messages`: OpenAI's chat messages with tool calls, as TRL's conversational shapes and most hub sets have them."""

from collections.abc import Sequence
from typing import Any

from posttrain.chat.conversation import Conversation
from posttrain.data.formats.format import BadRow, Fields, Format, Record, from_json, items, kind
from posttrain.data.formats.turns import Turns, as_text, offered


def written(messages: Sequence[Any], field: str) -> Turns:
    """Messages with `role`, `content`, and where they have them `tool_calls`, `tool_call_id`, `name`, `thinking`."""
    turns = Turns(field)
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRow(f"{field}[{place}]", f"is {kind(message)}, not an object")
        _write(turns, message, f"{field}[{place}]")
    return turns


def _write(turns: Turns, message: Record, field: str) -> None:
    role, content = message.get("role"), _content(message, field)
    match role:
        case "system" | "developer":
            turns.system(_spoken(content, field))
        case "user":
            turns.user(_spoken(content, field))
        case "assistant":
            _write_assistant(turns, message, content, field)
        case "tool" | "function":
            turns.result(content or "", message.get("name"), message.get("tool_call_id"))
        case _:
            raise BadRow(f"{field}.role", f"is {role!r}; system, developer, user, assistant and tool are known")


def _write_assistant(turns: Turns, message: Record, content: str | None, field: str) -> None:
    thinking = message.get("thinking") or message.get("reasoning_content")
    calls = message.get("tool_calls") or ([{"function": message["function_call"]}] if _old_call(message) else [])
    if content is None and not thinking and not calls:
        raise BadRow(f"{field}.content", "is empty")
    train = message.get("train", True) is not False and message.get("weight") != 0
    turns.assistant(content, thinking, train)
    for made in calls:
        function = made.get("function", made) if isinstance(made, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"{field}.tool_calls", "a call has no function name")
        turns.call(function["name"], _arguments(function.get("arguments"), field), made.get("id"), train)


def _arguments(value: Any, field: str) -> Any:
    if isinstance(value, dict):
        # Arrow gives every call the keys of all calls in the column; JSON text keeps its own nulls.
        return {name: inner for name, inner in value.items() if inner is not None}
    return {} if value is None else from_json(value, f"{field}.tool_calls")


def _old_call(message: Record) -> bool:
    return isinstance(message.get("function_call"), dict)


def _content(message: Record, field: str) -> str | None:
    """Text, or the text parts of a content list."""
    content = message.get("content")
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise BadRow(f"{field}.content", "has parts that are not text")
        content = "".join(part["text"] for part in content)
    if content is None or isinstance(content, str):
        return content if content and content.strip() else None
    if isinstance(content, dict):
        return as_text(content)
    raise BadRow(f"{field}.content", f"is {kind(content)}, not text")


def _spoken(content: str | None, field: str) -> str:
    if content is None:
        raise BadRow(f"{field}.content", "is empty")
    return content


def conversation(record: Record, metadata: dict[str, Any] | None = None) -> Conversation:
    turns = written(items(record, "messages"), "messages")
    return turns.conversation(offered(record.get("tools"), "tools"), metadata)


def fields(record: Record) -> Fields:
    return {"conversation": conversation(record)}


FORMAT = Format(
    columns=("messages",),
    makes={"conversations": fields},
    reads="OpenAI fine-tuning files, TRL conversational language modelling, with `tools` where there are some",
)
