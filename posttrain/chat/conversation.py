"""Conversation: the one shape every data source becomes and every renderer reads."""

import json
from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

Role = Literal["system", "developer", "user", "assistant", "tool"]
Channel = Literal["analysis", "commentary", "final"]
Effort = Literal["low", "medium", "high"]
BuiltinTool = Literal["browser", "python"]


class Tool(BaseModel):
    """A function offered to the model; `parameters` is a JSON schema of type object, or null if it takes none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str
    parameters: dict[str, Any] | None


class Namespace(BaseModel):
    """Tools under a name other than `functions`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str | None
    tools: tuple[Tool, ...]


class Message(BaseModel):
    """One message.

    A tool call is an assistant message on `commentary` whose `recipient` is `<namespace>.<name>`, such as
    `functions.search`, and whose content is the arguments' JSON text. A call of a built-in tool goes to `python` or
    `browser.<name>`, on `analysis` or `commentary`. A tool's result has role `tool` and the call's recipient as
    `sender`; its channel is the call's, which for null is `analysis` where the tool is built in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    content: str
    channel: Channel | None = None
    recipient: str | None = None
    sender: str | None = None
    train: bool = True
    """False keeps an assistant message as context only; other roles are never targets."""


class Conversation(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    """The namespace `functions`."""
    namespaces: tuple[Namespace, ...] = ()
    builtin_tools: tuple[BuiltinTool, ...] = ()
    """Tools that the model's makers trained it to use and whose descriptions the format fixes."""
    instructions: str | None = None
    """The developer message's text."""
    reasoning_effort: Effort | None = None
    """Null is the recipe's."""
    metadata: dict[str, Any] = {}


def call(tool: str, arguments: dict[str, Any], train: bool = True) -> Message:
    """The assistant's call of `tool`, arguments in their given order as compact JSON."""
    text = json.dumps(arguments, separators=(",", ":"), ensure_ascii=False)
    return Message(role="assistant", channel="commentary", recipient=f"functions.{tool}", content=text, train=train)


def reasoned(prompt: str, steps: Sequence[str], answer: str) -> Conversation:
    """A question, what was thought about it step by step, and the answer."""
    return Conversation(
        messages=(
            Message(role="user", content=prompt),
            *(Message(role="assistant", channel="analysis", content=step) for step in steps),
            Message(role="assistant", channel="final", content=answer),
        )
    )


def tool_result(tool: str, content: str) -> Message:
    return Message(role="tool", sender=f"functions.{tool}", content=content)


def is_builtin(tool: str | None) -> bool:
    """Whether a recipient or sender is one of the built-in tools."""
    return tool is not None and tool.partition(".")[0] in get_args(BuiltinTool)


def turn_start(messages: Sequence[Message]) -> int:
    """The place after the last user message."""
    return max((place + 1 for place, message in enumerate(messages) if message.role == "user"), default=0)


def turn_ends(messages: Sequence[Message]) -> list[int]:
    """The places after which the user speaks again, and the end; a turn that nobody answered has none."""
    return [
        place + 1
        for place, message in enumerate(messages)
        if message.role != "user" and (place == len(messages) - 1 or messages[place + 1].role == "user")
    ]
