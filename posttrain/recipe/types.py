"""The frozen types a recipe is made of.

A field that changes the weights has no default, so that a recipe shows every number it trains with.
What does not change the weights belongs to `Execution`.
All of them stand in one file, however long, because a recipe is written with this page beside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticKnownError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Effort = Literal["low", "medium", "high"]
Precision = Literal["float32", "bfloat16", "nf4"]
"""Type of the matrix products (autocast); weights and optimizer state of trained tensors stay float32. `nf4` keeps the
frozen matrices of a dense model in four bits and multiplies in bfloat16."""
Dtype = Literal["float32", "bfloat16"]
"""Type that weights are written in."""


_drafting: ContextVar[bool] = ContextVar("drafting", default=False)


@contextmanager
def drafting() -> Iterator[None]:
    """Within, a faulty object is built unchecked instead of raising, so that all faults can be reported at once."""
    token = _drafting.set(True)
    try:
        yield
    finally:
        _drafting.reset(token)


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, use_attribute_docstrings=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError:
            if not _drafting.get():
                raise
            # Only what was given, wrong names included: checking the whole recipe again finds every fault.
            object.__setattr__(self, "__dict__", fields)
            object.__setattr__(self, "__pydantic_fields_set__", set(fields))
            object.__setattr__(self, "__pydantic_extra__", None)
            object.__setattr__(self, "__pydantic_private__", None)


# ---------------------------------------------------------------- model


class FolderBase(Frozen):
    """A Hugging Face model folder; `shipped:tiny` names the base inside the package."""

    kind: Literal["folder"]
    path: str


class HubBase(Frozen):
    """A model on the Hugging Face hub, or its copy below `POSTTRAIN_HUB_DIR`."""

    kind: Literal["hub"]
    repo: str
    revision: str | None
    """A commit makes the run repeatable; None is the newest when the run begins, and that one ever after."""


class FreshBase(Frozen):
    """A randomly initialised GPT-OSS with a vocabulary learned from the worlds' own text."""

    kind: Literal["fresh"]
    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    num_experts: Positive
    experts_per_token: Positive
    expert_size: Positive
    vocab_size: Positive
    sliding_window: Positive
    initializer_range: float


Base = Annotated[FolderBase | HubBase | FreshBase, Field(discriminator="kind")]


class HarmonyFormat(Frozen):
    """GPT-OSS's chat format; the date is part of the prompt and therefore fixed here."""

    kind: Literal["harmony"]
    date: str
    knowledge_cutoff: str
    reasoning_effort: Effort
    """Of conversations that name none of their own."""
    identity: str


class GemmaFormat(Frozen):
    """Gemma's turns of user and model."""

    kind: Literal["gemma"]
    reasoning: Literal["dropped", "numbered"]
    """`numbered` writes a turn's analysis as numbered steps under `Reasoning:` and its answer after `Answer:`."""


class TemplateFormat(Frozen):
    """Any Hugging Face chat template, rendered as transformers renders it."""

    kind: Literal["template"]
    template: str | None
    """The template's own text; null takes the one in the base's folder."""
    reasoning: Literal["dropped", "template"]
    """`template` hands a turn's analysis to the template, which must have a place for it."""
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    """What the template is told when it asks for today's date."""
    variables: dict[str, str | int | float | bool | None]
    """Further variables that the template reads, such as `enable_thinking`."""


ChatFormat = Annotated[HarmonyFormat | GemmaFormat | TemplateFormat, Field(discriminator="kind")]


class Lora(Frozen):
    """A fresh adapter. Targets are module names; `experts` is both expert projections."""

    kind: Literal["lora"]
    rank: Positive
    alpha: Annotated[float, Field(gt=0)]
    targets: tuple[str, ...]


class ContinueAdapter(Frozen):
    """Train on the adapter that came with the model state."""

    kind: Literal["continue"]


class FullParameters(Frozen):
    """Train every parameter of the base."""

    kind: Literal["full"]


Trainable = Annotated[Lora | ContinueAdapter | FullParameters, Field(discriminator="kind")]


