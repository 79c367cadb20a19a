"""What `posttrain export` does: find the model that is meant, plan its formats, write them, verify them."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from posttrain.chat.tokenizer import Tokenizer
from posttrain.errors import InputError, ModelError, PhaseFault
from posttrain.export.formats import Format, Model, Piece, gguf_file, measure_rates, plan_pieces, require_room
from posttrain.export.gguf_types import GgufType
from posttrain.export.merge import apply_merge, plan_merge
from posttrain.export.survival import Survivals
from posttrain.export.verify import Comparison, verify_folder, verify_gguf, verify_mxfp4, verify_rounded
from posttrain.host import machine
from posttrain.phases.context import ModelState, Progress
from posttrain.phases.export import GREEDY_TOKENS, choose, model_of, verification_inputs
from posttrain.recipe.types import USUAL_TOLERANCES, ExportPhase, PreparePhase, Recipe, Tolerances
from posttrain.report.read import read_object
from posttrain.run import recipe_file
from posttrain.run.folder import RunFolder, digest_folder, write_json_atomic

TEXTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "Once upon a time there was a",
    '{"city": "Berlin", "days":',
)
"""Prompts for a model folder, which brings none of its own."""


@dataclass(frozen=True)
class Chosen:
    """The model to export, why it is that one, and what it can be verified on."""

    model: Model
    why: str
    prompts: list[list[int]]
    texts: dict[str, list[int]]
    stop_tokens: frozenset[int]
    tolerances: Tolerances


def chosen_of_run(run: RunFolder) -> Chosen:
    """The recipe's choice: its best candidate by evaluation, or the last finished model state.

    Raises InputError where the run has finished none yet.
    """
    recipe = recipe_file.load(run.recipe)
    results = results_of(run, recipe)
    phase = _export_phase(recipe)
    found = best_state(recipe, results)
    if found is None:
        raise InputError(f"run {run.path.name} has no model yet: posttrain resume {run.words}")
    name, why = found
    state = ModelState.model_validate(results[name]["state"])
    model = replace(model_of(recipe, run, state), name=run.path.name)
    if phase is None:
        return Chosen(model, why, *_plain_inputs(model.base), USUAL_TOLERANCES)
    dataset = _dataset_folder(run, recipe, phase.verify_dataset)
    return Chosen(model, why, *verification_inputs(recipe, model.base, dataset, phase), phase.tolerances)


def _export_phase(recipe: Recipe) -> ExportPhase | None:
    return next((phase for phase in recipe.phases if isinstance(phase, ExportPhase)), None)


def best_state(recipe: Recipe, results: dict[str, dict[str, Any]]) -> tuple[str, str] | None:
    """The phase whose model state an export would take, and why; None where no phase has made one yet."""
    phase = _export_phase(recipe)
    judged = [one for one in phase.candidates if {one.model, one.evaluation} <= results.keys()] if phase else []
    if phase and judged:
        best, table = choose(results, judged, phase.metrics)
        return best.model, f"{best.model}: the best of {len(table)} by {', '.join(phase.metrics)}"
    finished = [one.name for one in recipe.phases if one.kind != "export" and results.get(one.name, {}).get("state")]
    return (finished[-1], f"{finished[-1]}: the last finished phase that trained or merged") if finished else None


def results_of(run: RunFolder, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Of the phases that are complete: a result that cannot be read is none."""
    files = {phase.name: run.phase(phase.name).result for phase in recipe.phases}
    found = {name: read_object(file, {}) for name, file in files.items()}
    return {name: result for name, result in found.items() if "state" in result}


def _dataset_folder(run: RunFolder, recipe: Recipe, name: str) -> Path:
    for phase in recipe.phases:
        if isinstance(phase, PreparePhase) and any(dataset.name == name for dataset in phase.datasets):
            return run.phase(phase.name).data / name
    raise KeyError(name)


def chosen_of_folder(folder: Path, base: Path | None) -> Chosen:
    """A model folder, or an adapter folder with its base."""
    if not (folder / "adapter_config.json").exists():
        model = Model(folder.name, folder, None, {"base": digest_folder(folder), "adapter": None})
        return Chosen(model, f"the model in {folder}", *_plain_inputs(folder), USUAL_TOLERANCES)
    named = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path") or ""
    if base is not None and not (base / "config.json").is_file():
        raise ModelError(f"--base {base} is no model folder here: it has no config.json")
    base = base or Path(named)
    if not (base / "config.json").is_file():
        raise ModelError(f"{folder} is an adapter on {named!r}, which is no folder here: name its folder with --base")
    digests: dict[str, str | None] = {"base": digest_folder(base), "adapter": digest_folder(folder)}
    model = Model(folder.name, base, folder, digests)
    return Chosen(model, f"the adapter {folder} on {base}", *_plain_inputs(base), USUAL_TOLERANCES)


