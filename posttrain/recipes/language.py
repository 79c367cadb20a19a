"""Coding repair in one language: mutants of source trees, trajectories, preferences, then GRPO on tests that run."""

from dataclasses import dataclass
from typing import Annotated, Literal

from posttrain.recipe.types import (
    EVERY_EPISODE,
    NOTHING_SUGGESTED,
    Base,
    CodeSource,
    ContinueAdapter,
    Dataset,
    DrGrpo,
    EvaluatePhase,
    FolderBase,
    Gate,
    GrpoPhase,
    HubBase,
    Ipo,
    Lora,
    Precision,
    PreferencePhase,
    PreparePhase,
    Recipe,
    SampleBatch,
    Sampling,
    SftPhase,
    Stage,
)
from posttrain.recipes._hub import dataset
from posttrain.recipes.quickstart import CHAT, TARGETS, accuracy_gate, adamw, loss_gate, value_gate

Language = Literal["rust", "python", "typescript", "go"]
SOLVED = 0.7
"""Reward of code that passes every test, though its lint may have issues (the seed's scale)."""
MERGED_OF_A_RUN = "phases/export/exports/hf"


@dataclass(frozen=True)
class Sizes:
    """What differs between the tiny base and the model that the stage is for."""

    base: Base
    precision: Precision
    rank: int
    mutants: int
    """Of each tree, at most; the same for trajectories, pairs and tasks."""
    cases: int
    conversation_tokens: int
    prompt_tokens: int
    sft_steps: int
    samples_per_step: int
    sft_rate: float
    preference_steps: int
    pairs_per_step: int
    preference_rate: float
    grpo_steps: int
    groups_per_step: int
    grpo_rate: float
    sampling: Sampling
    evaluation: Sampling
    curriculum: tuple[Stage, ...]
    hard_gates: bool


TINY = Sizes(
    base=FolderBase(kind="folder", path="shipped:tiny"),
    precision="float32",
    rank=16,
    mutants=2,
    cases=1,
    conversation_tokens=16384,
    prompt_tokens=8192,
    # Until both trajectories are known by heart: an untrained model's calls are none, and no group has spread.
    sft_steps=40,
    samples_per_step=2,
    sft_rate=6e-3,
    preference_steps=2,
    pairs_per_step=1,
    preference_rate=1e-5,
    grpo_steps=4,
    groups_per_step=1,
    grpo_rate=1e-4,
    sampling=Sampling(temperature=0.7, top_p=1.0, top_k=None, max_new_tokens=160, max_turns=6),
    evaluation=Sampling(temperature=0.2, top_p=1.0, top_k=None, max_new_tokens=160, max_turns=6),
    curriculum=(),
    hard_gates=False,
)
STAGES = tuple(
    Stage(from_step=1 + 125 * number, max_prompt_tokens=tokens, max_turns=turns, tiers=None)
    for number, (tokens, turns) in enumerate(((4096, 3), (8192, 5), (16384, 8), (32768, 12)))
)
"""The seed's curriculum, a quarter of the steps each."""
LARGE = Sizes(
    base=HubBase(kind="hub", repo="openai/gpt-oss-20b", revision=None),
    precision="bfloat16",
    rank=128,
    mutants=4000,
    cases=200,
    conversation_tokens=32768,
    prompt_tokens=32768,
    sft_steps=375,
    samples_per_step=24,
    sft_rate=3e-5,
    preference_steps=190,
    pairs_per_step=32,
    preference_rate=5e-7,
    grpo_steps=500,
    groups_per_step=16,
    grpo_rate=1e-6,
    sampling=Sampling(temperature=0.7, top_p=1.0, top_k=None, max_new_tokens=1024, max_turns=12),
    evaluation=Sampling(temperature=0.2, top_p=1.0, top_k=None, max_new_tokens=1024, max_turns=10),
    curriculum=STAGES,
    hard_gates=True,
)
"""The seed's values (TUI): three epochs of 3000 trajectories, two of the pairs, at most ten attempts to evaluate."""


def language(
    language: Annotated[Language, "Language of the trees"] = "python",
    trees: Annotated[str, "Folders of source trees, separated by commas; none takes the small one inside"] = "",
    from_run: Annotated[str, "A finished run, or its folder, whose merged export to begin with"] = "",
    quick_test: Annotated[
        bool, "The tiny base learns two repairs by heart, on a laptop: everything runs, nothing more is learned"
    ] = False,
    seed: Annotated[int, "Seed of data, order, adapters and sampling"] = 42,
) -> Recipe:
    """Mutants of source trees → trajectories → SFT → IPO → GRPO on tests that run → evaluation."""
    flags: dict[str, str | int | float | bool | None] = {
        "language": language,
        "trees": trees,
        "from_run": from_run,
        "quick_test": quick_test,
        "seed": seed,
    }
    sizes = TINY if quick_test else LARGE
    chat = CHAT if quick_test else CHAT.model_copy(update={"reasoning_effort": "medium"})
    places = tuple(part.strip() for part in trees.split(",") if part.strip()) or (f"shipped:{language}",)
    return Recipe(
        name="language",
        flags=flags,
        seed=seed,
        base=_of_run(from_run) if from_run else sizes.base,
        chat=chat,
        suggested=NOTHING_SUGGESTED,
        phases=(
            PreparePhase(kind="prepare", name="data", datasets=_data(language, places, seed, sizes), gates=()),
            _evaluation("base", sizes, gated=False),
            _sft(sizes),
            _evaluation("sft", sizes, gated=False),
            _preference(sizes),
            _evaluation("preference", sizes, gated=False),
            _grpo(sizes),
            _evaluation("grpo", sizes, gated=True),
        ),
    )


