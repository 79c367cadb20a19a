"""Tool use for GPT-OSS-20B on one large GPU: tool calls, agent trajectories, preferences, then GRPO on tool calls."""

from dataclasses import dataclass
from typing import Annotated, Literal

from posttrain.recipe.types import (
    EVERY_EPISODE,
    USUAL_TOLERANCES,
    AdamW,
    Candidate,
    ContinueAdapter,
    DrGrpo,
    Epochs,
    EvaluatePhase,
    ExportPhase,
    Gate,
    GrpoPhase,
    Ipo,
    Lora,
    MergePhase,
    Phase,
    Precision,
    PreferencePhase,
    PreparePhase,
    Recipe,
    RowBatch,
    Sampling,
    SftPhase,
    Skipped,
    Steps,
    Suggested,
)
from posttrain.recipes._hub import base_at
from posttrain.recipes._tui_data import tui_data, tui_tasks
from posttrain.recipes.quickstart import CHAT, MERGE_GATES, TARGETS, accuracy_gate, loss_gate, value_gate

BatchProfile = Literal["aggressive", "balanced", "conservative"]
TaskFormat = Literal["code_task", "rows"]
TRAINED = ("tool_sft", "agent_sft", "preference", "grpo")


@dataclass(frozen=True)
class Part:
    """What a profile says of one training phase."""

    at_once: int
    """Rows, pairs or groups of one forward and backward pass."""
    passes: int
    tokens: int
    """Of a row, of either sequence of a pair, or of an episode."""

    @property
    def per_step(self) -> int:
        return self.at_once * self.passes


Profile = dict[str, Part]
PROFILES: dict[BatchProfile, Profile] = {
    "aggressive": {
        "tool_sft": Part(10, 5, 8192),
        "agent_sft": Part(4, 6, 32768),
        "preference": Part(4, 8, 8192),
        "grpo": Part(2, 8, 65536),
    },
    "balanced": {
        "tool_sft": Part(8, 6, 8192),
        "agent_sft": Part(1, 24, 32768),
        "preference": Part(2, 16, 8192),
        "grpo": Part(1, 16, 65536),
    },
    "conservative": {
        "tool_sft": Part(4, 12, 8192),
        "agent_sft": Part(1, 24, 32768),
        "preference": Part(1, 32, 8192),
        "grpo": Part(1, 16, 65536),
    },
}
QUICK_TEST: Profile = {
    "tool_sft": Part(2, 2, 4096),
    "agent_sft": Part(1, 2, 4096),
    "preference": Part(1, 2, 4096),
    "grpo": Part(1, 2, 4096),
}
QUICK_STEPS = 50
SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=None, max_new_tokens=1024, max_turns=1)
QUICK_SAMPLING = SAMPLING.model_copy(update={"max_new_tokens": 128})
"""The tiny base knows no end to what it writes about texts like these."""
TASK_TURNS = 8
"""Of an episode where a task file is given: its code is read, patched and tested."""
STEPS: dict[str, Steps] = {
    "tool_sft": Epochs(kind="epochs", epochs=1),
    "agent_sft": Epochs(kind="epochs", epochs=3),
    "preference": Epochs(kind="epochs", epochs=2),
    "grpo": 5000,
}
SAVE_EVERY = 250
GATE_STEPS = 10


def tui(
    batch_profile: Annotated[BatchProfile, "Rows, pairs and groups per pass and per step"] = "balanced",
    quick_test: Annotated[bool, "The tiny base on small parts of the same data, 50 steps a phase, on a laptop"] = False,
    grpo: Annotated[bool, "Whether the last training phase is carried out"] = True,
    task_file: Annotated[str, "JSONL of tasks of your own that GRPO plays as well"] = "",
    task_format: Annotated[TaskFormat, "Its rows: description, starter_code, tests; or our own"] = "code_task",
    base: Annotated[str, "Model folder, or OWNER/NAME on the hub, in place of gpt-oss-20b"] = "",
    max_steps: Annotated[int, "Steps of each training phase at most; 0 for the curriculum's own"] = 0,
    seed: Annotated[int, "Seed of data, order, adapters and sampling"] = 42,
) -> Recipe:
    """Tool calls → merge → agent SFT → IPO → GRPO on recorded calls → export, on the sets of the hub."""
    flags: dict[str, str | int | float | bool | None] = {
        "batch_profile": batch_profile,
        "quick_test": quick_test,
        "grpo": grpo,
        "task_file": task_file,
        "task_format": task_format,
        "base": base,
        "max_steps": max_steps,
        "seed": seed,
    }
    profile = QUICK_TEST if quick_test else PROFILES[batch_profile]
    most = max_steps or (QUICK_STEPS if quick_test else None)
    steps: dict[str, Steps] = {name: own if most is None else most for name, own in STEPS.items()}
    if not grpo:
        steps["grpo"] = Skipped(kind="skipped", reason="--no-grpo was given")
    return Recipe(
        name="tui",
        flags=flags,
        seed=seed,
        base=base_at(base or ("shipped:tiny" if quick_test else "openai/gpt-oss-20b")),
        chat=CHAT.model_copy(update={"reasoning_effort": "medium"}),
        phases=_phases(profile, steps, task_file, task_format, quick_test),
        suggested=Suggested(
            micro_batch_tokens={name: part.at_once * part.tokens for name, part in profile.items()},
            checkpoint_every_steps=SAVE_EVERY,
            recompute=None if quick_test else "full",
            mlp_tile_tokens=None if quick_test else 8192,
            base_weights=None if quick_test else "packed",
        ),
    )


