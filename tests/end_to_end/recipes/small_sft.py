"""Two phases on the shipped tiny base, for tests of what can go wrong: prepare one dataset, train a few steps on it."""

from typing import Annotated

from posttrain.recipe.types import (
    EVERY_ROW,
    NOTHING_SUGGESTED,
    AdamW,
    Dataset,
    FileSource,
    FolderBase,
    Gate,
    HarmonyFormat,
    Lora,
    PreparePhase,
    Recipe,
    RowBatch,
    SampleBatch,
    SftPhase,
    Source,
    WorldSource,
)


def small_sft(
    rows: Annotated[str, "JSONL file of conversations; generated where empty"] = "",
    learning_rate: Annotated[float, "Learning rate"] = 1e-3,
    loss_limit: Annotated[float, "The hard gate's limit"] = 100.0,
    row_tokens: Annotated[int, "Tokens of a row, two of which are a batch; 0 counts two samples"] = 0,
) -> Recipe:
    """Prepare and train, nothing else."""
    generated = WorldSource(kind="world", world="tools", split="train", count=8, seed=0)
    source: Source = (
        FileSource(kind="file", path=rows, format="rows", filters=(), selection=EVERY_ROW, reasoning_effort=None)
        if rows
        else generated
    )
    gate = Gate(
        name="loss",
        metric="loss",
        reduction="last",
        window=1,
        comparison="<=",
        threshold=loss_limit,
        minimum_steps=1,
        hard=True,
    )
    optimizer = AdamW(
        learning_rate=learning_rate,
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.98,
        epsilon=1e-8,
        clip_norm=1.0,
        schedule="constant",
        warmup_share=0.0,
        final_share=1.0,
        groups=(),
        moments="float32",
    )
    dataset = Dataset(
        name="own", content="conversations", sources=(source,), max_tokens=1024, too_long="drop", faulty_share=0.0
    )
    train = SftPhase(
        kind="sft",
        name="train",
        model="base",
        dataset="own",
        trainable=Lora(kind="lora", rank=2, alpha=4, targets=("q_proj", "experts")),
        precision="float32",
        batch=RowBatch(kind="rows", rows=2, row_tokens=row_tokens)
        if row_tokens
        else SampleBatch(kind="samples", samples=2),
        steps=3,
        optimizer=optimizer,
        held_out=None,
        gates=(gate,),
    )
    return Recipe(
        name="small_sft",
        flags={"rows": rows, "learning_rate": learning_rate, "loss_limit": loss_limit, "row_tokens": row_tokens},
        seed=0,
        base=FolderBase(kind="folder", path="shipped:tiny"),
        chat=HarmonyFormat(
            kind="harmony",
            date="2026-01-01",
            knowledge_cutoff="2024-06",
            reasoning_effort="low",
            identity="You are a helpful assistant.",
        ),
        phases=(PreparePhase(kind="prepare", name="data", datasets=(dataset,), gates=()), train),
        suggested=NOTHING_SUGGESTED,
    )
