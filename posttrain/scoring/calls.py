"""Reads tool calls and final answers out of the messages a model wrote, and compares them by value."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.chat.conversation import Message


@dataclass(frozen=True)
class ToolCall:
    tool: str
    arguments: dict[str, Any] | None
    """None: the text is no JSON object."""

    def matches_arguments(self, expected: dict[str, Any]) -> bool:
        """Equal as JSON values, whatever the order of the keys; 1, 1.0 and true are three different values."""
        return self.arguments is not None and _canonical(self.arguments) == _canonical(expected)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _object(text: str) -> dict[str, Any] | None:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key is given twice")
        return dict(pairs)

    try:
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def first_call(messages: Sequence[Message]) -> ToolCall | None:
    for message in messages:
        if message.role == "assistant" and message.recipient is not None:
            return ToolCall(message.recipient.removeprefix("functions."), _object(message.content))
    return None


def final_text(messages: Sequence[Message]) -> str:
    """The last final message's text, empty if there is none."""
    finals = [m.content for m in messages if m.role == "assistant" and m.channel == "final"]
    return finals[-1] if finals else ""