def _of_run(run: str) -> FolderBase:
    folder = run if "/" in run else f"runs/{run}"
    return FolderBase(kind="folder", path=f"{folder}/{MERGED_OF_A_RUN}")


def _data(language: Language, places: tuple[str, ...], seed: int, sizes: Sizes) -> tuple[Dataset, ...]:
    def sources(split: Literal["train", "heldout"], count: int) -> tuple[CodeSource, ...]:
        return tuple(
            CodeSource(kind="code", path=path, language=language, split=split, count=count, seed=seed)
            for path in places
        )

    train, heldout = sources("train", sizes.mutants), sources("heldout", max(1, sizes.cases // len(places)))
    return (
        dataset("trajectories", "conversations", train, sizes.conversation_tokens),
        dataset("solutions", "pairs", train, sizes.conversation_tokens),
        dataset("repairs", "tasks", train, sizes.prompt_tokens),
        dataset("heldout", "tasks", heldout, sizes.prompt_tokens),
    )


def _sft(sizes: Sizes) -> SftPhase:
    return SftPhase(
        kind="sft",
        name="sft",
        model="base",
        dataset="trajectories",
        trainable=Lora(kind="lora", rank=sizes.rank, alpha=2 * sizes.rank, targets=TARGETS),
        precision=sizes.precision,
        batch=SampleBatch(kind="samples", samples=sizes.samples_per_step),
        steps=sizes.sft_steps,
        held_out=None,
        optimizer=adamw(sizes.sft_rate),
        gates=(loss_gate(1.8, sizes.sft_steps).model_copy(update={"hard": sizes.hard_gates}),),
    )


def _preference(sizes: Sizes) -> PreferencePhase:
    return PreferencePhase(
        kind="preference",
        name="preference",
        model="sft",
        dataset="solutions",
        trainable=ContinueAdapter(kind="continue"),
        precision=sizes.precision,
        objective=Ipo(kind="ipo", beta=0.1),
        pairs_per_step=sizes.pairs_per_step,
        steps=sizes.preference_steps,
        held_out=None,
        optimizer=adamw(sizes.preference_rate),
        gates=(),
    )


def _grpo(sizes: Sizes) -> GrpoPhase:
    return GrpoPhase(
        kind="grpo",
        name="grpo",
        model="preference",
        dataset="repairs",
        trainable=ContinueAdapter(kind="continue"),
        precision=sizes.precision,
        objective=DrGrpo(kind="dr_grpo", clip_low=0.2, clip_high=0.2),
        kl_weight=0.0,
        sampler_ratio_cap=None,
        groups_per_step=sizes.groups_per_step,
        spare_groups=0,
        group_size=4,
        filters=EVERY_EPISODE,
        curriculum=sizes.curriculum,
        steps=sizes.grpo_steps,
        updates_per_rollout=1,
        reward={"reward": 1.0},
        pass_mark=SOLVED,
        sampling=sizes.sampling,
        optimizer=adamw(sizes.grpo_rate),
        held_out=None,
        gates=(accuracy_gate(sizes.grpo_steps),),
    )


TARGET_GATES = (
    value_gate("heldout.compiles", ">=", 0.85),
    value_gate("heldout.solved", ">=", 0.70),
    value_gate("heldout.lint", ">=", 0.80),
    value_gate("heldout.iterations", "<=", 3.0),
    value_gate("heldout.diff_lines", "<=", 50.0),
    value_gate("heldout.format", ">=", 0.99),
)
"""The seed's targets for a coding agent; a run is told which ones it misses."""


def _evaluation(model: str, sizes: Sizes, gated: bool) -> EvaluatePhase:
    gates: tuple[Gate, ...] = tuple(gate.model_copy(update={"hard": False}) for gate in TARGET_GATES)
    return EvaluatePhase(
        kind="evaluate",
        name=f"eval_{model}",
        model=model,
        datasets=("heldout",),
        shots=0,
        vote=None,
        sampling=sizes.evaluation,
        precision=sizes.precision,
        gates=gates if gated else (),
    )
