"""The whole curriculum on the tiny GPT-OSS inside the package: two CPU cores, minutes, no network."""

from dataclasses import dataclass
from typing import Annotated

from posttrain.recipe.types import (
    EVERY_EPISODE,
    NOTHING_SUGGESTED,
    USUAL_TOLERANCES,
    AdamW,
    Candidate,
    ContinueAdapter,
    Dataset,
    DrGrpo,
    EvaluatePhase,
    ExportPhase,
    FolderBase,
    Gate,
    GrpoPhase,
    HarmonyFormat,
    HeldOut,
    HeldOutTasks,
    Ipo,
    Lora,
    MergePhase,
    Phase,
    PreferencePhase,
    PreparePhase,
    Recipe,
    SampleBatch,
    Sampling,
    SftPhase,
    WorldSource,
)

CHAT = HarmonyFormat(
    kind="harmony",
    date="2026-01-01",
    knowledge_cutoff="2024-06",
    reasoning_effort="low",
    identity="You are a helpful assistant.",
)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "experts")
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=96, max_turns=2)
METRICS = ("tools.exact", "repair.hidden", "preferences.accuracy")


def value_gate(metric: str, comparison: str, threshold: float) -> Gate:
    return Gate(
        name=metric,
        metric=metric,
        reduction="value",
        window=1,
        comparison=comparison,
        threshold=threshold,
        minimum_steps=0,
        hard=True,
    )


# The seed's merge gate, with the exact size from the model's own configuration in place of a fixed number of bytes.
MERGE_GATES = (
    value_gate("size_ratio", ">=", 1.0),
    value_gate("missing_tensors", "<=", 0.0),
    value_gate("unexpected_tensors", "<=", 0.0),
)


@dataclass(frozen=True)
class Sizes:
    """How much of everything: what differs between `quickstart` and `smoke`."""

    tool_rows: int
    tool_steps: int
    agent_rows: int
    agent_steps: int
    pairs: int
    preference_steps: int
    tasks: int
    grpo_steps: int
    groups_per_step: int
    group_size: int
    samples_per_step: int
    rank: int
    held_out_steps: int
    """Steps between looks at the held-out loss."""
    tool_loss: float
    agent_loss: float
    """Hard gates: the mean raw loss of the last ten steps."""
    merge_gates: tuple[Gate, ...]


QUICK = Sizes(
    tool_rows=3200,
    tool_steps=200,
    agent_rows=2000,
    agent_steps=180,
    pairs=600,
    preference_steps=20,
    tasks=2000,
    grpo_steps=40,
    groups_per_step=16,
    group_size=8,
    samples_per_step=16,
    rank=16,
    held_out_steps=40,
    tool_loss=0.6,
    agent_loss=1.2,
    merge_gates=(*MERGE_GATES, value_gate("smoke_ok", ">=", 1.0)),
)


def quickstart(
    seed: Annotated[int, "Seed of data, order, adapters and sampling"] = 0,
    cases: Annotated[int, "Held-out cases per evaluation set"] = 200,
    grpo_steps: Annotated[int, "GRPO steps on the repair tasks"] = QUICK.grpo_steps,
) -> Recipe:
    """Tool-calling SFT, merge, agent SFT, IPO, GRPO, export and report on the tiny base, on a laptop."""
    sizes = Sizes(**{**QUICK.__dict__, "grpo_steps": grpo_steps})
    flags: dict[str, str | int | float | bool | None] = {"seed": seed, "cases": cases, "grpo_steps": grpo_steps}
    return curriculum("quickstart", flags, seed, cases, sizes)


