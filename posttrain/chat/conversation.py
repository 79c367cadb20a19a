"""Conversation: the one shape every data source becomes and every renderer reads."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Role = Literal["system", "developer", "user", "assistant", "tool"]
Channel = Literal["analysis", "commentary", "final"]


class Tool(BaseModel):
    """A function offered to the model; `parameters` is a JSON schema of type object."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str
    parameters: dict[str, Any]


class Message(BaseModel):
    """One message.

    A tool call is an assistant message on `commentary` whose `recipient` is `functions.<name>` and whose
    content is the arguments' JSON text. A tool's result has role `tool` and `sender` `functions.<name>`.
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
    instructions: str | None = None
    """The developer message's text."""
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    """Null is the recipe's."""
    metadata: dict[str, Any] = {}


def call(tool: str, arguments: dict[str, Any], train: bool = True) -> Message:
    """The assistant's call of `tool`, arguments in their given order as compact JSON."""
    text = json.dumps(arguments, separators=(",", ":"), ensure_ascii=False)
    return Message(role="assistant", channel="commentary", recipient=f"functions.{tool}", content=text, train=train)


def tool_result(tool: str, content: str) -> Message:
    return Message(role="tool", sender=f"functions.{tool}", content=content)
