"""Conversations of wanted lengths out of real text: the sources of Python's standard library, words and code alike."""

import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.chat.conversation import Conversation, Message, Tool, call, tool_result

TOOL_SETS = 64
"""Sets of tools that the conversations with calls take turns with, as a data set of one agent has them."""


def library_text() -> str:
    """Every module of the standard library, one after another: about 10 MB, a few characters of which are no ASCII."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "".join(path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("*.py")))


def conversations(number: int, median: float, sigma: float, cap: float, seed: int) -> Iterator[Conversation]:
    """Texts of lognormal lengths in characters; every second one calls a tool."""
    rng, text = random.Random(seed), library_text()
    lengths = np.exp(np.random.default_rng(seed).normal(np.log(median), sigma, number))
    tool_sets = [tuple(_tool(rng, number) for number in range(rng.randint(1, 4))) for _ in range(TOOL_SETS)]
    for place, length in enumerate(np.clip(lengths, 1, cap)):

        def passage(share: float, budget: float = length) -> str:
            size = max(8, int(budget * share))
            start = rng.randrange(len(text) - size)
            return text[start : start + size]

        yield _with_call(rng, passage, tool_sets[place % TOOL_SETS]) if place % 2 else _plain(passage)


def _plain(passage: Any) -> Conversation:
    messages = (
        Message(role="user", content=passage(0.3)),
        Message(role="assistant", channel="analysis", content=passage(0.2)),
        Message(role="assistant", channel="final", content=passage(0.5)),
    )
    return Conversation(messages=messages, instructions="Answer briefly.")


def _with_call(rng: random.Random, passage: Any, tools: tuple[Tool, ...]) -> Conversation:
    tool = rng.choice(tools)
    arguments = {name: passage(0.05) for name in tool.parameters["properties"]}
    messages = (
        Message(role="user", content=passage(0.2)),
        Message(role="assistant", channel="analysis", content=passage(0.1)),
        call(tool.name, arguments),
        tool_result(tool.name, passage(0.3)),
        Message(role="assistant", channel="analysis", content=passage(0.1)),
        Message(role="assistant", channel="final", content=passage(0.2)),
    )
    return Conversation(messages=messages, tools=tools, instructions="Use the tools.")


def _tool(rng: random.Random, number: int) -> Tool:
    verb, noun = rng.choice(("read", "find", "list", "write")), rng.choice(("file", "row", "user", "test"))
    names = rng.sample(["path", "pattern", "limit", "encoding"], rng.randint(1, 3))
    properties = {name: {"type": "string", "description": f"The {name} of the {noun}"} for name in names}
    parameters = {"type": "object", "properties": properties, "required": names[:1]}
    return Tool(name=f"{verb}_{noun}_{number}", description=f"{verb.capitalize()} a {noun}.", parameters=parameters)


def as_template_row(conversation: Conversation) -> dict[str, Any]:
    """The same conversation as a chat template reads it; schemas as text, which a table's columns can hold."""
    messages = [_template_message("developer", conversation.instructions or "")]
    thought = None
    for message in conversation.messages:
        if message.channel == "analysis":
            thought = message.content
            continue
        told = _template_message(message.role, message.content, thought)
        if message.recipient is not None:
            function = {"name": message.recipient.removeprefix("functions."), "arguments": message.content}
            told |= {"content": "", "tool_calls": [{"type": "function", "function": function}]}
        if message.sender is not None:
            told["name"] = message.sender.removeprefix("functions.")
        messages.append(told)
        thought = None
    tools = [{"type": "function", "function": tool.model_dump()} for tool in conversation.tools]
    return {"messages": messages, "tools": json.dumps(tools)}


def _template_message(role: str, content: str, thought: str | None = None) -> dict[str, Any]:
    return {"role": role, "content": content, "thinking": thought, "tool_calls": None, "name": None}
