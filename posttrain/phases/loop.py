"""The frame of every training phase: where to begin, what to write after a step, when to save and when to stop."""

import gc
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.engine import adapters, checkpoint
from posttrain.engine.activations import keep_activations
from posttrain.engine.checkpoint import CheckpointWriter, TrainingState
from posttrain.engine.device import fuse_layers, keep_vocabulary_on_cpu, prepare_device, take_peak_memory
from posttrain.engine.flops import FlopCount, peak_flops
from posttrain.engine.forward import device_of
from posttrain.engine.model import hold_frozen, load_model, require_memory, trainable, unfreeze_adapter
from posttrain.engine.optimizer import learning_rate, make_optimizer
from posttrain.engine.packing import Item, plan_micro_batches
from posttrain.engine.routing import RoutingWatch
from posttrain.engine.step import LossSum, StepReport, train_step
from posttrain.errors import MachineError, PhaseFault, Stopped
from posttrain.host import machine
from posttrain.host.machine import is_out_of_memory
from posttrain.phases.context import PhaseContext
from posttrain.recipe.check import HELD_OUT
from posttrain.recipe.types import (
    ContinueAdapter,
    Epochs,
    FullParameters,
    GrpoPhase,
    Lora,
    PreferencePhase,
    SftPhase,
    Skipped,
    Steps,
)
from posttrain.rollout.episodes import seed_of
from posttrain.run import faults
from posttrain.run.folder import write_atomic
from posttrain.run.journal import append_lines, as_line, read_lines

TrainingPhase = SftPhase | PreferencePhase | GrpoPhase


