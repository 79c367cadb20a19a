"""Decision tables: an action is named in brackets, and the table says what it is worth."""

import random
from typing import Any

from posttrain.chat.conversation import Conversation, Message


def _said(action: int) -> dict[str, Any]:
    return Message(role="assistant", channel="final", content=f"[{action}]").model_dump()


def decision_task(prompt: Conversation, reference: dict[str, Any]) -> dict[str, Any]:
    """A task row; the reference holds `rewards` and may hold `q_values`, and `rules`: what rules of thumb would do.

    The solution is the lowest best action.
    """
    values = reference.get("q_values", reference["rewards"])
    return {
        "world": "decisions",
        "prompt": prompt.model_dump(),
        "reference": reference,
        "solution": [_said(values.index(max(values)))],
    }


def open_choice(rng: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    """A task as a conversation in which any action is taken: it teaches how to answer, and nothing of what."""
    prompt, answer = row["prompt"], _said(rng.randrange(len(row["reference"]["rewards"])))
    return {"conversation": {**prompt, "messages": [*prompt["messages"], answer]}}
