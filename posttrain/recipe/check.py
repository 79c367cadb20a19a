"""Checks of a recipe that need more than one field, all faults reported together."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from posttrain.errors import RecipeError
from posttrain.recipe.inputs import datasets_used, models_used
from posttrain.recipe.spelling import did_you_mean
from posttrain.recipe.types import (
    ContinueAdapter,
    Dataset,
    EvaluatePhase,
    ExportPhase,
    FreshBase,
    FullParameters,
    Gate,
    GrpoPhase,
    HarmonyFormat,
    HeldOutTasks,
    MergePhase,
    Phase,
    PreferencePhase,
    PreparePhase,
    Recipe,
    RowBatch,
    SftPhase,
    Vote,
)

CONTENT_READ = {
    "sft": ("conversations", "text"),
    "preference": ("pairs",),
    "grpo": ("tasks",),
    "evaluate": ("tasks", "pairs"),
    "export": ("tasks",),
}
"""What content each kind of phase can read."""

ROUTING_METRICS = ("expert_load_max", "dead_experts", "router_entropy")
"""In the rows of models with experts."""
STEP_METRICS = (
    "loss",
    "gradient_norm",
    "learning_rate",
    "tokens",
    "target_tokens",
    "seconds",
    "tokens_per_second",
    "peak_flops_share",
    "peak_memory_bytes",
    *ROUTING_METRICS,
)
HELD_OUT = "held_out_"
"""Begins the names of metrics of data that is not trained on, in the rows of the steps after which it was looked at."""
METRICS_BY_KIND = {
    "sft": (*STEP_METRICS, "fill", f"{HELD_OUT}loss"),
    "preference": (
        *(*STEP_METRICS, "margin", "accuracy"),
        *(f"{HELD_OUT}{name}" for name in ("loss", "margin", "accuracy")),
    ),
    "grpo": (*STEP_METRICS, "reward", "reward_accuracy", "zero_spread_groups", "unscorable", "mean_new_tokens"),
}
"""Metrics in the rows of `metrics.jsonl`; a phase kind not listed writes no rows."""

TrainingPhase = SftPhase | PreferencePhase | GrpoPhase


def check(recipe: Recipe) -> None:
    """Raise RecipeError with every fault there is, or return."""
    faults = [*_field_faults(recipe)] or [*_cross_faults(recipe)]
    if faults:
        raise RecipeError(_message(recipe.name, faults))


def _message(name: object, faults: list[str]) -> str:
    count = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
    return "\n".join([f"recipe {name!r} has {count}:", *(f"  {fault}" for fault in faults)])


def _field_faults(recipe: Recipe) -> Iterator[str]:
    """Faults of single fields, found by validating the whole again (a draft holds unchecked values)."""
    try:
        Recipe.model_validate(plain(recipe))
    except ValidationError as error:
        for fault in error.errors():
            yield _describe(fault, recipe)


def plain(value: Any) -> Any:
    """Models as dictionaries all the way down, without checking anything."""
    if isinstance(value, BaseModel):
        return {name: plain(part) for name, part in value.__dict__.items()}
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def _describe(fault: Any, recipe: Recipe) -> str:
    """Field path, value, what is allowed, nearest spelling."""
    path, model = _path(fault["loc"], recipe)
    message = fault["msg"][0].lower() + fault["msg"][1:]
    context = fault.get("ctx", {})
    if fault["type"] == "extra_forbidden":
        known = model.model_fields if model is not None else {}
        return f"{path}: there is no such field{did_you_mean(str(fault['loc'][-1]), known)}"
    if fault["type"] == "missing":
        return f"{path}: this field is required"
    if fault["type"] == "union_tag_invalid":
        allowed = str(context["expected_tags"]).replace("'", "")
        return f"{path}.kind: {context['tag']!r} is not allowed: allowed: {allowed}{_near(context['tag'], allowed)}"
    near = _near(fault["input"], str(context["expected"])) if fault["type"] == "literal_error" else ""
    value = fault["input"] if not isinstance(fault["input"], dict | list | tuple) else type(fault["input"]).__name__
    return f"{path}: {value!r} is not allowed: {message}{near}"


def _near(wrong: object, expected: str) -> str:
    return did_you_mean(str(wrong), expected.replace("'", "").replace(" or ", ", ").split(", "))


def _path(location: tuple[int | str, ...], recipe: Recipe) -> tuple[str, type[BaseModel] | None]:
    """The location in the recipe's own terms: elements by name, without the tags of unions; and the model it is in."""
    path, model = "", None
    value: Any = recipe
    entered = False
    for part in location:
        if isinstance(value, BaseModel):
            if entered and part == getattr(value, "kind", None):
                entered = False
                continue
            model = type(value)
            path = f"{path}.{part}" if path else str(part)
            value = value.__dict__.get(str(part))
        elif isinstance(value, list | tuple) and isinstance(part, int):
            value = value[part]
            path += f"[{getattr(value, 'name', part)}]"
        elif isinstance(value, dict) and part in value:
            path += f".{part}"
            value = value[part]
        else:
            path += f".{part}"
        entered = True
    return path, model