def _plain_inputs(base: Path) -> tuple[list[list[int]], dict[str, list[int]], frozenset[int]]:
    tokenizer = Tokenizer.load(base)
    texts = {text: tokenizer.encode(text) for text in TEXTS}
    return list(texts.values()), texts, frozenset()


def plan_lines(pieces: Sequence[Piece], output: Path) -> list[str]:
    """What will be written, how large, how long; rates are measured now, where the export will lie."""
    rates = measure_rates(output, pieces)
    lines = [f"{'folder':14} {'size':>10} {'about':>9}"]
    for piece in pieces:
        lines.append(f"{piece.folder:14} {piece.bytes / 1e6:7,.1f} MB {rates.seconds(piece):7.1f} s")
    total, seconds = sum(piece.bytes for piece in pieces), sum(rates.seconds(piece) for piece in pieces)
    lines.append(f"{'all':14} {total / 1e6:7,.1f} MB {seconds:7.1f} s, the disk writing {rates.disk / 1e6:,.0f} MB/s")
    return lines


def export(
    chosen: Chosen,
    formats: Sequence[Format],
    dtype: str,
    gguf_types: Sequence[GgufType],
    output: Path,
    dry_run: bool,
    verified: bool,
    threads: int,
    say: Callable[[str], None],
    progress: Callable[[str, float, str, float], Progress],
) -> None:
    """Plan, write, verify. Raises PhaseFault where a written format is not the model it was made from."""
    torch.set_num_threads(threads)
    machine.keep_freed_memory()
    pieces = list(plan_pieces(chosen.model, formats, dtype, gguf_types))
    say(f"exporting {chosen.why}")
    for line in plan_lines(pieces, output):
        say(line)
    if dry_run:
        return
    require_room(output, pieces)
    output.mkdir(parents=True, exist_ok=True)
    for piece in pieces:
        with progress(f"writing {piece.folder}", piece.bytes, "B", 0) as bar:
            made = piece.write(chosen.model, output, bar.advance)
        say(f"{'wrote' if made else 'kept'} {output / piece.folder}")
    if verified:
        rows = verify(chosen, pieces, dtype, output, threads)
        write_json_atomic(output / "verification.json", [row.row() for row in rows])
        for row in rows:
            say(line_of(row))
        wrong = [row.pair for row in rows if row.status == "differs"]
        if wrong:
            raise PhaseFault(f"not the model it was made from: {', '.join(wrong)}; see {output / 'verification.json'}")


def verify(chosen: Chosen, pieces: Sequence[Piece], dtype: str, output: Path, threads: int) -> list[Comparison]:
    """Every written format against the exact merge, and that against the adapter."""
    model, prompts = chosen.model, chosen.prompts
    exact = output / ".float32"
    shutil.rmtree(exact, ignore_errors=True)
    exact.mkdir(parents=True)
    try:
        apply_merge(plan_merge(model.base, model.adapter, torch.float32), exact)
        rows, logits = verify_folder(model.base, model.adapter, exact, prompts, chosen.tolerances.merged_logits)
        for piece in pieces:
            folder = output / piece.folder
            if piece.format == "hf":
                rows.append(verify_rounded(folder, dtype, prompts, logits, chosen.tolerances))
            elif piece.format == "mxfp4":
                rows.append(verify_mxfp4(folder, prompts, logits, Survivals(folder).overall.share, chosen.tolerances))
            elif piece.format == "gguf":
                kind = piece.settings["gguf_type"]
                asked = (prompts, GREEDY_TOKENS, chosen.stop_tokens, chosen.texts, threads, chosen.tolerances, logits)
                rows.append(verify_gguf(folder / gguf_file(model, kind), kind, exact, *asked))
    finally:
        shutil.rmtree(exact, ignore_errors=True)
    return rows


def line_of(row: Comparison) -> str:
    numbers = {
        "max": row.max_abs,
        "mean": row.mean_abs,
        "KL": row.kl,
        "greedy": row.greedy_agreement,
        "perplexity": row.left_perplexity,
        "beside": row.right_perplexity,
    }
    shown = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items() if value is not None)
    shown = shown.replace(", beside", " beside")
    return f"{row.status:10} {row.pair} on {row.prompts} prompts: {shown or row.reason}"
