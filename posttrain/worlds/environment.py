"""What a world's environment promises to whoever plays episodes in it."""

from typing import Protocol

from posttrain.chat.conversation import Message
from posttrain.scoring.score import Score


class Environment(Protocol):
    def respond(self, messages: list[Message]) -> list[Message]:
        """Take the messages of one assistant turn, give the tool results; empty when the episode is over."""
        ...

    def score(self) -> Score:
        """Of the episode, once it is over; called by any thread, while other environments answer."""
        ...