# ---------------------------------------------------------------- more than one field


def _cross_faults(recipe: Recipe) -> Iterator[str]:
    yield from _repeated("phases", (phase.name for phase in recipe.phases))
    yield from _repeated("datasets", (dataset.name for dataset in _datasets(recipe.phases)))
    if not recipe.phases:
        yield "phases: a recipe needs at least one phase"
    if any(phase.name == "base" for phase in recipe.phases):
        yield "phases[base].name: 'base' is taken by the recipe's base; choose another name"
    if isinstance(recipe.base, FreshBase):
        if not isinstance(recipe.chat, HarmonyFormat):
            yield f"chat.kind: {recipe.chat.kind!r} is not allowed: a fresh base is a GPT-OSS; allowed: harmony"
        yield from _fresh_base_faults(recipe.base)
    for index, phase in enumerate(recipe.phases):
        yield from _phase_faults(recipe, index, phase)
    trained = [phase.name for phase in recipe.phases if isinstance(phase, TrainingPhase)]
    for name in recipe.suggested.micro_batch_tokens:
        if name not in trained:
            near = did_you_mean(name, trained)
            yield f"suggested.micro_batch_tokens: {name!r} is no training phase{near}; allowed: {', '.join(trained)}"


def _fresh_base_faults(base: FreshBase) -> Iterator[str]:
    if base.experts_per_token > base.num_experts:
        yield f"base.experts_per_token: {base.experts_per_token} is more than base.num_experts, {base.num_experts}"
    if base.num_heads % base.num_kv_heads:
        yield f"base.num_heads: {base.num_heads} is no multiple of base.num_kv_heads, {base.num_kv_heads}"


def _repeated(path: str, names: Iterable[str]) -> Iterator[str]:
    for name, count in Counter(names).items():
        if count > 1:
            yield f"{path}[{name}].name: {name!r} is used {count} times; names must be unique"


def _datasets(phases: Iterable[Phase]) -> Iterator[Dataset]:
    for phase in phases:
        if isinstance(phase, PreparePhase):
            yield from phase.datasets


def _phase_faults(recipe: Recipe, index: int, phase: Phase) -> Iterator[str]:
    path = f"phases[{phase.name}]"
    earlier = recipe.phases[:index]
    yield from _model_faults(recipe, path, earlier, phase)
    yield from _dataset_faults(recipe, path, earlier, phase)
    if isinstance(phase, TrainingPhase) and isinstance(phase.trainable, FullParameters) and phase.precision == "nf4":
        yield f"{path}.precision: nf4 keeps frozen weights, and {path}.trainable trains all: use bfloat16, or lora"
    if isinstance(phase, TrainingPhase) and isinstance(phase.trainable, ContinueAdapter):
        yield from _continue_faults(f"{path}.model", recipe, phase.model)
    if isinstance(phase, ExportPhase):
        yield from _export_faults(recipe, path, earlier, phase)
    for dataset in phase.datasets if isinstance(phase, PreparePhase) else ():
        yield from _cut_faults(f"{path}.datasets[{dataset.name}]", dataset)
        yield from _weight_faults(f"{path}.datasets[{dataset.name}]", dataset)
    if isinstance(phase, SftPhase) and isinstance(phase.batch, RowBatch):
        yield from _row_faults(f"{path}.batch.row_tokens", earlier, phase.dataset, phase.batch)
    if isinstance(phase, TrainingPhase) and phase.held_out and phase.held_out.dataset == phase.dataset:
        yield f"{path}.held_out.dataset: {phase.dataset!r} is what the phase trains on; nothing of it is held out"
    if isinstance(phase, GrpoPhase) and phase.curriculum:
        yield from _curriculum_faults(f"{path}.curriculum", phase)
    if isinstance(phase, EvaluatePhase) and phase.vote:
        yield from _vote_faults(path, phase, phase.vote)
    yield from _repeated(f"{path}.gates", (gate.name for gate in phase.gates))
    for gate in phase.gates:
        yield from _gate_faults(f"{path}.gates[{gate.name}]", recipe, phase, gate)
    for field, values in _required(phase):
        if not values:
            yield f"{path}.{field}: empty; at least one is needed"


