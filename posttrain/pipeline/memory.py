"""What a phase holds in memory at its peak, by part, from the model's shapes alone.

The terms are what the engine keeps for the backward pass; what is beside them was measured (docs/decisions.md).
H is the model's width, Q and K those of all queries and of all keys, F that of a feed-forward block or expert.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Literal

from posttrain.phases.context import MICRO_BATCH_TOKENS
from posttrain.pipeline.rows import Expected
from posttrain.pipeline.sizes import ModelSize
from posttrain.recipe.check import TrainingPhase
from posttrain.recipe.inputs import datasets_used
from posttrain.recipe.types import (
    ContinueAdapter,
    EvaluatePhase,
    Execution,
    ExportPhase,
    FullParameters,
    GrpoPhase,
    Lora,
    MergePhase,
    Phase,
    PreferencePhase,
    PreparePhase,
    Recipe,
    RowBatch,
    SampleBatch,
    SftPhase,
)

Device = Literal["cpu", "cuda"]
PROCESS_BYTES = {"cpu": 470 * 10**6, "cuda": 600 * 10**6}
"""Python and the libraries on a CPU, a context on a GPU."""
HEAD_LOGITS = {"cpu": 2**21, "cuda": 2**28}
HEAD_BYTES = {"cpu": 12, "cuda": 10}
"""Logits that exist at once, at most, and the bytes of each with what is made of it."""
KEPT_TWICE = {"cpu": 1.9, "cuda": 1.0}
"""The backward pass makes gradients beside what was kept, and the C library gives little back to the system."""
AGAIN = {"cpu": (4.4, 4.4), "cuda": (2.0, 2.5)}
"""Of one layer that is computed again, as often as what it keeps: all of it, or its feed-forward half."""
PACKED_BYTES = 17 / 32
"""Of an MXFP4 value."""
SMOKE_POSITIONS = 4 * 2048
"""Key-value positions of a merge's generations."""


@dataclass(frozen=True)
class Memory:
    process: int
    weights: int
    adapters: int
    """Trained weights and their gradients."""
    optimizer: int
    """Its two moments, and on a CPU the copy that a checkpoint is written from."""
    activations: int
    cache: int

    @property
    def total(self) -> int:
        return sum(astuple(self))

    @property
    def largest(self) -> str:
        """The part that is the largest of those that can be made smaller."""
        parts = {name: getattr(self, name) for name in ("weights", "optimizer", "activations", "cache")}
        return max(parts, key=lambda name: parts[name])


