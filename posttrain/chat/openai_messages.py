"""Conversations in the shape of OpenAI's chat API, which chat templates read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.chat.conversation import Conversation, Message, Tool
from posttrain.errors import ChatFormatError


@dataclass
class Spoken:
    """One message of the API, and which of ours it holds: analysis, text and calls of an assistant are one there."""

    value: dict[str, Any]
    places: list[int] = field(default_factory=list)


def openai_tools(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    return [{"type": "function", "function": _function(tool)} for tool in tools] or None


def _function(tool: Tool) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {}} if tool.parameters is None else tool.parameters
    return {"name": tool.name, "description": tool.description, "parameters": parameters}


def openai_messages(conversation: Conversation, reasoning_key: str | None) -> list[Spoken]:
    """`reasoning_key` is where analysis goes; None leaves it out. Raises ChatFormatError."""
    made: list[Spoken] = []
    if conversation.instructions is not None:
        made.append(Spoken({"role": "system", "content": conversation.instructions}))
    calls: list[tuple[str, str]] = []
    for place, message in enumerate(conversation.messages):
        if message.role == "assistant":
            if message.channel is None:
                raise ChatFormatError(f"message {place} has no channel: give it `analysis`, `commentary` or `final`")
            if message.channel == "analysis" and message.recipient is None and reasoning_key is None:
                continue
            if _ends(conversation.messages, made[-1:], place):
                made.append(Spoken({"role": "assistant", "content": ""}))
            if message.recipient is None:
                _say(made[-1].value, message, reasoning_key, place)
            else:
                name = _function_name(message.recipient, place)
                calls.append((name, f"call{sum(len(one.value.get('tool_calls', ())) for one in made):05d}"))
                _call(made[-1].value, message, *calls[-1], place)
            made[-1].places.append(place)
        elif message.role == "tool":
            name = _function_name(message.sender, place)
            made.append(Spoken({"role": "tool", "name": name, "content": message.content}, [place]))
            made[-1].value["tool_call_id"] = _answered(calls, name)
        elif message.role == "user":
            made.append(Spoken({"role": "user", "content": message.content}, [place]))
        else:
            raise ChatFormatError(
                f"message {place} ({message.role}): its text belongs into the conversation's `instructions`"
            )
    return made


def _ends(messages: Sequence[Message], last: Sequence[Spoken], place: int) -> bool:
    """Whether the message at `place` begins a new message of the API."""
    if not last or last[0].value["role"] != "assistant":
        return True
    before, message = messages[last[0].places[-1]], messages[place]
    if before.recipient is not None:
        return message.recipient is None
    return before.channel == "final"


def _say(value: dict[str, Any], message: Message, reasoning_key: str | None, place: int) -> None:
    if message.channel == "analysis" and reasoning_key is not None:
        if reasoning_key in value:
            raise ChatFormatError(
                f"message {place} is analysis again: a chat template has one place for it, at the front"
            )
        if value["content"]:
            raise ChatFormatError(f"message {place} is analysis after text: a chat template puts it first")
        value[reasoning_key] = message.content
        return
    if value["content"]:
        raise ChatFormatError(f"message {place} is text again: a chat template has one text per answer")
    value["content"] = message.content


def _call(value: dict[str, Any], message: Message, name: str, call_id: str, place: int) -> None:
    try:
        arguments = json.loads(message.content)
    except (ValueError, RecursionError):
        raise ChatFormatError(f"message {place} calls {name} with arguments that are not JSON") from None
    if not isinstance(arguments, dict):
        raise ChatFormatError(f"message {place} calls {name} with arguments that are not a JSON object")
    made = {"type": "function", "id": call_id, "function": {"name": name, "arguments": arguments}}
    value.setdefault("tool_calls", []).append(made)


def _function_name(recipient: str | None, place: int) -> str:
    space, _, name = (recipient or "").partition(".")
    if space != "functions" or not name:
        raise ChatFormatError(f"message {place}: chat templates know tools of `functions` only, not {recipient!r}")
    return name


def _answered(calls: list[tuple[str, str]], name: str) -> str:
    """The id of the earliest open call of the tool, which is then no longer open."""
    for call in calls:
        if call[0] == name:
            calls.remove(call)
            return call[1]
    raise ChatFormatError(f"a result of {name} has no call in front of it")
