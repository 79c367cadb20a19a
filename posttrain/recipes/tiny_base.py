"""How the tiny base inside the package was made: a small GPT-OSS trained from nothing on the tiny worlds' language."""

from typing import Annotated

from posttrain.recipe.types import (
    NOTHING_SUGGESTED,
    AdamW,
    Dataset,
    FreshBase,
    FullParameters,
    Gate,
    MergePhase,
    PreparePhase,
    Recipe,
    SampleBatch,
    SftPhase,
    WorldSource,
)
from posttrain.recipes.quickstart import CHAT


def tiny_base(
    seed: Annotated[int, "Seed of the weights, the documents and their order"] = 0,
    documents: Annotated[int, "Documents of the tiny worlds' language to generate"] = 400_000,
    steps: Annotated[int, "Training steps of 128 documents"] = 3000,
) -> Recipe:
    """Train the tiny base from nothing: copying, JSON and small Python, but none of the quickstart's tasks."""
    flags: dict[str, str | int | float | bool | None] = {"seed": seed, "documents": documents, "steps": steps}
    base = FreshBase(
        kind="fresh",
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        num_experts=8,
        experts_per_token=2,
        expert_size=128,
        vocab_size=1024,
        sliding_window=128,
        initializer_range=0.06,
    )
    phases = (
        text_data("data", "language", ("language", documents), seed=seed),
        pretraining("pretrain", "base", "language", steps, learning_rate=4e-3),
        text_data("more_data", "words", ("words", documents // 8), ("language", documents // 8), seed=seed + 1),
        pretraining("widen", "pretrain", "words", steps // 4, learning_rate=2e-3),
        MergePhase(kind="merge", name="store", model="widen", dtype="bfloat16", gates=()),
    )
    return Recipe(
        name="tiny_base", flags=flags, seed=seed, base=base, chat=CHAT, phases=phases, suggested=NOTHING_SUGGESTED
    )


def text_data(name: str, dataset: str, *worlds: tuple[str, int], seed: int) -> PreparePhase:
    sources = tuple(
        WorldSource(kind="world", world=world, split="train", count=count, seed=seed) for world, count in worlds
    )
    return PreparePhase(
        kind="prepare",
        name=name,
        datasets=(
            Dataset(name=dataset, content="text", sources=sources, max_tokens=1024, too_long="drop", faulty_share=0.0),
        ),
        gates=(),
    )


def pretraining(name: str, model: str, dataset: str, steps: int, learning_rate: float) -> SftPhase:
    return SftPhase(
        kind="sft",
        name=name,
        model=model,
        dataset=dataset,
        trainable=FullParameters(kind="full"),
        precision="float32",
        batch=SampleBatch(kind="samples", samples=128),
        steps=steps,
        optimizer=AdamW(
            learning_rate=learning_rate,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.98,
            epsilon=1e-8,
            clip_norm=1.0,
            schedule="cosine",
            warmup_share=0.03,
            final_share=0.05,
            groups=(),
            moments="float32",
        ),
        held_out=None,
        gates=(
            Gate(
                name="loss",
                metric="loss",
                reduction="mean_last",
                window=10,
                comparison="<=",
                threshold=2.5,
                minimum_steps=10,
                hard=True,
            ),
        ),
    )
