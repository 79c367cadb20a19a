"""Sums world: short word problems in GSM8K's form, worked line by line, the answer behind `####`."""

import random
import zlib
from typing import Any

from posttrain.chat.conversation import Conversation, Message
from posttrain.worlds.answers import answered
from posttrain.worlds.names import Split, name

GAINS, LOSSES = ("find", "order", "load", "book"), ("sell", "send", "rent", "cancel")
STORIES = (
    "{who} has {a} {what}. {steps} What is the number of {what} now?",
    "We start with {a} {what}. {steps} What is the number?",
    "{who} can count {a} {what}. {steps} What is the number now?",
)
TOLERANCE = 0.01


def _problem(rng: random.Random, split: Split) -> tuple[int, list[tuple[str, int]]]:
    """A start and one or two changes that never go below 0; one problem in eight is held out."""
    while True:
        start = total = rng.randint(2, 12)
        changes: list[tuple[str, int]] = []
        for _ in range(rng.randint(1, 2)):
            sign, most = rng.choice((("+", 9), ("-", min(9, total))))
            changes.append((sign, rng.randint(1, max(1, most))))
            total += changes[-1][1] if sign == "+" else -changes[-1][1]
        held = zlib.crc32(repr((start, changes)).encode()) % 8 == 0
        if total >= 0 and held == (split == "heldout"):
            return start, changes


def task(rng: random.Random, split: Split) -> dict[str, Any]:
    start, changes = _problem(rng, split)
    who, what = name(rng, split), name(rng, split)
    lines: list[str] = []
    told: list[str] = []
    total = start
    for sign, amount in changes:
        after = total + amount if sign == "+" else total - amount
        told.append(f"{'Then we' if told else 'We'} {rng.choice(GAINS if sign == '+' else LOSSES)} {amount}.")
        lines.append(f"{total} {sign} {amount} = {after}")
        total = after
    text = rng.choice(STORIES).format(who=who, a=start, what=what, steps=" ".join(told))
    worked = "\n".join([*lines, f"#### {total}"])
    return {
        "world": "answers",
        "prompt": Conversation(messages=(Message(role="user", content=text),)).model_dump(),
        "reference": {"kind": "number", "answer": float(total), "tolerance": TOLERANCE},
        "solution": [Message(role="assistant", channel="final", content=worked).model_dump()],
    }


def conversation(rng: random.Random, split: Split) -> dict[str, Any]:
    return answered(task(rng, split))
