"""SFT on a base of any size, for what is said of memory and disk."""

from typing import Annotated

from posttrain.recipe.types import (
    NOTHING_SUGGESTED,
    FolderBase,
    FreshBase,
    Lora,
    PreparePhase,
    Recipe,
    SampleBatch,
    SftPhase,
)
from posttrain.recipes.quickstart import CHAT, TARGETS, adamw, dataset


def sized(
    hidden: Annotated[int, "Width of a fresh base; 0 is the tiny one"] = 0,
    samples: Annotated[int, "Samples per step"] = 4,
    steps: Annotated[int, "Steps"] = 3,
) -> Recipe:
    """A prepare phase and an SFT phase."""
    fresh = FreshBase(
        kind="fresh",
        hidden_size=max(hidden, 32),
        num_layers=4,
        num_heads=max(hidden, 32) // 16,
        num_kv_heads=1,
        head_dim=16,
        num_experts=8,
        experts_per_token=2,
        expert_size=max(hidden, 32),
        vocab_size=1024,
        sliding_window=64,
        initializer_range=0.02,
    )
    train = SftPhase(
        kind="sft",
        name="train",
        model="base",
        dataset="tool_calls",
        trainable=Lora(kind="lora", rank=16, alpha=32, targets=TARGETS),
        precision="float32",
        batch=SampleBatch(kind="samples", samples=samples),
        steps=steps,
        optimizer=adamw(1e-3),
        held_out=None,
        gates=(),
    )
    sets = (dataset("tool_calls", "conversations", ("tools", 400), seed=0),)
    return Recipe(
        name="sized",
        flags={"hidden": hidden, "samples": samples, "steps": steps},
        seed=0,
        base=fresh if hidden else FolderBase(kind="folder", path="shipped:tiny"),
        chat=CHAT,
        phases=(PreparePhase(kind="prepare", name="data", datasets=sets, gates=()), train),
        suggested=NOTHING_SUGGESTED,
    )
