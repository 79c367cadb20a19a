"""Reverse world: a text written from its last letter to its first."""

import random
from typing import Any

from posttrain.chat.conversation import Conversation, Message
from posttrain.worlds.answers import answered
from posttrain.worlds.names import Split, names

REQUESTS = ("Write this text from its last letter to the first: {}", "Reverse the letters of: {}", "Turn round: {}")


def task(rng: random.Random, split: Split) -> dict[str, Any]:
    text = " ".join(names(rng, split, rng.randint(1, 4)))
    return {
        "world": "answers",
        "prompt": Conversation(
            messages=(Message(role="user", content=rng.choice(REQUESTS).format(text)),)
        ).model_dump(),
        "reference": {"kind": "similarity", "answer": text[::-1]},
        "solution": [Message(role="assistant", channel="final", content=text[::-1]).model_dump()],
    }


def conversation(rng: random.Random, split: Split) -> dict[str, Any]:
    return answered(task(rng, split))