def curriculum(
    name: str, flags: dict[str, str | int | float | bool | None], seed: int, cases: int, sizes: Sizes
) -> Recipe:
    """Every phase in order, each training phase followed by its evaluation."""
    phases: tuple[Phase, ...] = (
        data(seed, cases, sizes),
        evaluation("eval_base", "base"),
        evaluation("eval_base_fewshot", "base", shots=3),
        SftPhase(
            kind="sft",
            name="tool_sft",
            model="base",
            dataset="tool_calls",
            trainable=Lora(kind="lora", rank=sizes.rank, alpha=2 * sizes.rank, targets=TARGETS),
            precision="float32",
            batch=SampleBatch(kind="samples", samples=sizes.samples_per_step),
            steps=sizes.tool_steps,
            optimizer=adamw(3e-3),
            held_out=HeldOut(dataset="tool_calls_heldout", every_steps=sizes.held_out_steps),
            gates=(loss_gate(sizes.tool_loss, sizes.tool_steps),),
        ),
        evaluation("eval_tool_sft", "tool_sft"),
        MergePhase(kind="merge", name="merge", model="tool_sft", dtype="float32", gates=sizes.merge_gates),
        SftPhase(
            kind="sft",
            name="agent_sft",
            model="merge",
            dataset="agent",
            trainable=Lora(kind="lora", rank=2 * sizes.rank, alpha=4 * sizes.rank, targets=TARGETS),
            precision="float32",
            batch=SampleBatch(kind="samples", samples=sizes.samples_per_step),
            steps=sizes.agent_steps,
            optimizer=adamw(3e-3),
            held_out=HeldOut(dataset="agent_heldout", every_steps=sizes.held_out_steps),
            gates=(loss_gate(sizes.agent_loss, sizes.agent_steps),),
        ),
        evaluation("eval_agent_sft", "agent_sft"),
        PreferencePhase(
            kind="preference",
            name="preference",
            model="agent_sft",
            dataset="pairs",
            trainable=ContinueAdapter(kind="continue"),
            precision="float32",
            objective=Ipo(kind="ipo", beta=0.1),
            pairs_per_step=16,
            steps=sizes.preference_steps,
            optimizer=adamw(5e-6),
            held_out=HeldOut(dataset="preferences", every_steps=sizes.preference_steps),
            gates=(),
        ),
        evaluation("eval_preference", "preference"),
        GrpoPhase(
            kind="grpo",
            name="grpo",
            model="preference",
            dataset="repair_tasks",
            trainable=ContinueAdapter(kind="continue"),
            precision="float32",
            objective=DrGrpo(kind="dr_grpo", clip_low=0.2, clip_high=0.28),
            kl_weight=0.0,
            sampler_ratio_cap=None,
            groups_per_step=sizes.groups_per_step,
            spare_groups=0,
            group_size=sizes.group_size,
            filters=EVERY_EPISODE,
            curriculum=(),
            steps=sizes.grpo_steps,
            updates_per_rollout=1,
            reward={"format": 0.3, "hidden": 0.7},
            pass_mark=1.0,
            sampling=Sampling(temperature=0.7, top_p=1.0, top_k=None, max_new_tokens=96, max_turns=1),
            optimizer=adamw(4e-4),
            held_out=HeldOutTasks(dataset="repair", every_steps=max(1, sizes.grpo_steps // 2), sampling=GREEDY),
            gates=(accuracy_gate(sizes.grpo_steps),),
        ),
        evaluation("eval_grpo", "grpo"),
        ExportPhase(
            kind="export",
            name="export",
            candidates=tuple(
                Candidate(model=model, evaluation=f"eval_{model}") for model in ("agent_sft", "preference", "grpo")
            ),
            metrics=METRICS,
            formats=("adapter", "hf", "gguf"),
            dtype="float32",
            gguf_type="f32",
            verify_dataset="tools",
            verify_prompts=min(20, cases),
            tolerances=USUAL_TOLERANCES,
            gates=(),
        ),
    )
    return Recipe(
        name=name,
        flags=flags,
        seed=seed,
        base=FolderBase(kind="folder", path="shipped:tiny"),
        chat=CHAT,
        phases=phases,
        suggested=NOTHING_SUGGESTED,
    )


def data(seed: int, cases: int, sizes: Sizes) -> PreparePhase:
    watched = min(cases, 48)
    return PreparePhase(
        kind="prepare",
        name="data",
        datasets=(
            dataset("tool_calls", "conversations", ("tools", sizes.tool_rows), seed=seed),
            dataset(
                "agent", "conversations", ("agent", sizes.agent_rows), ("tools", sizes.agent_rows // 2), seed=seed + 1
            ),
            dataset("pairs", "pairs", ("preferences", sizes.pairs), seed=seed),
            dataset("repair_tasks", "tasks", ("repair", sizes.tasks), seed=seed + 2),
            dataset("tool_calls_heldout", "conversations", ("tools", watched), split="heldout", seed=seed + 1),
            dataset("agent_heldout", "conversations", ("agent", watched), split="heldout", seed=seed + 1),
            dataset("tools", "tasks", ("tools", cases), split="heldout", seed=seed),
            dataset("repair", "tasks", ("repair", cases), split="heldout", seed=seed),
            dataset("preferences", "pairs", ("preferences", cases), split="heldout", seed=seed),
        ),
        gates=(),
    )


def dataset(name: str, content: str, *worlds: tuple[str, int], seed: int, split: str = "train") -> Dataset:
    sources = tuple(
        WorldSource(kind="world", world=world, split=split, count=count, seed=seed) for world, count in worlds
    )
    return Dataset(name=name, content=content, sources=sources, max_tokens=1024, too_long="drop", faulty_share=0.0)


def evaluation(name: str, model: str, shots: int = 0) -> EvaluatePhase:
    return EvaluatePhase(
        kind="evaluate",
        name=name,
        model=model,
        datasets=("tools", "repair", "preferences") if not shots else ("tools", "repair"),
        shots=shots,
        vote=None,
        sampling=GREEDY,
        precision="float32",
        gates=(),
    )


def adamw(learning_rate: float) -> AdamW:
    return AdamW(
        learning_rate=learning_rate,
        weight_decay=0.01,
        beta1=0.9,
        beta2=0.98,
        epsilon=1e-8,
        clip_norm=1.0,
        schedule="cosine",
        warmup_share=0.05,
        final_share=0.1,
        groups=(),
        moments="float32",
    )


def loss_gate(threshold: float, steps: int) -> Gate:
    """The seed's gate: the mean raw loss of the last ten steps."""
    return Gate(
        name="loss",
        metric="loss",
        reduction="mean_last",
        window=10,
        comparison="<=",
        threshold=threshold,
        minimum_steps=min(10, steps),
        hard=True,
    )


def accuracy_gate(steps: int) -> Gate:
    """The seed's soft gate: the share of episodes at the pass mark over the last ten steps."""
    return Gate(
        name="reward_accuracy",
        metric="reward_accuracy",
        reduction="mean_last",
        window=10,
        comparison=">",
        threshold=0.55,
        minimum_steps=min(10, steps),
        hard=False,
    )
