"""GRPO on texts turned round, with everything that chooses episodes, on the shipped tiny base, and an evaluation."""

from typing import Annotated

from posttrain.recipe.types import (
    NOTHING_SUGGESTED,
    ContinueAdapter,
    Dapo,
    EpisodeFilters,
    EvaluatePhase,
    FolderBase,
    GrpoPhase,
    Lora,
    PreparePhase,
    Recipe,
    SampleBatch,
    Sampling,
    SftPhase,
    Stage,
)
from posttrain.recipes.quickstart import CHAT, adamw, dataset

SAMPLING = Sampling(temperature=1.0, top_p=0.95, top_k=50, max_new_tokens=24, max_turns=2)


def small_grpo(seed: Annotated[int, "Seed of data, order, adapter and sampling"] = 0) -> Recipe:
    """From shorter prompts to longer ones."""
    phases = (
        PreparePhase(
            kind="prepare",
            name="data",
            datasets=(
                dataset("calls", "conversations", ("reverse", 64), seed=seed),
                dataset("tasks", "tasks", ("reverse", 24), seed=seed + 1),
                dataset("heldout", "tasks", ("reverse", 6), split="heldout", seed=seed),
            ),
            gates=(),
        ),
        SftPhase(
            kind="sft",
            name="opening",
            model="base",
            dataset="calls",
            trainable=Lora(kind="lora", rank=4, alpha=8, targets=("q_proj", "o_proj", "experts")),
            precision="float32",
            batch=SampleBatch(kind="samples", samples=8),
            steps=10,
            optimizer=adamw(3e-3),
            held_out=None,
            gates=(),
        ),
        GrpoPhase(
            kind="grpo",
            name="grpo",
            model="opening",
            dataset="tasks",
            trainable=ContinueAdapter(kind="continue"),
            precision="float32",
            objective=Dapo(kind="dapo", clip_low=0.2, clip_high=0.28),
            kl_weight=0.0,
            sampler_ratio_cap=None,
            groups_per_step=2,
            spare_groups=2,
            group_size=4,
            filters=EpisodeFilters(at_least_tokens=3, duplicates="masked", overlong="scored"),
            curriculum=(
                Stage(from_step=1, max_prompt_tokens=84, max_turns=1, tiers=None),
                Stage(from_step=2, max_prompt_tokens=1024, max_turns=2, tiers=None),
            ),
            steps=4,
            updates_per_rollout=1,
            reward={"similarity": 1.0},
            pass_mark=1.0,
            sampling=SAMPLING,
            optimizer=adamw(1e-3),
            held_out=None,
            gates=(),
        ),
        EvaluatePhase(
            kind="evaluate",
            name="evaluation",
            model="grpo",
            datasets=("heldout",),
            shots=0,
            vote=None,
            sampling=SAMPLING.model_copy(update={"temperature": 0.0}),
            precision="float32",
            gates=(),
        ),
    )
    base = FolderBase(kind="folder", path="shipped:tiny")
    return Recipe(
        name="small_grpo",
        flags={"seed": seed},
        seed=seed,
        base=base,
        chat=CHAT,
        suggested=NOTHING_SUGGESTED,
        phases=phases,
    )