def _phases(
    profile: Profile, steps: dict[str, Steps], task_file: str, task_format: TaskFormat, quick_test: bool
) -> tuple[Phase, ...]:
    tokens = {name: part.tokens for name, part in profile.items()}
    precision: Precision = "float32" if quick_test else "bfloat16"
    sampling = QUICK_SAMPLING if quick_test else SAMPLING
    sets = (
        *tui_data(quick_test, tokens["tool_sft"], tokens["agent_sft"], tokens["preference"]),
        *tui_tasks(quick_test, task_file, task_format, tokens["grpo"] - sampling.max_new_tokens),
    )
    playing = sampling.model_copy(update={"max_turns": TASK_TURNS}) if task_file else sampling
    # The thresholds are those of the 20B model: a tiny one is told that it misses them and goes on.
    hard = not quick_test
    return (
        PreparePhase(kind="prepare", name="data", datasets=sets, gates=()),
        _evaluation("base", precision, sampling),
        SftPhase(
            kind="sft",
            name="tool_sft",
            model="base",
            dataset="tool_calls",
            trainable=Lora(kind="lora", rank=64, alpha=128, targets=TARGETS),
            precision=precision,
            batch=RowBatch(kind="rows", rows=profile["tool_sft"].per_step, row_tokens=tokens["tool_sft"]),
            steps=steps["tool_sft"],
            optimizer=_adamw(2e-5),
            held_out=None,
            gates=(_loss_gate(2.0, steps["tool_sft"], hard),),
        ),
        _evaluation("tool_sft", precision, sampling),
        MergePhase(
            kind="merge",
            name="merge",
            model="tool_sft",
            dtype="bfloat16",
            gates=(*MERGE_GATES, value_gate("smoke_ok", ">=", 1.0).model_copy(update={"hard": hard})),
        ),
        SftPhase(
            kind="sft",
            name="agent_sft",
            model="merge",
            dataset="agent",
            trainable=Lora(kind="lora", rank=128, alpha=256, targets=TARGETS),
            precision=precision,
            batch=RowBatch(kind="rows", rows=profile["agent_sft"].per_step, row_tokens=tokens["agent_sft"]),
            steps=steps["agent_sft"],
            optimizer=_adamw(3e-5).model_copy(update={"clip_norm": 0.5}),
            held_out=None,
            gates=(_loss_gate(1.8, steps["agent_sft"], hard),),
        ),
        _evaluation("agent_sft", precision, sampling),
        PreferencePhase(
            kind="preference",
            name="preference",
            model="agent_sft",
            dataset="preferences",
            trainable=ContinueAdapter(kind="continue"),
            precision=precision,
            objective=Ipo(kind="ipo", beta=0.1),
            pairs_per_step=profile["preference"].per_step,
            steps=steps["preference"],
            optimizer=_adamw(5e-7),
            held_out=None,
            gates=(),
        ),
        _evaluation("preference", precision, sampling),
        _grpo(profile["grpo"], steps["grpo"], precision, playing),
        _evaluation("grpo", precision, sampling),
        ExportPhase(
            kind="export",
            name="export",
            candidates=tuple(Candidate(model=model, evaluation=f"eval_{model}") for model in TRAINED),
            metrics=("calls.exact", "heldout_pairs.accuracy"),
            formats=("adapter", "hf", "gguf"),
            dtype="bfloat16",
            gguf_type="auto",
            verify_dataset="calls",
            verify_prompts=4,
            tolerances=USUAL_TOLERANCES,
            gates=(),
        ),
    )


def _grpo(part: Part, steps: Steps, precision: Precision, sampling: Sampling) -> GrpoPhase:
    return GrpoPhase(
        kind="grpo",
        name="grpo",
        model="preference",
        dataset="call_tasks",
        trainable=ContinueAdapter(kind="continue"),
        precision=precision,
        objective=DrGrpo(kind="dr_grpo", clip_low=0.2, clip_high=0.2),
        kl_weight=0.0,
        sampler_ratio_cap=None,
        groups_per_step=part.per_step,
        spare_groups=0,
        group_size=4,
        filters=EVERY_EPISODE,
        curriculum=(),
        held_out=None,
        steps=steps,
        updates_per_rollout=1,
        reward={"format": 0.1, "tool": 0.2, "exact": 0.7, "code.reward": 1.0},
        pass_mark=1.0,
        sampling=sampling,
        optimizer=_adamw(1e-6),
        gates=(accuracy_gate(_known(steps)),),
    )


def _evaluation(model: str, precision: Precision, sampling: Sampling) -> EvaluatePhase:
    return EvaluatePhase(
        kind="evaluate",
        name=f"eval_{model}",
        model=model,
        datasets=("calls", "heldout_pairs"),
        shots=0,
        vote=None,
        sampling=sampling.model_copy(update={"temperature": 0.0}),
        precision=precision,
        gates=(),
    )


def _adamw(learning_rate: float) -> AdamW:
    return AdamW(
        learning_rate=learning_rate,
        weight_decay=0.01,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
        clip_norm=1.0,
        schedule="cosine",
        warmup_share=0.05,
        final_share=0.0,
        groups=(),
        moments="float32",
    )


def _loss_gate(threshold: float, steps: Steps, hard: bool) -> Gate:
    return loss_gate(threshold, _known(steps)).model_copy(update={"hard": hard})


def _known(steps: Steps) -> int:
    """The number of steps, or what gates ask for where it follows from the data."""
    return steps if isinstance(steps, int) else GATE_STEPS