def _curriculum_faults(path: str, phase: GrpoPhase) -> Iterator[str]:
    starts = [stage.from_step for stage in phase.curriculum]
    if starts[0] != 1:
        yield f"{path}[0].from_step: {starts[0]} is not allowed: the first stage begins at step 1"
    for place, (before, start) in enumerate(pairwise(starts), 1):
        if start <= before:
            yield f"{path}[{place}].from_step: {start} is not later than the stage before it, {before}"
    if isinstance(phase.steps, int) and starts[-1] > phase.steps:
        yield f"{path}[{len(starts) - 1}].from_step: {starts[-1]} is after the phase's last step, {phase.steps}"


def _vote_faults(path: str, phase: EvaluatePhase, vote: Vote) -> Iterator[str]:
    if phase.sampling.temperature == 0:
        yield f"{path}.sampling.temperature: 0 gives {vote.samples} equal samples; a vote needs a higher one"
    for k in vote.pass_at:
        if k > vote.samples:
            yield f"{path}.vote.pass_at: {k} is more than the {vote.samples} samples of a task"


def _required(phase: Phase) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for field in ("datasets", "candidates", "metrics", "formats"):
        if hasattr(phase, field):
            yield field, getattr(phase, field)
    for dataset in phase.datasets if isinstance(phase, PreparePhase) else ():
        yield f"datasets[{dataset.name}].sources", dataset.sources


def makes_state(phase: Phase) -> bool:
    """Whether the phase's result is a model state that later phases can start from."""
    return isinstance(phase, TrainingPhase | MergePhase)


def _model_faults(recipe: Recipe, path: str, earlier: tuple[Phase, ...], phase: Phase) -> Iterator[str]:
    available = ["base", *(before.name for before in earlier if makes_state(before))]
    names = {other.name for other in recipe.phases}
    for field, model in models_used(phase):
        if model in available:
            continue
        if model in names and any(before.name == model for before in earlier):
            reason = "that phase makes no model state"
        elif model in names:
            reason = "that phase does not come earlier"
        else:
            reason = f"there is no such phase{did_you_mean(model, available)}"
        yield f"{path}.{field}: {model!r} is not allowed: {reason}; allowed: {', '.join(available)}"


def _dataset_faults(recipe: Recipe, path: str, earlier: tuple[Phase, ...], phase: Phase) -> Iterator[str]:
    ready = {dataset.name: dataset.content for dataset in _datasets(earlier)}
    everywhere = {dataset.name for dataset in _datasets(recipe.phases)}
    for field, dataset in datasets_used(phase):
        tasks_asked = field.startswith("held_out") and isinstance(getattr(phase, "held_out", None), HeldOutTasks)
        allowed = ("tasks",) if tasks_asked else CONTENT_READ.get(phase.kind, ())
        fitting = [name for name, content in ready.items() if content in allowed]
        if dataset in ready and ready[dataset] not in allowed:
            reader = "HeldOutTasks" if tasks_asked else f"a phase of kind {phase.kind}"
            reason = f"its content is {ready[dataset]}, {reader} reads {' or '.join(allowed)}"
        elif dataset in ready:
            continue
        elif dataset in everywhere:
            reason = "no earlier phase prepares it"
        else:
            reason = f"there is no such dataset{did_you_mean(dataset, ready)}"
        yield f"{path}.{field}: {dataset!r} is not allowed: {reason}; allowed: {', '.join(fitting) or 'none yet'}"


def _cut_faults(path: str, dataset: Dataset) -> Iterator[str]:
    if dataset.too_long == "cut_at_turn" and dataset.content != "conversations":
        yield f"{path}.too_long: 'cut_at_turn' is not allowed: {dataset.content} have no turns to cut at; allowed: drop"


