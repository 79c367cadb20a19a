"""Recorded tool calls: what somebody asked is asked again, and the first call compared with those made then."""

import json
from typing import Any

from posttrain.chat.conversation import Conversation, Message
from posttrain.scoring.calls import first_call
from posttrain.scoring.score import Score


def task(conversation: Conversation) -> dict[str, Any] | None:
    """A conversation as a task: it ends before the first call, whose alternatives are those made beside it.

    None where nothing is called, or no user asked for it.
    """
    messages = conversation.messages
    called = next((place for place, message in enumerate(messages) if _calls(message)), None)
    if called is None:
        return None
    asked = max((place for place in range(called) if messages[place].role == "user"), default=None)
    if asked is None:
        return None
    beside = next((place for place in range(called, len(messages)) if not _calls(messages[place])), len(messages))
    calls = [
        {"tool": str(message.recipient).removeprefix("functions."), "arguments": json.loads(message.content)}
        for message in messages[called:beside]
    ]
    return {
        "world": "calls",
        "prompt": conversation.model_copy(update={"messages": messages[: asked + 1]}),
        "reference": {"calls": calls},
        "solution": messages[asked + 1 : called + 1],
    }


def _calls(message: Message) -> bool:
    return message.role == "assistant" and message.recipient is not None


class CallEnvironment:
    """One turn: nothing answers the call. Of calls made side by side any may come first.

    `tool` and `arguments` are those of the alternative that the call is nearest to.
    """

    def __init__(self, row: dict[str, Any]) -> None:
        self.calls = row["reference"]["calls"]
        self.spoken: list[Message] = []

    def respond(self, messages: list[Message]) -> list[Message]:
        self.spoken += messages
        return []

    def score(self) -> Score:
        made = first_call(self.spoken)
        parts = {"format": 0.0, "tool": 0.0, "arguments": 0.0, "exact": 0.0}
        if made is not None:
            pairs = [
                (float(made.tool == call["tool"]), float(made.matches_arguments(call["arguments"])))
                for call in self.calls
            ]
            parts["format"] = float(made.arguments is not None)
            parts["tool"], parts["arguments"] = max(pairs)
            parts["exact"] = parts["tool"] * parts["arguments"]
        return Score(value=parts["exact"], parts=parts, reason=None)
