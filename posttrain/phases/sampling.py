"""Who samples in a phase: this process, or the server that the execution names."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from posttrain.chat.render import Renderer
from posttrain.engine import adapters
from posttrain.errors import InputError
from posttrain.phases.context import PhaseContext
from posttrain.recipe.types import EvaluatePhase, FullParameters, GrpoPhase
from posttrain.rollout.in_process import InProcessSampler
from posttrain.rollout.remote import RemoteSampler
from posttrain.rollout.sampler import Sampler

ADAPTER = "sampler-adapter"
"""Folder of a phase where the server finds the present adapter."""


@contextmanager
def sampler_for(
    context: PhaseContext, phase: GrpoPhase | EvaluatePhase, model: PreTrainedModel, render: Renderer
) -> Iterator[Sampler]:
    """Raises InputError for weights that a server cannot be given while it runs."""
    url = context.execution.sampler_url
    if url is None:
        yield InProcessSampler(model, render.stop_tokens, phase.precision, context.execution.rollout_tokens)
        return
    if isinstance(phase, GrpoPhase) and isinstance(phase.trainable, FullParameters):
        raise InputError(
            f"{phase.name}.trainable is full, and sampler {url} can only be given adapters: train an adapter, or leave "
            f"--sampler-url out"
        )
    sampler = RemoteSampler(url, render.stop_tokens)
    try:
        yield sampler
    finally:
        sampler.drop_adapter()
        shutil.rmtree(context.folder.path / ADAPTER, ignore_errors=True)


def show_weights(sampler: Sampler, context: PhaseContext, model: PreTrainedModel, step: int) -> None:
    """Let the sampler see the model's adapter as it is now; in this process it sees the model itself."""
    if not isinstance(sampler, RemoteSampler) or model not in adapters.LORA:
        return
    folder = context.folder.path / ADAPTER / f"step-{step}"
    adapters.save(model, folder, sampler.base)
    sampler.load_adapter(f"{context.run.path.name}-{context.folder.path.name}-{step}", folder)
    for older in folder.parent.iterdir():
        if older != folder:
            shutil.rmtree(older)