def memory(
    recipe: Recipe, phase: Phase, size: ModelSize, execution: Execution, device: Device, rows: Mapping[str, Expected]
) -> Memory | None:
    """None for a phase without a model, and where nothing is known of the base."""
    if isinstance(phase, PreparePhase) or not size.shapes:
        return None
    device = place(phase, device)
    width = 2 if getattr(phase, "precision", "float32") == "bfloat16" else 4
    if isinstance(phase, MergePhase):
        width = 2 if device == "cuda" and phase.dtype == "bfloat16" else 4
    trained, rank = trainable(recipe, phase, size) if isinstance(phase, TrainingPhase) else (0, 0)
    full = isinstance(phase, TrainingPhase) and isinstance(phase.trainable, FullParameters)
    packed = execution.base_weights == "packed" and not _is_merged(recipe, phase)
    weights = weight_bytes(size, width, packed and not isinstance(phase, MergePhase))
    if isinstance(phase, ExportPhase):
        # The merge in float32; in float64 what is outside of the layers, and one of them.
        layers = size.layer_parameters
        weights = 4 * size.parameters + 8 * (size.parameters - layers + layers // max(1, size.layers))
    # On a CPU a checkpoint is copied before it is written, while training goes on.
    moments = 2 if isinstance(phase, TrainingPhase) and phase.optimizer.moments == "8bit" else 8
    moments += 0 if device == "cuda" else 4 + moments
    activations = 0
    if isinstance(phase, TrainingPhase):
        tokens = tokens_at_once(recipe, phase, execution, rows)
        activations = activation_bytes(size, rank, tokens, execution, width, device)
    return Memory(
        process=PROCESS_BYTES[device],
        weights=0 if full else weights,
        adapters=8 * trained,
        optimizer=moments * trained,
        activations=activations,
        cache=cache_bytes(recipe, phase, size, execution, width),
    )


def place(phase: Phase, device: Device) -> Device:
    """Where the phase's model is: exports are verified on the CPU, whatever trains."""
    return "cpu" if isinstance(phase, ExportPhase) else device


def _is_merged(recipe: Recipe, phase: Phase) -> bool:
    """Whether the phase's base is a merged folder, whose experts are no longer packed."""
    made = {one.name: one for one in recipe.phases}
    model = getattr(phase, "model", "base")
    while model in made and not isinstance(made[model], MergePhase):
        model = getattr(made[model], "model", "base")
    return model in made


def trainable(recipe: Recipe, phase: TrainingPhase, size: ModelSize) -> tuple[int, int]:
    """Parameters that the phase updates, and its adapter's rank; a continued adapter is looked up where it was made."""
    match phase.trainable:
        case Lora() as adapter:
            return size.adapter_parameters(adapter), adapter.rank
        case FullParameters():
            return size.parameters, 0
        case ContinueAdapter():
            maker = next((one for one in recipe.phases if one.name == phase.model), None)
            return trainable(recipe, maker, size) if isinstance(maker, TrainingPhase) else (0, 0)
    raise AssertionError(phase.trainable)


def weight_bytes(size: ModelSize, width: int, packed: bool) -> int:
    """Of the frozen base; with packed experts, those of one layer are unpacked at a time."""
    if not (packed and size.is_packed):
        return width * size.parameters
    experts = size.expert_parameters
    return int(width * (size.parameters - experts) + experts * PACKED_BYTES + width * experts / max(1, size.layers))


def tokens_at_once(recipe: Recipe, phase: TrainingPhase, execution: Execution, rows: Mapping[str, Expected]) -> int:
    """Tokens of the largest pass: the budget, or a whole step where that is less, or the longest item."""
    suggested = recipe.suggested.micro_batch_tokens.get(phase.name)
    budget = execution.micro_batch_tokens or suggested or MICRO_BATCH_TOKENS
    data = rows.get(phase.dataset, Expected())
    mean = data.tokens / data.samples if data.samples else 0.0
    match phase:
        case SftPhase(batch=SampleBatch(samples=samples)):
            step, item = samples * mean, data.longest
        case SftPhase(batch=RowBatch(rows=count, row_tokens=row_tokens)):
            step, item = float(count * row_tokens), row_tokens
        case PreferencePhase(pairs_per_step=pairs):
            step, item = 2 * pairs * mean, 2 * data.longest
        case GrpoPhase():
            item = phase.group_size * phase.sampling.max_new_tokens * phase.sampling.max_turns
            step = float(phase.groups_per_step * item)
    return max(int(min(budget, step or budget)), item)


def activation_bytes(size: ModelSize, rank: int, tokens: int, execution: Execution, width: int, device: Device) -> int:
    attention = 4 * size.hidden + 3 * size.queries + 3 * size.keys + 4 * rank
    feed_forward = size.active_experts * 2 * size.feed_forward if size.has_experts else 4 * size.feed_forward
    whole, half = AGAIN[device]
    match execution.recompute:
        case "none" if execution.mlp_tile_tokens is None:
            kept, again = attention + feed_forward, 0.0
        case "full":
            kept, again = size.hidden, whole * (attention + feed_forward)
        case _:
            kept, again = attention, half * feed_forward
    if execution.mlp_tile_tokens is not None:
        beyond = feed_forward * (1 - min(1.0, execution.mlp_tile_tokens / tokens))
        again -= (whole if execution.recompute == "full" else half) * beyond
    layers = 0 if execution.activation_offload == "cpu" and device == "cuda" else size.layers
    per_token = KEPT_TWICE[device] * (layers * kept + size.hidden) + again
    logits = min(HEAD_LOGITS[device], tokens * size.vocabulary)
    return int(tokens * width * per_token) + HEAD_BYTES[device] * logits


def cache_bytes(recipe: Recipe, phase: Phase, size: ModelSize, execution: Execution, width: int) -> int:
    """Keys and values of the sampler's slots, and of the prompts while they are read."""
    per_position = size.layers * 2 * size.keys * width
    if isinstance(phase, MergePhase):
        return SMOKE_POSITIONS * per_position
    if not isinstance(phase, EvaluatePhase | GrpoPhase):
        return 0
    names = {name for _, name in datasets_used(phase)}
    longest = max(
        (
            dataset.max_tokens
            for other in recipe.phases
            if isinstance(other, PreparePhase)
            for dataset in other.datasets
            if dataset.name in names
        ),
        default=0,
    )
    sequence = longest + phase.sampling.max_new_tokens
    if isinstance(phase, GrpoPhase):
        asked = phase.groups_per_step * phase.group_size * sequence
    else:
        asked = execution.rollout_tokens
    return min(asked, max(execution.rollout_tokens, sequence)) * per_position
