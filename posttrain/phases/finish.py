"""The end of a training phase: the trained state, committed as `final/`."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from posttrain.engine import adapters
from posttrain.engine.model import save_model
from posttrain.phases.context import ModelState, PhaseContext
from posttrain.recipe.types import FullParameters, GrpoPhase, PreferencePhase, SftPhase
from posttrain.run import faults
from posttrain.run.folder import digest_folder, files_below, fsync_folder


def save_state(
    context: PhaseContext, phase: SftPhase | PreferencePhase | GrpoPhase, model: PreTrainedModel
) -> tuple[ModelState, tuple[Path, ...]]:
    """The trained model as a PEFT adapter, or a Hugging Face folder after full-parameter training."""

    def write(folder: Path) -> None:
        if isinstance(phase.trainable, FullParameters):
            save_model(model, folder)
        else:
            adapters.save(model, folder, context.states[phase.model].base)

    return commit_state(context, phase, write)


def commit_state(
    context: PhaseContext, phase: SftPhase | PreferencePhase | GrpoPhase, write: Callable[[Path], None]
) -> tuple[ModelState, tuple[Path, ...]]:
    """Put what `write` writes at `final/`, whole or not at all; a model folder has the base's other files already."""
    final = context.folder.final
    # One process at a time writes to a run, so what lies here is what a killed attempt left.
    temporary = final.with_name(f".{final.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    before = context.states[phase.model]
    full = isinstance(phase.trainable, FullParameters)
    try:
        if full:
            shutil.copytree(context.base_folder(before), temporary, ignore=shutil.ignore_patterns("*.safetensors*"))
        write(temporary)
        for file in files_below(temporary):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        faults.reach("train.before_final")
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_folder(final.parent)
    faults.reach("train.after_final")
    place = str(final.relative_to(context.run.path))
    digest = digest_folder(final)
    state = (
        ModelState(base=place, base_digest=digest, adapter=None, adapter_digest=None, phase=phase.name)
        if full
        else before.model_copy(update={"adapter": place, "adapter_digest": digest, "phase": phase.name})
    )
    return state, (final,)