def num_steps(steps: Steps, of_epoch: Callable[[int], int], per_step: int) -> int:
    """Steps of a phase whose 0-based epochs have `of_epoch` items, of which a step reads so many."""
    match steps:
        case int():
            return steps
        case Epochs():
            return -(-sum(map(of_epoch, range(steps.epochs))) // per_step)
        case Skipped():
            raise AssertionError("the pipeline passes over a phase that is skipped")


def load_trainable(context: PhaseContext, phase: TrainingPhase) -> PreTrainedModel:
    """The phase's model state with what the phase may train unfrozen."""
    full = isinstance(phase.trainable, FullParameters)
    release_memory()
    machine.forget_peak()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
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


@dataclass(frozen=True)
class HeldOutMetrics:
    """Metrics of the model as it is, computed after so many steps each and after the last one."""

    every_steps: int
    measure: Callable[[], dict[str, float]]


@dataclass
class TrainingLoop:
    """Steps of one phase, resumed exactly: yields the 1-based numbers that are still to do."""

    context: PhaseContext
    phase: TrainingPhase
    steps: int
    model: PreTrainedModel
    held_out: HeldOutMetrics | None = None

    def __post_init__(self) -> None:
        parameters = trainable(self.model)
        self.device = device_of(self.model)
        require_training_memory(parameters, self.device)
        self.optimizer = make_optimizer(self.phase.optimizer, parameters)
        self.state = TrainingState(parameters, self.optimizer, self.context.fingerprint)
        self.writer = CheckpointWriter(self.state, self.context.folder.path, self.context.execution.keep_checkpoints)
        self.routing = RoutingWatch(self.model)
        self.flops = FlopCount(self.model)
        self.peak_flops = peak_flops(self.device, self.phase.precision)
        self.micro_batch_tokens = self.context.micro_batch_tokens
        self.done = self.saved = 0
        self._shown: dict[str, str] = {}

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.phase.optimizer, step, self.steps)

    def train(
        self, items: Sequence[Item], loss_sum: LossSum, denominator: float, step: int, temperature: float = 1.0
    ) -> StepReport:
        """One update. Where memory runs out, it is tried once more with a smaller micro-batch, which then stays."""
        update = partial(self._update, items, loss_sum, denominator, step, temperature)
        try:
            return update()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Outside of the handler: the error's frames hold on to the tensors that did not fit.
        self._shrink(items, step, reason)
        try:
            return update()
        except Exception as error:
            if is_out_of_memory(error):
                raise MachineError(self._no_memory(step, str(error))) from error
            raise

    def _update(
        self, items: Sequence[Item], loss_sum: LossSum, denominator: float, step: int, temperature: float
    ) -> StepReport:
        faults.reach("train.pass")
        return train_step(
            self.model,
            self.optimizer,
            items,
            loss_sum,
            denominator,
            learning_rate=self.learning_rate(step),
            clip_norm=self.phase.optimizer.clip_norm,
            precision=self.phase.precision,
            micro_batch_tokens=self.micro_batch_tokens,
            step=step,
            temperature=temperature,
        )

    def _shrink(self, items: Sequence[Item], step: int, reason: str) -> None:
        """Half of the largest pass, for this step and all that follow; MachineError where that was a single item."""
        self.optimizer.zero_grad()
        self.routing.take()
        release_memory()
        sizes = [item.size for item in items]
        passes = plan_micro_batches(sizes, self.micro_batch_tokens)
        largest = max(passes, key=lambda numbers: sum(sizes[number] for number in numbers))
        if len(largest) == 1:
            raise MachineError(self._no_memory(step, reason))
        before, self.micro_batch_tokens = self.micro_batch_tokens, sum(sizes[number] for number in largest) // 2
        name = self.context.folder.path.name
        self.context.journal.write(
            "out_of_memory",
            phase=name,
            fingerprint=self.context.fingerprint,
            step=step,
            micro_batch_tokens=before,
            then=self.micro_batch_tokens,
            reason=reason,
        )
        self.context.say(
            f"{name}: memory ran out in step {step} with passes of {before} tokens ({reason}); the same step again "
            f"with {self.micro_batch_tokens}, the global batch unchanged"
        )

    def _no_memory(self, step: int, reason: str) -> str:
        return (
            f"memory ran out in step {step} with passes of {self.micro_batch_tokens} tokens ({reason}); what was saved "
            f"stays. The ways out: --recompute full, --activation-offload cpu, --mlp-tile-tokens 2048, a smaller "
            f"--micro-batch-tokens, or a machine with more memory"
        )

    def remaining(self) -> Iterator[int]:
        """Restore the newest good checkpoint, then hand out step numbers, saving when due and when stopped."""
        folder = self.context.folder.path
        found, messages = checkpoint.newest(folder)
        for message in messages:
            self.context.journal.write("checkpoint_set_aside", phase=folder.name, message=message)
            self.context.say(f"{folder.name}: {message}")
        if found is not None:
            self.done = self.saved = self.state.restore(found)
            self.context.say(f"{folder.name}: continues after step {self.done} of {self.steps}, from {found.name}")
        elif messages:
            self.context.say(f"{folder.name}: no checkpoint is left, begins again at step 1")
        keep_rows_up_to(self.context.folder.metrics, self.done)
        try:
            with self.context.progress(folder.name, self.steps, "steps", self.done) as progress:
                for step in range(self.done + 1, self.steps + 1):
                    self.writer.check()
                    faults.reach("train.step")
                    yield step
                    self.done = step
                    progress.advance(1, **self._shown)
                    self._after(step)
            self.writer.wait()
        finally:
            # A step that failed does not take a checkpoint with it; a second signal waits for nothing.
            if not self.context.stop_requested():
                self.writer.join()

    def _after(self, step: int) -> None:
        """Save when due, and on request stop; the last step is saved by its phase."""
        if step == self.steps:
            return
        if self.context.stop_requested():
            self.stop()
        if step % self.context.execution.checkpoint_every_steps == 0:
            self._save(step)

    def stop(self) -> NoReturn:
        """Save what is done, and end."""
        name = self.context.folder.path.name
        if not self.done:
            raise Stopped(f"stopped in {name} before its first step was done")
        self._save(self.done)
        self.writer.wait()
        raise Stopped(f"stopped in {name} after step {self.done} of {self.steps}; saved")

    def _save(self, step: int) -> None:
        if step != self.saved:
            self.writer.begin(step)
            self.saved = step

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
            **self._speed(report),
            **self.routing.take(),
            **extra,
        }
        row |= self._held_out_metrics(step)
        append_lines(self.context.folder.metrics, [row])
        self.context.track(self.context.folder.path.name, step, row)
        self._shown = {"loss": f"{report.loss:.3f}"} | {name: f"{value:.3f}" for name, value in extra.items()}

    def _speed(self, report: StepReport) -> dict[str, float | None]:
        """What the machine made of the step; null where there is nothing to say."""
        seconds = report.seconds or math.inf
        share = self.flops.of_step(report.items) / seconds / self.peak_flops if self.peak_flops else None
        return {
            "tokens_per_second": round(report.tokens / seconds, 1),
            "peak_flops_share": None if share is None else round(share, 4),
            "peak_memory_bytes": take_peak_memory(self.device),
        }

    def _held_out_metrics(self, step: int) -> dict[str, float]:
        """Of the weights after `step`; empty when they are not due."""
        if self.held_out is None or (step % self.held_out.every_steps and step != self.steps):
            return {}
        metrics = {f"{HELD_OUT}{name}": value for name, value in self.held_out.measure().items()}
        if not all(map(math.isfinite, metrics.values())):
            raise PhaseFault(
                f"step {step}: {metrics}: not finite, so the weights after this step are of no use. "
                f"Lower optimizer.learning_rate"
            )
        return metrics


def summary(metrics: Path) -> dict[str, float]:
    """Result metrics from the raw rows."""
    rows = list(read_lines(metrics))
    tokens = sum(row["tokens"] for row in rows)
    seconds = sum(row["seconds"] for row in rows)
    found = {
        "steps": len(rows),
        "final_loss": rows[-1]["loss"],
        "tokens": tokens,
        "target_tokens": sum(row["target_tokens"] for row in rows),
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
    }
    if seconds and all(row["peak_flops_share"] is not None for row in rows):
        found["peak_flops_share"] = sum(row["peak_flops_share"] * row["seconds"] for row in rows) / seconds
    return found | {name: value for name, value in rows[-1].items() if name.startswith(HELD_OUT)}


def require_training_memory(parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
    """Raise MachineError where there is no room for a gradient and two moments, and, on a CPU, for a checkpoint's copy.

    Activations are not counted.
    """
    count = sum(parameter.numel() for parameter in parameters.values())
    copies = 3 if device.type == "cuda" else 6
    what = f"training {count / 1e6:,.1f}M parameters"
    require_memory(what, 4 * copies * count, device, "a smaller rank in `trainable`, fewer targets")


def release_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_rows_up_to(path: Path, step: int) -> None:
    """Drop rows after `step` or of none, and torn lines, from a line file: a resumed phase writes each row once."""
    kept = [row for row in read_lines(path) if isinstance(row.get("step"), int) and row["step"] <= step]
    if path.exists():
        write_atomic(path, b"".join(as_line(row) for row in kept))