class ParameterGroup(Frozen):
    """Trained parameters by name, with multiples of the optimizer's learning rate and weight decay."""

    pattern: str
    """Of whole names, with `*` and `?` (`*.lora_B`). Parameters belong to the first group that matches; one that gets
    none is a fault."""
    learning_rate_scale: Annotated[float, Field(gt=0)]
    weight_decay_scale: Annotated[float, Field(ge=0)]


class AdamW(Frozen):
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    beta1: Share
    beta2: Share
    epsilon: Annotated[float, Field(gt=0)]
    clip_norm: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "linear", "constant"]
    warmup_share: Share
    """Share of the phase's steps over which the rate rises from 0."""
    final_share: Share
    """The schedule's last rate as a share of `learning_rate`; ignored by `constant`."""
    groups: tuple[ParameterGroup, ...]
    """Parameters of no group are trained at scales of 1."""
    moments: Literal["float32", "8bit"]
    """How the two running means are kept; `8bit` takes a quarter of the memory, in blocks (bitsandbytes)."""


# ---------------------------------------------------------------- data


class WorldSource(Frozen):
    """Rows generated by a world; the held-out split shares no name, tool or program with training."""

    kind: Literal["world"]
    world: str
    split: Literal["train", "heldout"]
    count: Positive
    seed: int


RowFormat = Literal[
    "rows",
    "text",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_only",
    "prompt_completion",
    "preference",
    "unpaired_preference",
    "stepwise",
    "glaive",
    "xlam",
    "hermes",
    "code_act",
    "commitpackft",
    "editpackft",
    "hh_rlhf",
    "code_feedback",
    "code_task",
    "gsm8k",
    "arc",
    "smoltalk",
    "decision_table",
    "rt_trace",
    "evaluation",
]
"""How a record's columns become a row: `posttrain/data/formats`, one file each; `rows` is our own shape."""


class Selection(Frozen):
    """Which good rows of a source are taken, and how often they come in the mixture."""

    max_samples: Positive | None
    """None takes every row. Counted after filters and without malformed rows, so that it is exact."""
    seed: int | None
    """A number draws `max_samples` rows at random, which come in the source's order; None takes the first ones."""
    repeat: Positive
    """How often the whole selection is read in one epoch; in a dataset with weights, at most."""
    weight: Annotated[float, Field(gt=0)] | None
    """Its share against the weights of the dataset's other sources; None in all lays them together as they are."""


EVERY_ROW = Selection(max_samples=None, seed=None, repeat=1, weight=None)


class OneOf(Frozen):
    """Keep records whose column has one of these values; a dot goes into a nested field (`meta.game`)."""

    kind: Literal["one_of"]
    column: str
    values: tuple[str | int | bool, ...]


class TextLength(Frozen):
    """Keep records whose column has so many characters."""

    kind: Literal["text_length"]
    column: str
    at_least: Annotated[int, Field(ge=0)]
    at_most: Annotated[int, Field(ge=0)] | None


class Differs(Frozen):
    """Keep records whose two columns differ, and differ in length by at most so many characters."""

    kind: Literal["differs"]
    first: str
    second: str
    at_most: Annotated[int, Field(ge=0)]


class Part(Frozen):
    """Keep records of some of `of` equal parts; a digest of the column decides, so equal values are never parted."""

    kind: Literal["part"]
    column: str
    of: Annotated[int, Field(ge=2)]
    keep: tuple[Annotated[int, Field(ge=0)], ...]
    """Numbers of the parts, from 0."""


Filter = Annotated[OneOf | TextLength | Differs | Part, Field(discriminator="kind")]


class FileSource(Frozen):
    """Records of local files: `.jsonl`, `.csv`, `.parquet`, or `.txt` with a record per line that is not blank."""

    kind: Literal["file"]
    path: str
    """May be a pattern (`data/*.jsonl`): its files are read in sorted order, as one; `shipped:NAME` is an evaluation
    set inside the package."""
    format: RowFormat
    filters: tuple[Filter, ...]
    """All must hold; they look at the record before it is converted."""
    selection: Selection
    reasoning_effort: Effort | None
    """Overrides the chat format's for these rows."""


