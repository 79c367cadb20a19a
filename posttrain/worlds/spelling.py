"""Spelling world: words letter by letter, how often a letter is in them, and words turned round."""

import random
from collections.abc import Callable
from typing import Any

from posttrain.chat.conversation import Conversation, Message
from posttrain.scoring.calls import final_text
from posttrain.scoring.score import Score
from posttrain.worlds.names import Split, name

COMMON = (
    "apple", "banana", "bottle", "butter", "camera", "candle", "carpet", "cherry", "circle", "coffee", "cotton",
    "dinner", "engine", "family", "flower", "forest", "garden", "hammer", "island", "jacket", "kitten", "ladder",
    "lemon", "marble", "mirror", "needle", "office", "orange", "pepper", "pencil", "pillow", "planet", "pocket",
    "puzzle", "rabbit", "ribbon", "rocket", "saddle", "school", "shadow", "silver", "spider", "spring", "strawberry",
    "summer", "sunset", "tablet", "teapot", "ticket", "tunnel", "turtle", "valley", "violin", "wallet", "window",
    "winter", "wizard", "yellow", "zipper", "committee", "mississippi", "bookkeeper", "raspberry", "successful",
)  # fmt: skip
HELDOUT = frozenset(("strawberry", "mississippi", "ladder", "puzzle", "cotton", "violin", "rocket", "school"))
"""Words that training never sees."""
SPELL = ("Spell the word {}.", "How is {} spelled?", "Write {} letter by letter.", "Please spell {} for me.")
COUNT = (
    "How many times is the letter {1} in {0}?",
    "How many {1} are in the word {0}?",
    "Count the letter {1} in {0}.",
    "In {0}, how often does {1} come up?",
)
REVERSE = ("Write {} backwards.", "Reverse the word {}.", "What is {} from the end to the start?")


def _word(rng: random.Random, split: Split) -> str:
    """A common word or a made-up name that belongs to the split."""
    if rng.random() < 0.5:
        return name(rng, split)
    return rng.choice([word for word in COMMON if (word in HELDOUT) == (split == "heldout")])


def _spell(rng: random.Random, word: str) -> tuple[str, str, str]:
    return rng.choice(SPELL).format(word), "-".join(word), "-".join(word)


def _count(rng: random.Random, word: str) -> tuple[str, str, str]:
    letter = rng.choice(word if rng.random() < 0.85 else "qxjvw")
    places = [str(place) for place, one in enumerate(word, 1) if one == letter]
    found = f"{letter} is at {', '.join(places)}" if places else f"{letter} is not in it"
    worked = f"{'-'.join(word)}: {found}.\n#### {len(places)}"
    return rng.choice(COUNT).format(word, letter), worked, str(len(places))


def _reverse(rng: random.Random, word: str) -> tuple[str, str, str]:
    return rng.choice(REVERSE).format(word), word[::-1], word[::-1]


EXERCISES: tuple[Callable[[random.Random, str], tuple[str, str, str]], ...] = (_spell, _count, _reverse)


def task(rng: random.Random, split: Split) -> dict[str, Any]:
    asked, worked, right = rng.choice(EXERCISES)(rng, _word(rng, split))
    return {
        "world": "spelling",
        "prompt": Conversation(messages=(Message(role="user", content=asked),)).model_dump(),
        "reference": {"answer": right},
        "solution": [Message(role="assistant", channel="final", content=worked).model_dump()],
    }


def conversation(rng: random.Random, split: Split) -> dict[str, Any]:
    row = task(rng, split)
    return {"conversation": {**row["prompt"], "messages": [*row["prompt"]["messages"], *row["solution"]]}}


class SpellingEnvironment:
    """One turn; the answer is what stands behind `####`, else the whole final message."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.reference = row["reference"]
        self.spoken: list[Message] = []

    def respond(self, messages: list[Message]) -> list[Message]:
        self.spoken += messages
        return []

    def score(self) -> Score:
        said = final_text(self.spoken).rpartition("####")[2].strip().rstrip(".")
        parts = {"format": float(bool(said)), "exact": float(said == self.reference["answer"])}
        return Score(value=parts["exact"], parts=parts, answer=said or None)
