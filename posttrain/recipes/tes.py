"""Reinforcement learning on decision tables: thermal energy storage, or any table of Q-values."""

from dataclasses import dataclass
from typing import Annotated, Literal

from posttrain.recipe.types import (
    EVERY_EPISODE,
    NOTHING_SUGGESTED,
    USUAL_TOLERANCES,
    AdamW,
    Base,
    Candidate,
    ContinueAdapter,
    Dataset,
    DrGrpo,
    EvaluatePhase,
    ExportPhase,
    FolderBase,
    GrpoPhase,
    HarmonyFormat,
    HubBase,
    Lora,
    Phase,
    PreparePhase,
    Recipe,
    SampleBatch,
    Sampling,
    SftPhase,
    Vote,
    WorldSource,
)
from posttrain.recipes._hub import dataset
from posttrain.recipes._tes_data import PROMPT_TOKENS, tes_data
from posttrain.recipes.quickstart import CHAT, TARGETS, adamw

MAJORITY = Vote(samples=10, counts="majority", pass_mark=0.5, pass_at=(1, 10))


@dataclass(frozen=True)
class Sizes:
    """What differs between the tiny base and a model that can already answer."""

    base: Base
    chat: HarmonyFormat
    adapter: Lora
    opening_rows: int
    """Conversations that show how an action is named, each with any action; 0 leaves the phase out."""
    opening_steps: int
    samples_per_step: int
    max_tokens: int
    grpo_steps: int
    groups_per_step: int
    group_size: int
    kl_weight: float
    """What holds the policy near the opening: in units of the reward."""
    sampling: Sampling
    optimizer: AdamW
    precision: str
    dtype: str
    gguf_type: str


def tiny(grpo_steps: int, groups_per_step: int, group_size: int, kl_weight: float) -> Sizes:
    return Sizes(
        base=FolderBase(kind="folder", path="shipped:tiny"),
        chat=CHAT,
        adapter=Lora(kind="lora", rank=8, alpha=16, targets=TARGETS),
        opening_rows=960,
        opening_steps=60,
        samples_per_step=16,
        max_tokens=1024,
        grpo_steps=grpo_steps,
        groups_per_step=groups_per_step,
        group_size=group_size,
        kl_weight=kl_weight,
        sampling=Sampling(temperature=0.9, top_p=1.0, top_k=None, max_new_tokens=16, max_turns=1),
        optimizer=adamw(1e-3),
        precision="float32",
        dtype="float32",
        gguf_type="f32",
    )


LARGE = Sizes(
    base=HubBase(kind="hub", repo="openai/gpt-oss-20b", revision=None),
    chat=CHAT.model_copy(update={"reasoning_effort": "medium"}),
    adapter=Lora(kind="lora", rank=4, alpha=8, targets=TARGETS),
    opening_rows=0,
    opening_steps=0,
    samples_per_step=0,
    max_tokens=PROMPT_TOKENS,
    grpo_steps=200,
    groups_per_step=4,
    group_size=16,
    kl_weight=0.0,
    sampling=Sampling(temperature=1.0, top_p=1.0, top_k=None, max_new_tokens=4000, max_turns=1),
    optimizer=adamw(5e-5),
    precision="bfloat16",
    dtype="bfloat16",
    gguf_type="bf16",
)


def tes(
    seed: Annotated[int, "Seed of data, order, adapter and sampling"] = 0,
    quick_test: Annotated[bool, "The tiny base and a small plant, on a laptop"] = False,
    table: Annotated[str, "CSV with prompts and Q-values to train on, in place of generated days"] = "",
    heldout_table: Annotated[str, "CSV to evaluate on, with --table"] = "",
    cases: Annotated[int, "Held-out decisions to evaluate on, where days are generated"] = 200,
) -> Recipe:
    """Decision tables → Boltzmann rewards → GRPO → majority-vote evaluation → export."""
    flags: dict[str, str | int | float | bool | None] = {
        "seed": seed,
        "quick_test": quick_test,
        "table": table,
        "heldout_table": heldout_table,
        "cases": cases,
    }
    sizes = tiny(grpo_steps=115, groups_per_step=48, group_size=8, kl_weight=0.05) if quick_test else LARGE
    world = "tes_small" if quick_test else "tes"
    sets = tes_data(table, heldout_table, quick_test=False) if table else generated(world, seed, cases, sizes)
    return curriculum("tes", flags, seed, world, sets, sizes, cases)