class HubSource(Frozen):
    """Records of a dataset on the Hugging Face hub, or of its copy below `POSTTRAIN_HUB_DIR`."""

    kind: Literal["hub"]
    repo: str
    subset: str | None
    split: str
    revision: str | None
    """A commit makes the run repeatable; None is the newest, whose commit the manifest records."""
    files: str | None
    """Data files inside the repository, where it declares no subsets of its own (`data/python/data.jsonl`)."""
    format: RowFormat
    filters: tuple[Filter, ...]
    """All must hold; they look at the record before it is converted."""
    selection: Selection
    reasoning_effort: Effort | None
    """Overrides the chat format's for these rows."""
    optional: bool
    """Whether the run may go on without it when it is gated or cannot be reached; a warning says so."""


class DecisionTableSource(Frozen):
    """Tasks of a decision table with the columns `prompt` and `q_action_0`, `q_action_1` and so on."""

    kind: Literal["decision_table"]
    path: str
    """A file or pattern, as for `FileSource`."""
    tau: Annotated[float, Field(gt=0)]
    """Rewards are a softmax of the Q-values at this temperature; a table that has rewards is a `FileSource`."""
    filters: tuple[Filter, ...]
    """All must hold; they look at the record before it is converted."""
    selection: Selection
    reasoning_effort: Effort | None
    """Overrides the chat format's for these rows."""


class RegisteredSource(Frozen):
    """Rows of a dataset built by `posttrain data build`."""

    kind: Literal["registered"]
    dataset: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}@[a-z0-9][a-z0-9._-]{0,63}$")]
    """`name@version`."""
    filters: tuple[Filter, ...]
    """All must hold; they look at the row as it is stored."""
    selection: Selection
    reasoning_effort: Effort | None
    """Overrides the chat format's for these rows."""


class CodeSource(Frozen):
    """Repairs of a source tree whose own tests catch its mutants: tasks, trajectories as conversations, or pairs."""

    kind: Literal["code"]
    path: str
    """A folder; `shipped:LANGUAGE` is the small tree inside the package."""
    language: Literal["rust", "python", "typescript", "go"]
    split: Literal["train", "heldout", "all"]
    """Of the tree's functions: a held-out one has no mutant in `train`."""
    count: Positive
    """Caught mutants, at most."""
    seed: int


Source = Annotated[
    WorldSource | FileSource | HubSource | DecisionTableSource | RegisteredSource | CodeSource,
    Field(discriminator="kind"),
]


class Dataset(Frozen):
    name: Name
    content: Literal["text", "conversations", "pairs", "tasks"]
    sources: tuple[Source, ...]
    max_tokens: Positive
    """Of one sample."""
    too_long: Literal["drop", "cut_at_turn"]
    """What becomes of a longer row: it is left out, or a conversation loses its last turns. Both are counted."""
    faulty_share: Share
    """Share of rows that may be malformed, without a target, or impossible to render: they are left out and counted by
    reason. One more stops the phase."""


# ---------------------------------------------------------------- gates


class Gate(Frozen):
    """Read from the phase's raw metrics per step, or from its result where `reduction` is `value`."""

    name: Name
    metric: str
    reduction: Literal["value", "last", "mean_last", "max", "min"]
    window: Positive
    """Steps that `mean_last` averages over."""
    comparison: Literal["<=", ">=", "<", ">"]
    threshold: float
    minimum_steps: Annotated[int, Field(ge=0)]
    hard: bool


# ---------------------------------------------------------------- phases


class PhaseBase(Frozen):
    name: Name
    gates: tuple[Gate, ...]


class PreparePhase(PhaseBase):
    kind: Literal["prepare"]
    datasets: tuple[Dataset, ...]


class SampleBatch(Frozen):
    """A step reads so many samples."""

    kind: Literal["samples"]
    samples: Positive


class RowBatch(Frozen):
    """A step reads so many rows, each filled with whole samples that do not see each other."""

    kind: Literal["rows"]
    rows: Positive
    row_tokens: Positive


Batch = Annotated[SampleBatch | RowBatch, Field(discriminator="kind")]


class Epochs(Frozen):
    """As many steps as it takes to read the dataset so often; the last step is filled from the epoch after."""

    kind: Literal["epochs"]
    epochs: Positive


class Skipped(Frozen):
    """No step: the phase hands on the model state it was given, and its result says why."""

    kind: Literal["skipped"]
    reason: Annotated[str, Field(min_length=1)]


