"""Export: choose the best model state by its evaluation, write it in every format, prove each one equal to it."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from posttrain.chat.conversation import Conversation
from posttrain.chat.render import renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.shard import Shard
from posttrain.errors import PhaseFault, PosttrainError, Stopped
from posttrain.export.formats import Model, Piece, adapter_piece, gguf_file, gguf_piece, merge_piece, ollama_piece
from posttrain.export.merge import apply_merge, plan_merge
from posttrain.export.ollama import HarmonySettings
from posttrain.export.smoke import SPECIAL
from posttrain.export.survival import Survivals
from posttrain.export.verify import (
    Comparison,
    Logits,
    verify_folder,
    verify_gguf,
    verify_mxfp4,
    verify_rounded,
)
from posttrain.phases.context import ModelState, PhaseContext, PhaseOutcome
from posttrain.recipe.types import Candidate, ExportPhase, Recipe
from posttrain.run.folder import RunFolder, digest_folder, files_below

GREEDY_TOKENS = 24
"""Tokens of each continuation that llama.cpp and transformers must agree on."""


@dataclass
class Work:
    """One export in progress: what is written, and what the result will say about it."""

    context: PhaseContext
    phase: ExportPhase
    state: ModelState
    prompts: list[list[int]]
    texts: dict[str, list[int]]
    stop_tokens: frozenset[int]
    metrics: dict[str, float] = field(default_factory=dict)
    verification: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    """Formats that failed without failing the run: the next attempt tries them again."""
    outputs: list[Path] = field(default_factory=list)
    logits: Logits = field(default_factory=list)
    """Of the exact merge, once it is verified."""

    @property
    def exports(self) -> Path:
        return self.context.folder.path / "exports"

    @property
    def model(self) -> Model:
        return model_of(self.context.recipe, self.context.run, self.state)

    def write(self, piece: Piece) -> Path:
        """Make `exports/<folder>` unless an earlier attempt finished it from the same state."""
        if self.context.stop_requested():
            raise Stopped(f"stopped in {self.phase.name} before writing {piece.folder}")
        if not piece.write(self.model, self.exports):
            self.notes.append(f"{piece.folder}: kept what an earlier attempt had finished")
        target = self.exports / piece.folder
        self.outputs.append(target)
        self.metrics[f"{piece.format}_bytes"] = float(sum(file.stat().st_size for file in files_below(target)))
        return target


def model_of(recipe: Recipe, run: RunFolder, state: ModelState) -> Model:
    chat = recipe.chat
    harmony = None
    if chat.kind == "harmony":
        harmony = HarmonySettings(chat.date, chat.knowledge_cutoff, chat.reasoning_effort, chat.identity)
    return Model(
        name=recipe.name,
        base=run.model_folder(state.base),
        adapter=None if state.adapter is None else run.model_folder(state.adapter),
        digests={"base": state.base_digest, "adapter": state.adapter_digest},
        harmony=harmony,
    )


def run(context: PhaseContext, phase: ExportPhase) -> PhaseOutcome:
    torch.set_num_threads(context.execution.threads)
    chosen, table = choose(context.results, phase.candidates, phase.metrics)
    state = context.states[chosen.model]
    dataset = context.dataset_folder(phase.verify_dataset)
    inputs = verification_inputs(context.recipe, context.base_folder(state), dataset, phase)
    work = Work(context, phase, state, *inputs)
    aside = context.folder.path / ".float32"
    steps = (*phase.formats, "verification")
    try:
        with context.progress(f"{phase.name}: writing {', '.join(phase.formats)}", len(steps), "steps", 0) as progress:
            for format_name, make in WRITERS.items():
                if format_name in phase.formats:
                    make(work, aside)
                    progress.advance()
                if format_name == "hf":
                    verify_merge(work, exact_folder(work, aside))
                    progress.advance()
    finally:
        shutil.rmtree(aside, ignore_errors=True)

    return PhaseOutcome(
        outputs=tuple(work.outputs),
        metrics=work.metrics,
        counts={"verified_prompts": len(work.prompts)},
        state=_exported_state(work),
        notes=tuple(work.notes),
        details={
            "chosen": chosen.model,
            "candidates": table,
            "unfinished": work.unfinished,
            "verification": [row.row() for row in work.verification],
        },
    )


def _exported_state(work: Work) -> ModelState:
    """The exported Hugging Face folder, or the chosen state where none was asked for."""
    if "hf" not in work.phase.formats:
        return work.state
    hf = work.context.folder.export("hf")
    return ModelState(
        base=str(hf.relative_to(work.context.run.path)),
        base_digest=digest_folder(hf),
        adapter=None,
        adapter_digest=None,
        phase=work.phase.name,
    )


def choose(
    results: dict[str, dict[str, Any]], candidates: Sequence[Candidate], metrics: Sequence[str]
) -> tuple[Candidate, list[dict[str, Any]]]:
    """The candidate with the highest mean of the metrics, the later of equals, and the table that shows why."""
    table: list[dict[str, Any]] = []
    for candidate in candidates:
        found = results[candidate.evaluation]["metrics"]
        missing = [name for name in metrics if name not in found]
        if missing:
            raise PhaseFault(f"evaluation {candidate.evaluation} has no metric {missing[0]!r}; it has {sorted(found)}")
        values = {name: found[name] for name in metrics}
        mean = sum(values.values()) / len(values)
        table.append({"model": candidate.model, "evaluation": candidate.evaluation, **values, "mean": mean})
    best = max(range(len(table)), key=lambda index: (table[index]["mean"], index))
    for index, row in enumerate(table):
        row["chosen"] = index == best
    return candidates[best], table


def verification_inputs(
    recipe: Recipe, base: Path, dataset: Path, phase: ExportPhase
) -> tuple[list[list[int]], dict[str, list[int]], frozenset[int]]:
    """Prompts as tokens, plain texts with their token ids, and the tokens that end an answer."""
    tokenizer = Tokenizer.load(base)
    render = renderer(recipe.chat, tokenizer)
    shard = Shard(dataset)
    if shard.num_rows < phase.verify_prompts:
        raise PhaseFault(
            f"dataset {phase.verify_dataset} has {shard.num_rows} rows, verify_prompts asks for {phase.verify_prompts}"
        )
    rows = [shard.row(number) for number in range(phase.verify_prompts)]
    conversations = [Conversation.model_validate(row["prompt"]) for row in rows]
    texts = [message.content for conversation in conversations for message in conversation.messages]
    return (
        [render.prompt(conversation) for conversation in conversations],
        # llama.cpp reads Harmony's tokens wherever they are spelled out; here such text stays text.
        {text: tokenizer.encode(text) for text in texts if not SPECIAL.search(text)},
        render.stop_tokens,
    )


def export_adapter(work: Work, aside: Path) -> None:
    if work.state.adapter is None:
        work.notes.append(f"adapter: the state of {work.state.phase} has none, nothing to write")
        return
    work.write(adapter_piece(work.model))


def export_hf(work: Work, aside: Path) -> None:
    dtype, model = work.phase.dtype, work.model
    work.write(merge_piece("hf", model, plan_merge(model.base, model.adapter, getattr(torch, dtype)), {"dtype": dtype}))


def exact_folder(work: Work, aside: Path) -> Path:
    """The merge in float32: what was exported, or one made to compare with."""
    if "hf" in work.phase.formats and work.phase.dtype == "float32":
        return work.exports / "hf"
    if not aside.exists():
        aside.mkdir(parents=True)
        apply_merge(plan_merge(work.model.base, work.model.adapter, torch.float32), aside)
    return aside


def verify_merge(work: Work, exact: Path) -> None:
    """Compare the float32 merge; what rounding to the exported type adds is measured in a row of its own.

    Raises PhaseFault where the merged model is not the model state within the recipe's tolerance.
    """
    phase, model = work.phase, work.model
    rows, logits = verify_folder(model.base, model.adapter, exact, work.prompts, phase.tolerances.merged_logits)
    work.logits = logits
    judged = [row for row in rows if row.status == "agrees"]
    if "hf" in phase.formats and phase.dtype != "float32":
        rows.append(verify_rounded(work.exports / "hf", phase.dtype, work.prompts, logits, phase.tolerances))
    work.verification += rows
    for row in rows:
        if row.status == "differs":
            raise PhaseFault(
                f"{row.pair}: {row.reason} (logits by {row.max_abs:.3g}, on average {row.mean_abs:.3g}, KL "
                f"{row.kl:.3g}, greedy agreement {row.greedy_agreement:.3f} on {row.prompts} prompts)"
            )
        if row.status == "unverified":
            work.notes.append(f"{row.pair} unverified: {row.reason}")
    work.metrics["hf_max_abs"] = max((row.max_abs or 0.0 for row in judged), default=0.0)
    work.metrics["hf_kl"] = max((row.kl or 0.0 for row in judged), default=0.0)
    agreements = [row.greedy_agreement for row in rows if row.greedy_agreement is not None]
    work.metrics["hf_greedy_agreement"] = min(agreements, default=0.0)


def export_mxfp4(work: Work, aside: Path) -> None:
    """Metrics say how much of the adapter's change survived, for gates to judge; too little is a note with ways out."""
    model = work.model
    plan = plan_merge(model.base, model.adapter, torch.bfloat16, mxfp4_experts=True)
    folder = work.write(merge_piece("mxfp4", model, plan, {"dtype": "mxfp4"}))
    share = Survivals(folder).overall.share
    row = verify_mxfp4(folder, work.prompts, work.logits, share, work.phase.tolerances)
    work.verification.append(row)
    work.metrics["mxfp4_share"] = share
    work.metrics["mxfp4_greedy_agreement"] = row.greedy_agreement or 0.0
    work.metrics["mxfp4_ok"] = float(row.status == "agrees")
    if row.reason:
        work.notes.append(f"{row.pair}: {row.reason}")


