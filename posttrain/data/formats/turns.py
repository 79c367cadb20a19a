"""Writes a conversation turn by turn: channels, calls and results as the rest of the project expects them."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from posttrain.chat.conversation import Conversation, Message, Tool, call, tool_result
from posttrain.data.formats.format import BadRow, from_json, kind


class Turns:
    """`field` names the column in faults."""

    def __init__(self, field: str) -> None:
        self.field = field
        self.messages: list[Message] = []
        self.instructions: list[str] = []
        self._unanswered: list[tuple[str | None, str]] = []

    def system(self, text: str) -> None:
        if self.messages:
            raise BadRow(self.field, "a system message stands after the first turn")
        self.instructions.append(text)

    def user(self, text: str) -> None:
        self.messages.append(Message(role="user", content=text))

    def assistant(self, text: str | None, thinking: str | None = None, train: bool = True) -> None:
        """What is said; it is `final` if it ends the turn, and a preamble on `commentary` otherwise."""
        for channel, content in (("analysis", thinking), ("final", text)):
            if content is not None and content.strip():
                self.messages.append(Message(role="assistant", channel=channel, content=content, train=train))

    def call(self, tool: str, arguments: Any, call_id: str | None = None, train: bool = True) -> None:
        if not isinstance(arguments, dict):
            raise BadRow(self.field, f"the arguments of {tool!r} are {kind(arguments)}, not an object")
        self.messages.append(call(tool, arguments, train))
        self._unanswered.append((call_id, tool))

    def result(self, content: str, tool: str | None = None, call_id: str | None = None) -> None:
        """The result of the call with this id, of this tool, or of the oldest call that has none yet."""
        for place, (its_id, its_tool) in enumerate(self._unanswered):
            if (call_id is None or its_id in (None, call_id)) and tool in (None, its_tool):
                tool = its_tool
                del self._unanswered[place]
                break
        if tool is None:
            raise BadRow(self.field, "a tool's result answers no call")
        self.messages.append(tool_result(tool, content))

    def finished(self) -> tuple[Message, ...]:
        return tuple(
            message.model_copy(update={"channel": "commentary"})
            if message.channel == "final" and not _ends_turn(self.messages, place)
            else message
            for place, message in enumerate(self.messages)
        )

    def conversation(self, tools: Sequence[Tool] = (), metadata: dict[str, Any] | None = None) -> Conversation:
        """All of it; BadRow where the assistant says nothing that could be learned."""
        if not any(message.role == "assistant" for message in self.messages):
            raise BadRow(self.field, "the assistant says nothing in it")
        return self.prompt(tools, metadata)

    def prompt(self, tools: Sequence[Tool] = (), metadata: dict[str, Any] | None = None) -> Conversation:
        if not self.messages:
            raise BadRow(self.field, "no message is in it")
        instructions = "\n\n".join(self.instructions) or None
        return Conversation(
            messages=self.finished(), tools=tuple(tools), instructions=instructions, metadata=metadata or {}
        )


def _ends_turn(messages: list[Message], place: int) -> bool:
    return place + 1 == len(messages) or messages[place + 1].role == "user"


def asked_and_answered(
    question: str, answer: str, instructions: str | None = None, metadata: dict[str, Any] | None = None
) -> Conversation:
    """One user turn and its answer."""
    turns = Turns("conversation")
    if instructions:
        turns.system(instructions)
    turns.user(question)
    turns.assistant(answer)
    return turns.conversation(metadata=metadata)


def question(text: str, metadata: dict[str, Any] | None = None) -> Conversation:
    """One user turn that waits for its answer."""
    return Conversation(messages=(Message(role="user", content=text),), metadata=metadata or {})


def answer(text: str) -> Message:
    return Message(role="assistant", channel="final", content=text)


def offered(value: Any, field: str) -> tuple[Tool, ...]:
    """Tools from OpenAI's shape (`{"type": "function", "function": {...}}`), with or without its wrapping."""
    value = from_json(value, field)
    if value is None:
        return ()
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(field, f"is {kind(value)}, not a list of tools")
    return tuple(_unique(_tool(one, field) for one in value))


def _unique(tools: Iterable[Tool]) -> Iterable[Tool]:
    seen: set[str] = set()
    for tool in tools:
        if tool.name not in seen:
            seen.add(tool.name)
            yield tool


def _tool(value: Any, field: str) -> Tool:
    value = from_json(value, field)
    function = value.get("function", value) if isinstance(value, dict) else value
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow(field, "a tool has no name")
    parameters = from_json(function.get("parameters"), field)
    if not isinstance(parameters, dict | None):
        raise BadRow(field, f"the parameters of {function['name']!r} are {kind(parameters)}, not an object")
    return Tool(
        name=function["name"], description=function.get("description") or "", parameters=_without_nothing(parameters)
    )


def _without_nothing(value: Any) -> Any:
    """Arrow fills the keys that other rows have with nulls; in a schema a null says nothing."""
    if isinstance(value, dict):
        return {key: _without_nothing(inner) for key, inner in value.items() if inner is not None}
    return [_without_nothing(inner) for inner in value] if isinstance(value, list) else value


def as_text(value: Any) -> str:
    """A tool's result as text: text as it is, anything else as compact JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