def _at_least_one(steps: int | Epochs | Skipped) -> int | Epochs | Skipped:
    if isinstance(steps, int) and steps < 1:
        raise PydanticKnownError("greater_than_equal", {"ge": 1})
    return steps


Steps = Annotated[int | Annotated[Epochs | Skipped, Field(discriminator="kind")], AfterValidator(_at_least_one)]


class HeldOut(Frozen):
    """The phase's loss on data that it does not train on."""

    dataset: str
    every_steps: Positive
    """Computed over the whole dataset after so many steps each, and after the last one."""


class Sampling(Frozen):
    temperature: Annotated[float, Field(ge=0)]
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)]
    """Of the most probable tokens, so many as reach this share."""
    top_k: Positive | None
    """Only so many of the most probable tokens; applied before `top_p`. None takes all."""
    max_new_tokens: Positive
    """Per turn."""
    max_turns: Positive


class HeldOutTasks(Frozen):
    """Scores of tasks that the phase does not train on."""

    dataset: str
    every_steps: Positive
    """All of them are asked after so many steps each, and after the last one."""
    sampling: Sampling


class SftPhase(PhaseBase):
    kind: Literal["sft"]
    model: str
    """`base`, or the name of an earlier phase whose result is a model state."""
    dataset: str
    trainable: Trainable
    precision: Precision
    batch: Batch
    steps: Steps
    """The dataset is read in seeded epochs until so many steps are done."""
    optimizer: AdamW
    held_out: HeldOut | HeldOutTasks | None


class MergePhase(PhaseBase):
    kind: Literal["merge"]
    model: str
    dtype: Dtype


class Ipo(Frozen):
    """Squared distance of the mean log-ratio margin per token from 1/(2β)."""

    kind: Literal["ipo"]
    beta: Annotated[float, Field(gt=0)]


class Dpo(Frozen):
    """Logistic loss of β times the summed log-ratio margin."""

    kind: Literal["dpo"]
    beta: Annotated[float, Field(gt=0)]


class Kto(Frozen):
    """Each completion for itself, chosen as desirable and rejected as undesirable."""

    kind: Literal["kto"]
    beta: Annotated[float, Field(gt=0)]
    desirable_weight: Annotated[float, Field(gt=0)]
    undesirable_weight: Annotated[float, Field(gt=0)]


class Orpo(Frozen):
    """Likelihood of the chosen completion and the log odds ratio; no reference."""

    kind: Literal["orpo"]
    odds_weight: Annotated[float, Field(gt=0)]


class SimPo(Frozen):
    """Logistic loss of β times the margin of mean log-probabilities, less `margin`; no reference."""

    kind: Literal["simpo"]
    beta: Annotated[float, Field(gt=0)]
    margin: Annotated[float, Field(ge=0)]


PreferenceObjective = Annotated[Ipo | Dpo | Kto | Orpo | SimPo, Field(discriminator="kind")]


class PreferencePhase(PhaseBase):
    kind: Literal["preference"]
    model: str
    dataset: str
    trainable: Trainable
    precision: Precision
    objective: PreferenceObjective
    pairs_per_step: Positive
    steps: Steps
    optimizer: AdamW
    held_out: HeldOut | HeldOutTasks | None


class DrGrpo(Frozen):
    """Token ratios, clipped; divided by a constant, advantages not by the group's spread."""

    kind: Literal["dr_grpo"]
    clip_low: Annotated[float, Field(gt=0, lt=1)]
    clip_high: Annotated[float, Field(gt=0)]


class Dapo(Frozen):
    """Token ratios, clipped; divided by the sampled tokens, advantages by the group's spread."""

    kind: Literal["dapo"]
    clip_low: Annotated[float, Field(gt=0, lt=1)]
    clip_high: Annotated[float, Field(gt=0)]


class Gspo(Frozen):
    """One ratio per sequence, clipped; a mean over episodes, advantages divided by the group's spread."""

    kind: Literal["gspo"]
    clip_low: Annotated[float, Field(gt=0, lt=1)]
    clip_high: Annotated[float, Field(gt=0)]


class Cispo(Frozen):
    """Capped token ratios as constant weights of a policy gradient; otherwise as DAPO."""

    kind: Literal["cispo"]
    ratio_cap: Annotated[float, Field(gt=0)]


