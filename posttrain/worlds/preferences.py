"""Preference world: doing the work against promising to."""

import random
from typing import Any

from posttrain.chat.conversation import Message
from posttrain.worlds import repair, tools
from posttrain.worlds.names import Split

STALLS: dict[Split, tuple[str, ...]] = {
    "train": (
        "I will do the rest later.",
        "The rest follows soon.",
        "More of this later.",
        "I stop here for now.",
        "Now you can do the rest.",
        "I will look at it soon.",
    ),
    "heldout": (
        "You can do the rest now.",
        "I will stop here, more follows later.",
        "The rest of this is for you.",
        "Soon I will do more.",
    ),
}
KEPT_SHARE = 0.3


def pair(rng: random.Random, split: Split) -> dict[str, Any]:
    """Chosen: the turn up to its call, or its answer after the result. Rejected: 30 % of that text, then a stall."""
    row = (tools if rng.random() < 0.6 else repair).task(rng, split)
    prompt, (thought, made, result, final) = row["prompt"], row["solution"]
    if rng.random() < 0.7:
        chosen = [thought, made]
        text = f"{thought['content']} {made['content']}"
    else:
        prompt = {**prompt, "messages": [*prompt["messages"], thought, made, result]}
        chosen = [final]
        text = final["content"]
    kept = text[: max(1, round(len(text) * KEPT_SHARE))].rstrip()
    stall = Message(role="assistant", channel="final", content=f"{kept}... {rng.choice(STALLS[split])}")
    return {"prompt": prompt, "chosen": chosen, "rejected": [stall.model_dump()]}
