"""Supervised fine-tuning on a versioned dataset of traces, between the same questions asked before and after."""

from dataclasses import dataclass
from typing import Annotated, Literal

from posttrain.recipe.types import (
    EVERY_ROW,
    NOTHING_SUGGESTED,
    ChatFormat,
    EvaluatePhase,
    FileSource,
    FullParameters,
    GemmaFormat,
    Lora,
    PreparePhase,
    Recipe,
    RegisteredSource,
    SampleBatch,
    Sampling,
    SftPhase,
    Source,
    TemplateFormat,
    Trainable,
    WorldSource,
)
from posttrain.recipes._hub import base_at, dataset
from posttrain.recipes.quickstart import CHAT, TARGETS, adamw

ChatKind = Literal["gemma", "template", "harmony"]
CHATS: dict[ChatKind, ChatFormat] = {
    "gemma": GemmaFormat(kind="gemma", reasoning="numbered"),
    "template": TemplateFormat(kind="template", template=None, reasoning="dropped", date="2026-01-01", variables={}),
    "harmony": CHAT,
}
DENSE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRACES = "duel_traces"


@dataclass(frozen=True)
class Sizes:
    base: str
    chat: ChatKind
    steps: int
    samples_per_step: int
    learning_rate: float
    precision: Literal["float32", "bfloat16"]


TINY = Sizes(
    base="shipped:tiny", chat="harmony", steps=120, samples_per_step=16, learning_rate=3e-3, precision="float32"
)
LARGE = Sizes(
    base="google/gemma-2b-it", chat="gemma", steps=50, samples_per_step=8, learning_rate=1e-4, precision="bfloat16"
)


def trace_sft(
    seed: Annotated[int, "Seed of order, adapter and, where they are generated, traces"] = 0,
    quick_test: Annotated[bool, "The tiny base, on a laptop"] = False,
    dataset_key: Annotated[str, "NAME@VERSION of registered traces; else duels are generated"] = "",
    evaluation: Annotated[
        str, "What is asked before and after: NAME@VERSION, a file of tasks, shipped:NAME or world:NAME"
    ] = "",
    base: Annotated[str, "Model folder, or OWNER/NAME on the hub"] = "",
    chat: Annotated[ChatKind | None, "How the base is spoken to, where one is given"] = None,
    rank: Annotated[int, "Of the adapter; 0 trains every parameter"] = 16,
    steps: Annotated[int | None, "Training steps"] = None,
    samples_per_step: Annotated[int | None, "Traces that a step reads"] = None,
    learning_rate: Annotated[float | None, "The highest one, after the warm-up"] = None,
    max_tokens: Annotated[int, "Longer traces are left out"] = 1024,
    cases: Annotated[int, "Held-out tasks, where a world makes them"] = 100,
) -> Recipe:
    """Traces → SFT → the same questions before and after → delta report."""
    flags: dict[str, str | int | float | bool | None] = {
        "seed": seed,
        "quick_test": quick_test,
        "dataset_key": dataset_key,
        "evaluation": evaluation,
        "base": base,
        "chat": chat,
        "rank": rank,
        "steps": steps,
        "samples_per_step": samples_per_step,
        "learning_rate": learning_rate,
        "max_tokens": max_tokens,
        "cases": cases,
    }
    sizes = TINY if quick_test else LARGE
    spoken = chat or sizes.chat
    asked = evaluation or ("shipped:eval_v1" if dataset_key else f"world:{TRACES}")
    sets = (
        dataset("traces", "conversations", (_traces(dataset_key, seed),), max_tokens),
        dataset("questions", "tasks", (_questions(asked, cases, seed),), max_tokens),
    )
    training = SftPhase(
        kind="sft",
        name="sft",
        model="base",
        dataset="traces",
        trainable=_trainable(rank, spoken),
        precision=sizes.precision,
        batch=SampleBatch(kind="samples", samples=samples_per_step or sizes.samples_per_step),
        steps=steps or sizes.steps,
        optimizer=adamw(learning_rate or sizes.learning_rate),
        held_out=None,
        gates=(),
    )
    return Recipe(
        name="trace_sft",
        flags=flags,
        seed=seed,
        base=base_at(base or sizes.base),
        chat=CHATS[spoken],
        phases=(
            PreparePhase(kind="prepare", name="data", datasets=sets, gates=()),
            _evaluation("eval_before", "base", sizes),
            training,
            _evaluation("eval_after", "sft", sizes),
        ),
        suggested=NOTHING_SUGGESTED,
    )


def _trainable(rank: int, chat: ChatKind) -> Trainable:
    if rank == 0:
        return FullParameters(kind="full")
    return Lora(kind="lora", rank=rank, alpha=2 * rank, targets=TARGETS if chat == "harmony" else DENSE_TARGETS)


def _traces(key: str, seed: int) -> Source:
    return _registered(key) if key else WorldSource(kind="world", world=TRACES, split="train", count=2000, seed=seed)


def _questions(given: str, cases: int, seed: int) -> Source:
    if given.startswith("world:"):
        world = given.removeprefix("world:")
        return WorldSource(kind="world", world=world, split="heldout", count=cases, seed=seed)
    if "@" in given:
        return _registered(given)
    return FileSource(
        kind="file", path=given, format="evaluation", filters=(), selection=EVERY_ROW, reasoning_effort=None
    )


def _registered(key: str) -> RegisteredSource:
    return RegisteredSource(kind="registered", dataset=key, filters=(), selection=EVERY_ROW, reasoning_effort=None)


def _evaluation(name: str, model: str, sizes: Sizes) -> EvaluatePhase:
    return EvaluatePhase(
        kind="evaluate",
        name=name,
        model=model,
        datasets=("questions",),
        shots=0,
        vote=None,
        sampling=Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=256, max_turns=1),
        precision=sizes.precision,
        gates=(),
    )