GrpoObjective = Annotated[DrGrpo | Dapo | Gspo | Cispo, Field(discriminator="kind")]


class Stage(Frozen):
    """What is rolled out from a step on, until the next stage's."""

    from_step: Positive
    max_prompt_tokens: Positive
    """Tasks with longer prompts wait for a later stage."""
    max_turns: Positive
    """In place of `sampling.max_turns`."""
    tiers: tuple[str, ...] | None
    """Values of the tasks' `tier`; None takes tasks of any, and those without one."""


class EpisodeFilters(Frozen):
    """Episodes that are rolled out and recorded, but not trained on; each is counted by its reason."""

    at_least_tokens: Annotated[int, Field(ge=0)]
    """Sampled tokens; an episode with fewer is masked."""
    duplicates: Literal["kept", "masked"]
    """Episodes whose tokens an earlier one of their group has."""
    overlong: Literal["masked", "scored"]
    """Episodes cut off at `max_new_tokens`."""


EVERY_EPISODE = EpisodeFilters(at_least_tokens=0, duplicates="kept", overlong="masked")


class GrpoPhase(PhaseBase):
    kind: Literal["grpo"]
    model: str
    dataset: str
    trainable: Trainable
    precision: Precision
    objective: GrpoObjective
    kl_weight: Annotated[float, Field(ge=0)]
    """Weight of the divergence from the phase's input state; 0 computes no reference."""
    sampler_ratio_cap: Annotated[float, Field(gt=0)] | None
    """Truncated importance sampling: the cap of trainer over sampler probability; None trusts the sampler's own."""
    groups_per_step: Positive
    spare_groups: Annotated[int, Field(ge=0)]
    """Rolled out beyond `groups_per_step`: of all, the first ones with spread are trained on."""
    group_size: Annotated[int, Field(ge=2)]
    filters: EpisodeFilters
    curriculum: tuple[Stage, ...]
    """Empty asks every task at every step."""
    steps: Steps
    updates_per_rollout: Positive
    reward: dict[str, float]
    """Weights of the score's parts, by name; a part without one is only recorded. A world whose parts are others has
    weights of its own, as `code.reward`."""
    pass_mark: float
    """An episode whose score reaches it counts as solved in `reward_accuracy`."""
    sampling: Sampling
    optimizer: AdamW
    held_out: HeldOutTasks | None


class Vote(Frozen):
    """Each task is answered several times."""

    samples: Annotated[int, Field(ge=2)]
    counts: Literal["majority", "mean"]
    """What is the task's score: that of the answer most often given, of equals the lowest, or the mean over all."""
    pass_mark: float
    """A sample whose score reaches it passes."""
    pass_at: tuple[Positive, ...]
    """Each k gives a part `pass@k`: the chance that of k samples at least one passes, estimated from all."""


class EvaluatePhase(PhaseBase):
    kind: Literal["evaluate"]
    model: str
    datasets: tuple[str, ...]
    shots: Annotated[int, Field(ge=0)]
    """Solved training examples put in front of each task (few-shot)."""
    vote: Vote | None
    """None asks each task once."""
    sampling: Sampling
    precision: Precision


class Candidate(Frozen):
    """A model state that an export may take, with the evaluation that speaks for it."""

    model: str
    evaluation: str


class Tolerances(Frozen):
    """How far an export may be from the adapter it came from, format by format."""

    merged_logits: Annotated[float, Field(gt=0)]
    """Largest absolute logit difference of the adapter and the float32 merge, both in float64."""
    rounded_kl: Annotated[float, Field(gt=0)]
    """KL from the exact merge, in nats per position, of a merge rounded to bfloat16."""
    mxfp4_share: Share
    """Least share of the adapter's change that survives MXFP4."""
    mxfp4_agreement: Share
    """Least greedy agreement of the MXFP4 folder with the exact merge."""
    gguf_near_tie: dict[str, float]
    """By GGUF type: how far below the best logit a token may be that llama.cpp chooses in another's place; it rounds
    activations to the type of the weights. Types that are not named are measured, not judged."""


