"""How the tiny base inside the package was made: a small GPT-OSS trained from nothing on the tiny worlds' language."""

from typing import Annotated

from posttrain.recipe.types import (
    AdamW,
    Dataset,
    FreshBase,
    FullParameters,
    Gate,
    MergePhase,
    PreparePhase,
    Recipe,
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
    prepare = PreparePhase(
        kind="prepare",
        name="data",
        datasets=(
            Dataset(
                name="language",
                content="text",
                sources=(WorldSource(kind="world", world="language", split="train", count=documents, seed=seed),),
                max_tokens=1024,
            ),
        ),
        gates=(),
    )
    pretrain = SftPhase(
        kind="sft",
        name="pretrain",
        model="base",
        dataset="language",
        trainable=FullParameters(kind="full"),
        precision="float32",
        samples_per_step=128,
        steps=steps,
        optimizer=AdamW(
            learning_rate=4e-3,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.98,
            epsilon=1e-8,
            clip_norm=1.0,
            schedule="cosine",
            warmup_share=0.03,
            final_share=0.05,
        ),
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
    store = MergePhase(kind="merge", name="store", model="pretrain", dtype="bfloat16", gates=())
    return Recipe(name="tiny_base", flags=flags, seed=seed, base=base, chat=CHAT, phases=(prepare, pretrain, store))
