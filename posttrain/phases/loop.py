"""The frame of every training phase: where to begin, what to write after a step, when to save and when to stop."""

import random
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from posttrain.engine import adapters, checkpoint
from posttrain.engine.activations import keep_activations
from posttrain.engine.checkpoint import TrainingState
from posttrain.engine.device import fuse_layers, keep_vocabulary_on_cpu, prepare_device
from posttrain.engine.model import hold_frozen, load_model, trainable, unfreeze_adapter
from posttrain.engine.optimizer import learning_rate, make_optimizer
from posttrain.engine.routing import RoutingWatch
from posttrain.engine.step import StepReport
from posttrain.errors import Stopped
from posttrain.phases.context import PhaseContext
from posttrain.recipe.types import (
    AdamW,
    ContinueAdapter,
    FullParameters,
    GrpoPhase,
    Lora,
    PreferencePhase,
    SftPhase,
)
from posttrain.rollout.episodes import seed_of
from posttrain.run import faults
from posttrain.run.folder import write_atomic
from posttrain.run.journal import append_lines, as_line, read_lines


def load_trainable(context: PhaseContext, phase: SftPhase | PreferencePhase | GrpoPhase) -> PreTrainedModel:
    """The phase's model state with what the phase may train unfrozen."""
    full = isinstance(phase.trainable, FullParameters)
    device = prepare_device(context.execution, phase.precision)
    seed = seed_of(context.recipe.seed, phase.name, "init")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    state = context.states[phase.model]
    model = load_model(
        context.base_folder(state),
        context.adapter_folder(state),
        fresh_seed=context.recipe.seed,
        device=device,
        precision="float32" if full else phase.precision,
        packed=context.execution.base_weights == "packed" and not full,
    )
    match phase.trainable:
        case Lora() as spec:
            adapters.attach(model, spec)
            adapters.initialise(model, torch.Generator().manual_seed(seed))
            unfreeze_adapter(model)
        case ContinueAdapter():
            unfreeze_adapter(model)
        case FullParameters():
            model.requires_grad_(True)
    hold_frozen(model, phase.precision)
    if context.execution.vocabulary == "cpu":
        keep_vocabulary_on_cpu(model)
    fuse_layers(model, phase.precision)
    keep_activations(model, context.execution)
    return model


@dataclass
class TrainingLoop:
    """Steps of one phase, resumed exactly: yields the 1-based numbers that are still to do."""

    context: PhaseContext
    optimizer_spec: AdamW
    steps: int
    model: PreTrainedModel
    identity: str
    """What a checkpoint must match: a digest of the phase's specification and inputs."""
    unit: str

    def __post_init__(self) -> None:
        parameters = trainable(self.model)
        self.optimizer = make_optimizer(self.optimizer_spec, parameters.values())
        self.state = TrainingState(parameters, self.optimizer, self.identity)
        self.routing = RoutingWatch(self.model)
        self.done = 0
        self._shown: dict[str, str] = {}

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.optimizer_spec, step, self.steps)

    def remaining(self) -> Iterator[int]:
        """Restore the newest good checkpoint, then hand out step numbers, saving when due and when stopped."""
        folder = self.context.folder.path
        found, messages = checkpoint.newest(folder)
        for message in messages:
            self.context.journal.write("checkpoint_set_aside", phase=folder.name, message=message)
            self.context.say(f"{folder.name}: {message}")
        if found is not None:
            self.done = self.state.restore(found)
            self.context.say(f"{folder.name}: continues after step {self.done} of {self.steps}, from {found.name}")
        elif messages:
            self.context.say(f"{folder.name}: no checkpoint is left, begins again at step 1")
        keep_rows_up_to(self.context.folder.metrics, self.done)
        with self.context.progress(folder.name, self.steps, "steps", self.done) as progress:
            for step in range(self.done + 1, self.steps + 1):
                faults.reach("train.step")
                yield step
                self.done = step
                progress.advance(1, **self._shown)
                if step == self.steps:
                    break
                if self.context.stop_requested():
                    self._save(step)
                    raise Stopped(f"stopped in {folder.name} after step {step} of {self.steps}; saved")
                if step % self.context.execution.checkpoint_every_steps == 0:
                    self._save(step)

    def _save(self, step: int) -> None:
        self.state.save(self.context.folder.path, step)
        checkpoint.rotate(self.context.folder.path, self.context.execution.keep_checkpoints)

    def record(self, step: int, report: StepReport, **extra: float) -> None:
        """Append the step's raw metrics."""
        row = {
            "step": step,
            "loss": report.loss,
            "gradient_norm": report.gradient_norm,
            "learning_rate": self.learning_rate(step),
            "tokens": report.tokens,
            "target_tokens": report.target_tokens,
            "seconds": round(report.seconds, 4),
            **self.routing.take(),
            **extra,
        }
        append_lines(self.context.folder.metrics, [row])
        self._shown = {"loss": f"{report.loss:.3f}"} | {name: f"{value:.3f}" for name, value in extra.items()}

    def summary(self) -> dict[str, float]:
        """Result metrics from the raw rows: last loss, tokens, tokens per second, and the process's peak memory."""
        rows = list(read_lines(self.context.folder.metrics))
        tokens = sum(row["tokens"] for row in rows)
        seconds = sum(row["seconds"] for row in rows)
        return {
            "steps": len(rows),
            "final_loss": rows[-1]["loss"],
            "tokens": tokens,
            "target_tokens": sum(row["target_tokens"] for row in rows),
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def keep_rows_up_to(path: Path, step: int) -> None:
    """Drop rows after `step`, and any torn line, from a line file, so that a resumed phase writes each row once."""
    kept = [row for row in read_lines(path) if row["step"] <= step]
    if path.exists():
        write_atomic(path, b"".join(as_line(row) for row in kept))