USUAL_TOLERANCES = Tolerances(
    merged_logits=1e-4,
    rounded_kl=0.01,
    mxfp4_share=0.5,
    mxfp4_agreement=0.95,
    gguf_near_tie={"f32": 0.02, "f16": 0.1, "bf16": 0.2, "q8_0": 0.5},
)
"""For exports that no recipe judges, and for recipes that have no reason to differ."""


class ExportPhase(PhaseBase):
    kind: Literal["export"]
    candidates: tuple[Candidate, ...]
    metrics: tuple[str, ...]
    """The best candidate has the highest mean of these metrics; ties go to the later one."""
    formats: tuple[Literal["hf", "mxfp4", "gguf", "ollama", "adapter"], ...]
    dtype: Dtype
    gguf_type: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m", "mxfp4", "auto"]
    """`auto` is MXFP4 experts with q8_0 elsewhere for GPT-OSS, and q8_0 for others; `q4_k_m` needs llama.cpp's
    quantizer."""
    verify_dataset: str
    verify_prompts: Positive
    tolerances: Tolerances


Phase = Annotated[
    PreparePhase | SftPhase | MergePhase | PreferencePhase | GrpoPhase | EvaluatePhase | ExportPhase,
    Field(discriminator="kind"),
]


class Suggested(Frozen):
    """What the recipe would be carried out with. What is asked for by an option comes first; null suggests nothing."""

    micro_batch_tokens: dict[str, Positive]
    """By training phase."""
    checkpoint_every_steps: Positive | None
    recompute: Literal["none", "selective", "full"] | None
    mlp_tile_tokens: Positive | None
    base_weights: Literal["unpacked", "packed"] | None


NOTHING_SUGGESTED = Suggested(
    micro_batch_tokens={}, checkpoint_every_steps=None, recompute=None, mlp_tile_tokens=None, base_weights=None
)


class Recipe(Frozen):
    """The whole run as data. Its digest is the run's identity."""

    name: Name
    flags: dict[str, str | int | float | bool | None]
    """The recipe function's parameters as called."""
    seed: int
    base: Base
    chat: ChatFormat
    phases: tuple[Phase, ...]
    suggested: Suggested


# ---------------------------------------------------------------- execution


class Execution(Frozen):
    """How this machine carries the recipe out. May change between attempts; every attempt records it."""

    backend: Literal["torch", "tunix"] = "torch"
    """Who carries out SFT: PyTorch, or Tunix on JAX in a process of its own; all else is PyTorch's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model is; `auto` is a GPU where there is one."""
    compile: Literal["auto", "off"] = "auto"
    """Whether elementwise chains become one kernel each on a GPU, and layers in bfloat16 a few on a processor with a
    tile unit (Intel AMX), compiled once a machine; `off` runs them operation by operation."""
    base_weights: Literal["unpacked", "packed"] = "unpacked"
    """Whether experts of an MXFP4 base are unpacked when they are loaded, or kept in four bits until they are used."""
    vocabulary: Literal["device", "cpu"] = "device"
    """Where a frozen embedding and output head are; `cpu` saves GPU memory and brings the head over for each use."""
    gpu_ranks: Annotated[str, Field(pattern=r"^\d+(,\d+)*$")] | None = None
    """Numbers of the GPUs that the run may see, as `0,1`; else all of them."""
    threads: Positive = 2
    sandbox: Literal["auto", "namespaces", "dropped-user", "unprivileged", "off"] = "auto"
    """Where code that a model wrote runs: the best level there is, one that must be had, or off: as you."""
    micro_batch_tokens: Positive | None = None
    """Tokens of one forward and backward pass, at most; an item longer than this goes alone. Else what the recipe
    suggests, or 8192."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again: nothing, each layer's feed-forward half, or all of it."""
    mlp_tile_tokens: Positive | None = None
    """Feed-forward blocks take so many tokens at a time and are recomputed; for rows too long to hold at once."""
    activation_offload: Literal["none", "cpu"] = "none"
    """Where tensors wait for the backward pass: with the model, or in the CPU's memory."""
    rollout_tokens: Positive = 65536
    """Key-value positions the sampler may hold at once."""
    sampler_url: str | None = None
    """An OpenAI-compatible server that samples in place of this process, such as `http://127.0.0.1:8000`."""
    checkpoint_every_steps: Positive = 50
    keep_checkpoints: Positive = 2
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Who is told the metrics besides the run's own files."""
