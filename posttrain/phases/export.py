"""Export: choose the best model state by its evaluation, write it in every format, prove each one equal to it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from posttrain.chat.conversation import Conversation
from posttrain.chat.render import renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.shard import Shard
from posttrain.errors import PhaseFault, PosttrainError, Stopped
from posttrain.export.commit import committing, is_committed
from posttrain.export.gguf import write_gguf
from posttrain.export.merge import apply_merge, plan_merge
from posttrain.export.smoke import SPECIAL
from posttrain.export.verify import Comparison, compare, stock_logits, verify_folder, verify_gguf
from posttrain.phases.context import ModelState, PhaseContext, PhaseOutcome
from posttrain.recipe.types import Candidate, ExportPhase, Precision
from posttrain.run.folder import digest_folder, files_below

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
    outputs: list[Path] = field(default_factory=list)

    def write(self, format_name: str, settings: dict[str, Any], fill: Callable[[Path], None]) -> Path:
        """Fill `exports/<format>` unless an earlier attempt finished it from the same state."""
        if self.context.stop_requested():
            raise Stopped(f"stopped in {self.phase.name} before writing {format_name}")
        target = self.context.folder.export(format_name)
        made_from = {"base": self.state.base_digest, "adapter": self.state.adapter_digest, **settings}
        if is_committed(target, made_from):
            self.notes.append(f"{format_name}: kept what an earlier attempt had finished")
        else:
            with committing(target, made_from, f"export.{format_name}_written") as folder:
                fill(folder)
        self.outputs.append(target)
        self.metrics[f"{format_name}_bytes"] = float(sum(file.stat().st_size for file in files_below(target)))
        return target


def run(context: PhaseContext, phase: ExportPhase) -> PhaseOutcome:
    torch.set_num_threads(context.execution.threads)
    chosen, table = choose(context, phase)
    state = context.states[chosen.model]
    work = Work(context, phase, state, *verification_inputs(context, phase, state))

    steps = (*phase.formats, "verification")
    with context.progress(f"{phase.name}: writing {', '.join(phase.formats)}", len(steps), "steps", 0) as progress:
        if "adapter" in phase.formats:
            export_adapter(work)
            progress.advance()
        hf = export_hf(work)
        if "hf" in phase.formats:
            progress.advance()
        verify_hf(work, hf)
        progress.advance()
        if "gguf" in phase.formats:
            export_gguf(work, hf)
            progress.advance()
        if "hf" not in phase.formats:
            shutil.rmtree(hf)

    return PhaseOutcome(
        outputs=tuple(work.outputs),
        metrics=work.metrics,
        counts={"verified_prompts": len(work.prompts)},
        state=_exported_state(work),
        notes=tuple(work.notes),
        details={
            "chosen": chosen.model,
            "candidates": table,
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


def choose(context: PhaseContext, phase: ExportPhase) -> tuple[Candidate, list[dict[str, Any]]]:
    """The candidate with the highest mean of the phase's metrics, the later of equals, and the table that shows why."""
    table: list[dict[str, Any]] = []
    for candidate in phase.candidates:
        found = context.results[candidate.evaluation]["metrics"]
        missing = [name for name in phase.metrics if name not in found]
        if missing:
            raise PhaseFault(f"evaluation {candidate.evaluation} has no metric {missing[0]!r}; it has {sorted(found)}")
        values = {name: found[name] for name in phase.metrics}
        mean = sum(values.values()) / len(values)
        table.append({"model": candidate.model, "evaluation": candidate.evaluation, **values, "mean": mean})
    best = max(range(len(table)), key=lambda index: (table[index]["mean"], index))
    for index, row in enumerate(table):
        row["chosen"] = index == best
    return phase.candidates[best], table


def verification_inputs(
    context: PhaseContext, phase: ExportPhase, state: ModelState
) -> tuple[list[list[int]], dict[str, list[int]], frozenset[int]]:
    """Prompts as tokens, plain texts with their token ids, and the tokens that end an answer."""
    tokenizer = Tokenizer.load(context.base_folder(state))
    render = renderer(context.recipe.chat, tokenizer)
    shard = Shard(context.dataset_folder(phase.verify_dataset))
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


