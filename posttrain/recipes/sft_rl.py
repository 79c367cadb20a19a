"""Supervised fine-tuning on an explicit mixture, then reinforcement learning on GSM8K's problems, or one of them."""

from dataclasses import dataclass
from typing import Annotated, Literal

from posttrain.recipe.types import (
    EVERY_EPISODE,
    NOTHING_SUGGESTED,
    Base,
    ChatFormat,
    ContinueAdapter,
    Dataset,
    DrGrpo,
    EvaluatePhase,
    FolderBase,
    FullParameters,
    GrpoPhase,
    HubBase,
    Lora,
    Phase,
    Precision,
    PreparePhase,
    Recipe,
    SampleBatch,
    Sampling,
    SftPhase,
    TemplateFormat,
    Trainable,
    WorldSource,
)
from posttrain.recipes._hub import dataset, hub, take
from posttrain.recipes._sft_rl_data import GSM8K, sft_rl_data
from posttrain.recipes.quickstart import CHAT, TARGETS, adamw

Mode = Literal["sft+rl", "sft", "rl"]
SHUFFLE_SEED = 42


@dataclass(frozen=True)
class Sizes:
    base: Base
    chat: ChatFormat
    sft_trainable: Trainable
    rl_trainable: Trainable
    """After SFT; an RL run alone trains as SFT would."""
    precision: Precision
    sft_steps: int
    samples_per_step: int
    sft_rate: float
    rl_steps: int
    groups_per_step: int
    group_size: int
    rl_rate: float
    sampling: Sampling


TINY = Sizes(
    base=FolderBase(kind="folder", path="shipped:tiny"),
    chat=CHAT,
    sft_trainable=Lora(kind="lora", rank=16, alpha=32, targets=TARGETS),
    rl_trainable=ContinueAdapter(kind="continue"),
    precision="float32",
    sft_steps=150,
    samples_per_step=16,
    sft_rate=3e-3,
    rl_steps=30,
    groups_per_step=16,
    group_size=8,
    rl_rate=1e-4,
    sampling=Sampling(temperature=1.0, top_p=1.0, top_k=None, max_new_tokens=40, max_turns=1),
)
LARGE = Sizes(
    base=HubBase(kind="hub", repo="Qwen/Qwen2.5-0.5B-Instruct", revision=None),
    chat=TemplateFormat(kind="template", template=None, reasoning="dropped", date="2026-01-01", variables={}),
    sft_trainable=FullParameters(kind="full"),
    rl_trainable=FullParameters(kind="full"),
    precision="bfloat16",
    sft_steps=719,
    samples_per_step=32,
    sft_rate=2e-5,
    rl_steps=500,
    groups_per_step=16,
    group_size=16,
    rl_rate=1e-6,
    sampling=Sampling(temperature=1.0, top_p=1.0, top_k=None, max_new_tokens=256, max_turns=1),
)
"""One epoch of about 23 thousand rows, and one of GSM8K's 8 thousand problems."""


def sft_rl(
    seed: Annotated[int, "Seed of data, order, adapter and sampling"] = 0,
    quick_test: Annotated[bool, "The tiny base on generated problems, on a laptop"] = False,
    mode: Annotated[Mode, "Both phases, or one alone"] = "sft+rl",
    source_checkpoint: Annotated[str, "Folder of a model to begin with, in place of the base"] = "",
    max_length: Annotated[int, "Longer rows are left out, tokens"] = 512,
    cases: Annotated[int, "Held-out problems to evaluate on"] = 200,
) -> Recipe:
    """Explicit mixture → SFT → GRPO on problems whose answer is a number → evaluation."""
    flags: dict[str, str | int | float | bool | None] = {
        "seed": seed,
        "quick_test": quick_test,
        "mode": mode,
        "source_checkpoint": source_checkpoint,
        "max_length": max_length,
        "cases": cases,
    }
    sizes = TINY if quick_test else LARGE
    base = FolderBase(kind="folder", path=source_checkpoint) if source_checkpoint else sizes.base
    sets = _generated(seed, cases, max_length) if quick_test else _downloaded(cases, max_length)
    used = {"heldout"} | ({"mixture"} if "sft" in mode else set()) | ({"problems"} if "rl" in mode else set())
    phases: list[Phase] = [
        PreparePhase(kind="prepare", name="data", datasets=tuple(one for one in sets if one.name in used), gates=()),
        _evaluation("base", sizes),
    ]
    if "sft" in mode:
        phases += [_sft(sizes), _evaluation("sft", sizes)]
    if "rl" in mode:
        phases += [_rl(sizes, "sft" if "sft" in mode else "base"), _evaluation("rl", sizes)]
    return Recipe(
        name="sft_rl",
        flags=flags,
        seed=seed,
        base=base,
        chat=sizes.chat,
        phases=tuple(phases),
        suggested=NOTHING_SUGGESTED,
    )


def _downloaded(cases: int, max_length: int) -> tuple[Dataset, ...]:
    test = hub(GSM8K, "gsm8k", take(cases, None), subset="main", split="test")
    return *sft_rl_data(False, max_length, SHUFFLE_SEED), dataset("heldout", "tasks", (test,), max_length)


def _generated(seed: int, cases: int, max_length: int) -> tuple[Dataset, ...]:
    """The same three sets from worlds whose words the tiny base knows."""
    mixture = tuple(
        WorldSource(kind="world", world=world, split="train", count=count, seed=seed)
        for world, count in (("sums", 2000), ("tools", 400))
    )
    problems = WorldSource(kind="world", world="sums", split="train", count=2000, seed=seed + 1)
    heldout = WorldSource(kind="world", world="sums", split="heldout", count=cases, seed=seed)
    return (
        dataset("mixture", "conversations", mixture, max_length),
        dataset("problems", "tasks", (problems,), max_length),
        dataset("heldout", "tasks", (heldout,), max_length),
    )


def _sft(sizes: Sizes) -> SftPhase:
    return SftPhase(
        kind="sft",
        name="sft",
        model="base",
        dataset="mixture",
        trainable=sizes.sft_trainable,
        precision=sizes.precision,
        batch=SampleBatch(kind="samples", samples=sizes.samples_per_step),
        steps=sizes.sft_steps,
        optimizer=adamw(sizes.sft_rate),
        held_out=None,
        gates=(),
    )


def _rl(sizes: Sizes, model: str) -> GrpoPhase:
    return GrpoPhase(
        kind="grpo",
        name="rl",
        model=model,
        dataset="problems",
        trainable=sizes.rl_trainable if model == "sft" else sizes.sft_trainable,
        precision=sizes.precision,
        objective=DrGrpo(kind="dr_grpo", clip_low=0.2, clip_high=0.2),
        kl_weight=0.0,
        sampler_ratio_cap=None,
        groups_per_step=sizes.groups_per_step,
        spare_groups=0,
        group_size=sizes.group_size,
        filters=EVERY_EPISODE,
        curriculum=(),
        steps=sizes.rl_steps,
        updates_per_rollout=1,
        reward={"exact": 1.0},
        pass_mark=1.0,
        sampling=sizes.sampling,
        optimizer=adamw(sizes.rl_rate),
        held_out=None,
        gates=(),
    )


def _evaluation(model: str, sizes: Sizes) -> EvaluatePhase:
    return EvaluatePhase(
        kind="evaluate",
        name=f"eval_{model}",
        model=model,
        datasets=("heldout",),
        shots=0,
        vote=None,
        sampling=sizes.sampling.model_copy(update={"temperature": 0.0}),
        precision=sizes.precision,
        gates=(),
    )