def _weight_faults(path: str, dataset: Dataset) -> Iterator[str]:
    weights = [getattr(getattr(source, "selection", None), "weight", None) for source in dataset.sources]
    if any(weight is not None for weight in weights):
        for place, weight in enumerate(weights):
            if weight is None:
                yield f"{path}.sources[{place}]: it has no weight and others have; give one to all sources or to none"


def _row_faults(path: str, earlier: tuple[Phase, ...], name: str, batch: RowBatch) -> Iterator[str]:
    """A row holds whole samples, so it must have room for the longest."""
    for dataset in _datasets(earlier):
        if dataset.name == name and dataset.max_tokens > batch.row_tokens:
            least = f"its samples may have max_tokens={dataset.max_tokens}"
            yield f"{path}: {batch.row_tokens} is too small for dataset {name!r}: {least}"


def _continue_faults(path: str, recipe: Recipe, model: str) -> Iterator[str]:
    """A continued adapter must come with the state."""
    maker = next((phase for phase in recipe.phases if phase.name == model), None)
    makes_adapter = isinstance(maker, TrainingPhase) and not isinstance(maker.trainable, FullParameters)
    if (maker is not None and not makes_adapter) or model == "base":
        yield f"{path}: {model!r} carries no adapter to continue; use Lora, or a phase that trained one"


def _export_faults(recipe: Recipe, path: str, earlier: tuple[Phase, ...], phase: ExportPhase) -> Iterator[str]:
    evaluations = {before.name: before for before in earlier if isinstance(before, EvaluatePhase)}
    for place, candidate in enumerate(phase.candidates):
        where = f"{path}.candidates[{place}].evaluation"
        evaluation = evaluations.get(candidate.evaluation)
        if evaluation is None:
            allowed = ", ".join(evaluations) or "none yet"
            yield (
                f"{where}: {candidate.evaluation!r} is no earlier evaluate phase"
                f"{did_you_mean(candidate.evaluation, evaluations)}; allowed: {allowed}"
            )
        elif evaluation.model != candidate.model:
            yield f"{where}: {candidate.evaluation!r} evaluates {evaluation.model!r}, not {candidate.model!r}"
        else:
            for metric in phase.metrics:
                if metric.partition(".")[0] not in evaluation.datasets:
                    near = did_you_mean(metric.partition(".")[0], evaluation.datasets)
                    yield f"{path}.metrics: {metric!r} names no dataset of {candidate.evaluation!r}{near}"


def _gate_faults(path: str, recipe: Recipe, phase: Phase, gate: Gate) -> Iterator[str]:
    if gate.reduction == "value":
        if isinstance(phase, EvaluatePhase) and gate.metric.partition(".")[0] not in phase.datasets:
            near = did_you_mean(gate.metric.partition(".")[0], phase.datasets)
            yield (
                f"{path}.metric: {gate.metric!r} names no dataset of this phase{near}; "
                f"allowed: <dataset>.<part> with one of {', '.join(phase.datasets)}"
            )
        return
    known = METRICS_BY_KIND.get(phase.kind)
    if gate.metric.startswith(HELD_OUT) and isinstance(getattr(phase, "held_out", None), HeldOutTasks):
        # Which parts a score has is the world's affair; one that never comes fails the gate.
        known = (gate.metric,)
    if known is None:
        reason = f"a phase of kind {phase.kind} has no metrics per step"
        yield f"{path}.reduction: {gate.reduction!r} is not allowed: {reason}; allowed: value"
    elif gate.metric not in known:
        yield (
            f"{path}.metric: {gate.metric!r} is no metric of a {phase.kind} phase{did_you_mean(gate.metric, known)}; "
            f"allowed: {', '.join(known)}"
        )
    elif gate.metric.startswith(HELD_OUT) and getattr(phase, "held_out", None) is None:
        yield f"{path}.metric: {gate.metric!r} is never computed: this phase's held_out is null"
    steps = getattr(phase, "steps", None)
    if isinstance(steps, int) and gate.minimum_steps > steps:
        yield f"{path}.minimum_steps: {gate.minimum_steps} can never be reached, the phase has {steps} steps"


def phase_kinds() -> tuple[str, ...]:
    """Every kind of phase there is."""
    union = get_args(Phase)[0]
    return tuple(get_args(phase.model_fields["kind"].annotation)[0] for phase in get_args(union))
