"""A recipe without training: three prepare phases, one of them with gates, on the model folder `model`."""

from typing import Annotated

from posttrain.recipe.types import (
    NOTHING_SUGGESTED,
    Dataset,
    FolderBase,
    FreshBase,
    Gate,
    HarmonyFormat,
    PreparePhase,
    Recipe,
    WorldSource,
)


def dataset(name: str, world: str, content: str, count: int, seed: int) -> Dataset:
    source = WorldSource(kind="world", world=world, split="train", count=count, seed=seed)
    return Dataset(name=name, content=content, sources=(source,), max_tokens=4096, too_long="drop", faulty_share=0.0)  # type: ignore[arg-type]


def gate(name: str, least: int, hard: bool) -> Gate:
    return Gate(
        name=name,
        metric="calls.rows",
        reduction="value",
        window=1,
        comparison=">=",
        threshold=least,
        minimum_steps=0,
        hard=hard,
    )


def small_recipe(
    rows: Annotated[int, "Rows per dataset"] = 6,
    least: Annotated[int, "Rows that the hard gate asks for"] = 1,
    seed: Annotated[int, "Seed of the data"] = 0,
    fresh: Annotated[bool, "Make a vocabulary instead of using the folder 'model'"] = False,
) -> Recipe:
    """Three prepare phases and nothing else."""
    folder = FolderBase(kind="folder", path="model")
    made = FreshBase(
        kind="fresh",
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        num_experts=2,
        experts_per_token=1,
        expert_size=16,
        vocab_size=512,
        sliding_window=16,
        initializer_range=0.02,
    )
    chat = HarmonyFormat(
        kind="harmony",
        date="2025-01-01",
        knowledge_cutoff="2024-06",
        reasoning_effort="low",
        identity="You are a model.",
    )
    phases = (
        PreparePhase(
            kind="prepare", name="words", gates=(), datasets=(dataset("text", "language", "text", rows, seed),)
        ),
        PreparePhase(
            kind="prepare",
            name="calls",
            gates=(gate("enough-rows", least, True), gate("many-rows", 1000, False)),
            datasets=(
                dataset("calls", "tools", "conversations", rows, seed),
                dataset("choices", "preferences", "pairs", rows, seed),
            ),
        ),
        PreparePhase(kind="prepare", name="jobs", gates=(), datasets=(dataset("jobs", "tools", "tasks", rows, seed),)),
    )
    flags = {"rows": rows, "least": least, "seed": seed, "fresh": fresh}
    return Recipe(
        name="small",
        flags=flags,
        seed=seed,
        base=made if fresh else folder,
        chat=chat,
        phases=phases,
        suggested=NOTHING_SUGGESTED,
    )
