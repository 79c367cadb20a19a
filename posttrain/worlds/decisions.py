"""Decision tables: an action is named in brackets, and the table says what it is worth."""

import random
from typing import Any

from posttrain.chat.conversation import Conversation, Message


def _said(action: int) -> Message:
    return Message(role="assistant", channel="final", content=f"[{action}]")


def decision_task(prompt: Conversation, reference: dict[str, Any], thought: str = "") -> dict[str, Any]:
    """A task row; the reference holds `rewards` and may hold `q_values`.

    The solution is the lowest best action, behind the thought where there is one.
    """
    values = reference.get("q_values", reference["rewards"])
    thoughts = [Message(role="assistant", channel="analysis", content=thought)] if thought else []
    return {
        "world": "decisions",
        "prompt": prompt.model_dump(),
        "reference": reference,
        "solution": [message.model_dump() for message in (*thoughts, _said(values.index(max(values))))],
    }


def open_choice(rng: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    """A task as a conversation in which any action is taken: it teaches how to answer, and nothing of what."""
    *thoughts, _ = row["solution"]
    answer = _said(rng.randrange(len(row["reference"]["rewards"])))
    prompt = row["prompt"]
    return {"conversation": {**prompt, "messages": [*prompt["messages"], *thoughts, answer.model_dump()]}}
