"""Alphabet world: names put in order, from the first letter of the alphabet on or from the last."""

import random
from typing import Any

from posttrain.chat.conversation import Conversation, Message
from posttrain.worlds.answers import answered
from posttrain.worlds.names import Split, names

REQUESTS = {False: ("Sort from a to z: {}", "Put in alphabetical order: {}"), True: ("Sort from z to a: {}",)}


def task(rng: random.Random, split: Split) -> dict[str, Any]:
    words, backwards = names(rng, split, rng.randint(2, 6)), rng.random() < 0.25
    request = rng.choice(REQUESTS[backwards]).format(", ".join(words))
    answer = ", ".join(sorted(words, reverse=backwards))
    return {
        "world": "answers",
        "prompt": Conversation(messages=(Message(role="user", content=request),)).model_dump(),
        "reference": {"kind": "similarity", "answer": answer},
        "solution": [Message(role="assistant", channel="final", content=answer).model_dump()],
    }


def conversation(rng: random.Random, split: Split) -> dict[str, Any]:
    return answered(task(rng, split))