def export_adapter(work: Work) -> None:
    adapter = work.context.adapter_folder(work.state)
    if adapter is None:
        work.notes.append(f"adapter: the state of {work.state.phase} has none, nothing to write")
        return
    work.write("adapter", {}, lambda folder: _copy_files(adapter, folder))


def _copy_files(source: Path, target: Path) -> None:
    for file in files_below(source):
        (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / file.relative_to(source))


def export_hf(work: Work) -> Path:
    """The merged Hugging Face folder; written aside where only a GGUF file is made of it."""
    if "hf" in work.phase.formats:
        return work.write("hf", {"dtype": work.phase.dtype}, lambda folder: _merge(work, folder, work.phase.dtype))
    return _merge_aside(work, ".merged", work.phase.dtype)


def _merge(work: Work, folder: Path, dtype: Precision) -> None:
    context = work.context
    plan = plan_merge(context.base_folder(work.state), context.adapter_folder(work.state), getattr(torch, dtype))
    apply_merge(plan, folder)


def _merge_aside(work: Work, name: str, dtype: Precision) -> Path:
    folder = work.context.folder.path / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _merge(work, folder, dtype)
    return folder


def verify_hf(work: Work, hf: Path) -> None:
    """Compare the float32 merge; what rounding to the exported type adds is measured in a row of its own.

    Raises PhaseFault where the merged model is not the model state within the recipe's tolerance.
    """
    context, phase = work.context, work.phase
    rounded = phase.dtype != "float32"
    exact = _merge_aside(work, ".float32", "float32") if rounded else hf
    base, adapter = context.base_folder(work.state), context.adapter_folder(work.state)
    rows, logits = verify_folder(base, adapter, exact, work.prompts, phase.tolerance_logits)
    if rounded:
        shutil.rmtree(exact)
        written = stock_logits(hf, None, work.prompts, torch.float64)
        rows.append(compare(f"merged {phase.dtype} / merged", written, logits, None))
    work.verification += rows
    for row in rows:
        if row.status == "differs":
            raise PhaseFault(
                f"{row.pair} differ by {row.max_abs:.3g} (mean {row.mean_abs:.3g}, KL {row.kl:.3g}, greedy "
                f"agreement {row.greedy_agreement:.3f}) on {row.prompts} prompts; the limit is {phase.tolerance_logits}"
            )
        if row.status == "unverified":
            work.notes.append(f"{row.pair} unverified: {row.reason}")
    judged = [row for row in rows if row.status == "agrees"]
    work.metrics["hf_max_abs"] = max(row.max_abs or 0.0 for row in judged)
    work.metrics["hf_kl"] = max(row.kl or 0.0 for row in judged)
    work.metrics["hf_greedy_agreement"] = min(row.greedy_agreement or 0.0 for row in rows if row.max_abs is not None)


def export_gguf(work: Work, hf: Path) -> None:
    """A GGUF file that cannot be written or does not agree is a note and `gguf_ok` 0; a full disk is still a fault."""
    context, phase = work.context, work.phase
    name = f"{context.recipe.name}-{phase.gguf_type}.gguf"
    settings = {"dtype": phase.dtype, "gguf_type": phase.gguf_type}
    work.metrics["gguf_ok"] = work.metrics["gguf_verified"] = 0.0
    try:
        folder = work.write(
            "gguf", settings, lambda folder: write_gguf(hf, folder / name, phase.gguf_type, context.recipe.name)
        )
        row = verify_gguf(
            folder / name,
            phase.gguf_type,
            hf,
            work.prompts,
            GREEDY_TOKENS,
            work.stop_tokens,
            work.texts,
            context.execution.threads,
        )
    except Stopped:
        raise
    except (PosttrainError, ValueError, KeyError) as error:
        work.notes.append(f"GGUF failed: {type(error).__name__}: {error}")
        return
    work.verification.append(row)
    work.metrics["gguf_ok"] = float(row.status != "differs")
    work.metrics["gguf_verified"] = float(row.status != "unverified")
    if row.greedy_agreement is not None:
        work.metrics["gguf_greedy_agreement"] = row.greedy_agreement
    if row.status != "agrees" or row.reason:
        work.notes.append(f"{row.pair} {row.status}: {row.reason}")