def export_gguf(work: Work, aside: Path) -> None:
    """A GGUF file that cannot be written or does not agree is a note and `gguf_ok` 0; a full disk is still a fault."""
    phase, model = work.phase, work.model
    work.metrics["gguf_ok"] = work.metrics["gguf_verified"] = 0.0
    try:
        folder = work.write(gguf_piece(model, phase.gguf_type))
        row = verify_gguf(
            folder / gguf_file(model, phase.gguf_type),
            phase.gguf_type,
            exact_folder(work, aside),
            work.prompts,
            GREEDY_TOKENS,
            work.stop_tokens,
            work.texts,
            work.context.execution.threads,
            phase.tolerances,
            work.logits,
        )
    except Stopped:
        raise
    except (PosttrainError, ValueError, KeyError) as error:
        work.notes.append(f"GGUF failed: {type(error).__name__}: {error}; the next run tries it again")
        work.unfinished.append("gguf")
        return
    work.verification.append(row)
    work.metrics["gguf_ok"] = float(row.status != "differs")
    work.metrics["gguf_verified"] = float(row.status != "unverified")
    if row.greedy_agreement is not None:
        work.metrics["gguf_greedy_agreement"] = row.greedy_agreement
    if row.status != "agrees" or row.reason:
        work.notes.append(f"{row.pair} {row.status}: {row.reason}")


def export_ollama(work: Work, aside: Path) -> None:
    """Modelfiles for the merged GGUF file, written here where it was not asked for, and for the adapter."""
    if "gguf" not in work.phase.formats:
        export_gguf(work, aside)
    if not work.metrics["gguf_ok"]:
        work.notes.append("Ollama: there is no GGUF file to point at")
        return
    try:
        work.write(ollama_piece(work.model, work.phase.gguf_type))
    except Stopped:
        raise
    except PosttrainError as error:
        work.notes.append(f"Ollama failed: {error}; the next run tries it again")
        work.unfinished.append("ollama")


WRITERS = {
    "adapter": export_adapter,
    "hf": export_hf,
    "mxfp4": export_mxfp4,
    "gguf": export_gguf,
    "ollama": export_ollama,
}
"""In the order they are written; the merge is verified after `hf`."""
