"""Questions with one right answer: the final message is compared, nothing else is read."""

from collections.abc import Callable, Mapping
from typing import Any

from posttrain.chat.conversation import Message
from posttrain.scoring.calls import final_text
from posttrain.scoring.score import Score


class AnswerEnvironment:
    """One turn; `judge` compares its final message with the task's reference."""

    def __init__(self, judge: Callable[[Mapping[str, Any], str], Score], row: dict[str, Any]) -> None:
        self.judge = judge
        self.reference = row["reference"]
        self.spoken: list[Message] = []

    def respond(self, messages: list[Message]) -> list[Message]:
        self.spoken += messages
        return []

    def score(self) -> Score:
        return self.judge(self.reference, final_text(self.spoken))


def answered(row: dict[str, Any]) -> dict[str, Any]:
    """A task as a conversation that ends in its solution."""
    prompt = row["prompt"]
    return {"conversation": {**prompt, "messages": [*prompt["messages"], *row["solution"]]}}
