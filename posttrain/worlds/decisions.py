"""Decision tables: an action is named in brackets, and the table says what it is worth."""

import re
from typing import Any

from posttrain.chat.conversation import Message
from posttrain.scoring.calls import final_text
from posttrain.scoring.score import Score

ACTION = re.compile(r"\[(\d+)\]")


class DecisionEnvironment:
    """One turn; the action is the last `[n]` of the final message. None, or one that is not there: unscorable."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.rewards: list[float] = row["reference"]["rewards"]
        self.spoken: list[Message] = []

    def respond(self, messages: list[Message]) -> list[Message]:
        self.spoken += messages
        return []

    def score(self) -> Score:
        named = ACTION.findall(final_text(self.spoken))
        if not named:
            return Score(value=None, reason="no action such as [0] in the final message")
        action = int(named[-1])
        if action >= len(self.rewards):
            return Score(value=None, reason=f"action {action} of {len(self.rewards)}")
        best = max(self.rewards)
        parts = {"reward": self.rewards[action], "optimal": float(self.rewards[action] == best)}
        return Score(value=parts["reward"], parts=parts)