def generated(world: str, seed: int, cases: int, sizes: Sizes) -> tuple[Dataset, ...]:
    """Decisions to train on and held-out ones, of a world that makes both."""
    return (
        dataset("decisions", "tasks", (_rows(world, "train", 6000, seed),), sizes.max_tokens),
        dataset("heldout", "tasks", (_rows(world, "heldout", cases, seed),), sizes.max_tokens),
    )


def _rows(world: str, split: Literal["train", "heldout"], count: int, seed: int) -> WorldSource:
    return WorldSource(kind="world", world=world, split=split, count=count, seed=seed)


def curriculum(
    name: str,
    flags: dict[str, str | int | float | bool | None],
    seed: int,
    world: str,
    sets: tuple[Dataset, ...],
    sizes: Sizes,
    cases: int,
) -> Recipe:
    """GRPO on decisions between two evaluations by majority vote; the tiny base first learns to name an action."""
    before, opening = "base", list[Phase]()
    if sizes.opening_rows:
        shown = _rows(world, "train", sizes.opening_rows, seed + 1)
        sets = (*sets, dataset("opening", "conversations", (shown,), sizes.max_tokens))
        before, opening = "opening_sft", [opening_sft(sizes)]
    phases: tuple[Phase, ...] = (
        PreparePhase(kind="prepare", name="data", datasets=sets, gates=()),
        *opening,
        evaluation(before, sizes),
        GrpoPhase(
            kind="grpo",
            name="grpo",
            model=before,
            dataset="decisions",
            trainable=ContinueAdapter(kind="continue") if opening else sizes.adapter,
            precision=sizes.precision,
            objective=DrGrpo(kind="dr_grpo", clip_low=0.2, clip_high=0.2),
            kl_weight=sizes.kl_weight,
            sampler_ratio_cap=None,
            groups_per_step=sizes.groups_per_step,
            spare_groups=0,
            group_size=sizes.group_size,
            filters=EVERY_EPISODE,
            curriculum=(),
            steps=sizes.grpo_steps,
            updates_per_rollout=1,
            reward={"reward": 1.0},
            pass_mark=MAJORITY.pass_mark,
            sampling=sizes.sampling,
            optimizer=sizes.optimizer,
            held_out=None,
            gates=(),
        ),
        evaluation("grpo", sizes),
        ExportPhase(
            kind="export",
            name="export",
            candidates=(Candidate(model="grpo", evaluation="eval_grpo"),),
            metrics=("heldout.score",),
            formats=("adapter", "hf", "gguf"),
            dtype=sizes.dtype,
            gguf_type=sizes.gguf_type,
            verify_dataset="heldout",
            tolerances=USUAL_TOLERANCES,
            verify_prompts=min(20, cases),
            gates=(),
        ),
    )
    return Recipe(
        name=name, flags=flags, seed=seed, base=sizes.base, chat=sizes.chat, phases=phases, suggested=NOTHING_SUGGESTED
    )


def opening_sft(sizes: Sizes) -> SftPhase:
    return SftPhase(
        kind="sft",
        name="opening_sft",
        model="base",
        dataset="opening",
        trainable=sizes.adapter,
        precision=sizes.precision,
        batch=SampleBatch(kind="samples", samples=sizes.samples_per_step),
        steps=sizes.opening_steps,
        optimizer=adamw(3e-3),
        held_out=None,
        gates=(),
    )


def evaluation(model: str, sizes: Sizes) -> EvaluatePhase:
    return EvaluatePhase(
        kind="evaluate",
        name=f"eval_{model.removesuffix('_sft')}",
        model=model,
        datasets=("heldout",),
        shots=0,
        vote=MAJORITY,
        sampling=sizes.sampling,
        precision=sizes.precision,
        gates=(),
    )
