"""Supervised fine-tuning by Tunix on JAX, in a process of its own: `sft` with `--backend tunix`.

Same data, order, batches, schedule and optimizer as on PyTorch; the result is stock PEFT or a Hugging Face folder too.
"""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from transformers import AutoConfig

from posttrain.data.shard import Shard
from posttrain.engine import adapters
from posttrain.engine.optimizer import learning_rate
from posttrain.errors import InputError, PhaseFault, Stopped
from posttrain.host.cache import cache_folder
from posttrain.host.tunix import interpreter
from posttrain.phases.context import ModelState, PhaseContext, PhaseOutcome
from posttrain.phases.finish import commit_state
from posttrain.phases.loop import keep_rows_up_to, summary
from posttrain.phases.tunix_models import as_tunix
from posttrain.recipe.types import FullParameters, Lora, SftPhase
from posttrain.rollout.episodes import seed_of
from posttrain.run import faults
from posttrain.run.folder import write_json_atomic
from posttrain.run.journal import append_lines
from posttrain.run.redaction import without_secrets

WORKER = Path(__file__).with_name("tunix_worker.py")
LENGTHS = 64
"""Rows are padded to a multiple of so many tokens, the same in every step, so that one program serves all."""

Rows = list[list[int]]
"""The samples of each step."""


def train(context: PhaseContext, phase: SftPhase, shard: Shard, of_steps: Rows) -> PhaseOutcome:
    refuse_other_work(phase, context.states[phase.model])
    worker = Worker(context, phase, shard, of_steps)
    with context.progress(context.folder.path.name, len(of_steps), "steps", 0) as progress:
        for step in worker.steps():
            progress.advance(1, loss=f"{step['loss']:.3f}")
            faults.reach("train.step")
    state, outputs = commit_state(context, phase, worker.write)
    counts = {"rows": shard.num_rows, "samples": len(shard), "samples_read": sum(map(len, of_steps))}
    epochs = counts["samples_read"] / len(shard.mixture(context.recipe.seed))
    metrics = summary(context.folder.metrics) | {"epochs": epochs}
    return PhaseOutcome(outputs, metrics, counts, state, details={"packages": worker.versions})


def refuse_other_work(phase: SftPhase, state: ModelState) -> None:
    """InputError, with all reasons, for what only PyTorch does."""
    reasons = {
        "trainable continues an adapter": not isinstance(phase.trainable, Lora | FullParameters),
        "its model state has an adapter: merge it first": state.adapter is not None,
        "precision is nf4": phase.precision == "nf4",
        "optimizer.moments is 8bit": phase.optimizer.moments != "float32",
        "optimizer.groups are given": bool(phase.optimizer.groups),
        "held_out is given": phase.held_out is not None,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise InputError(f"phase {phase.name}: Tunix cannot do what it asks: {'; '.join(found)}. Use --backend torch")


class Worker:
    """One process that trains; it ends when this one does."""

    def __init__(self, context: PhaseContext, phase: SftPhase, shard: Shard, of_steps: Rows) -> None:
        self.context, self.phase, self.shard, self.of_steps = context, phase, shard, of_steps
        self.folder = context.folder.path / "tunix"
        self.output = self.folder / "result.safetensors"
        self.versions: dict[str, str] = {}
        """Of the worker's packages, once it has begun."""
        self.rates = [learning_rate(phase.optimizer, step, len(of_steps)) for step in range(1, len(of_steps) + 1)]

    def steps(self) -> Iterator[dict[str, Any]]:
        """Rows of metrics of the steps that are still to do, recorded. Stopped, or PhaseFault with what it said."""
        program = interpreter()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.output.unlink(missing_ok=True)
        write_json_atomic(self.folder / "request.json", self.request())
        with open(self.folder / "log.txt", "ab") as log:
            child = subprocess.Popen(
                # -P: what lies beside the worker is not what it imports.
                [program, "-P", str(WORKER), str(self.folder / "request.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment(),
                # Ctrl-C reaches this process alone, which asks the worker to save.
                start_new_session=True,
            )
        try:
            yield from self._heard(child)
        finally:
            # Whatever ended this, nothing trains on behind it.
            child.kill()
            child.communicate()

    def _heard(self, child: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
        assert child.stdin is not None and child.stdout is not None
        name, steps = self.context.folder.path.name, len(self.of_steps)
        asked = False
        for line in child.stdout:
            said = json.loads(line)
            match said["event"]:
                case "begun":
                    self.versions = said["versions"]
                    self._go_on_after(said["step"], said["rows"])
                case "step":
                    yield self._record(said["row"])
                case "stopped":
                    raise Stopped(f"stopped in {name} after step {said['step']} of {steps}; saved")
                case "failed":
                    raise PhaseFault(said["reason"])
                case "done":
                    return
            if not asked and self.context.stop_requested():
                asked = True
                with contextlib.suppress(OSError):
                    child.stdin.write("stop\n")
                    child.stdin.flush()
        last = (self.folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise PhaseFault(f"Tunix ended with {child.wait()}: {last[0]}. All of it is in {self.folder / 'log.txt'}")

    def _go_on_after(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Metrics exactly up to the checkpoint: a kill may have lost rows of steps that it has."""
        keep_rows_up_to(self.context.folder.metrics, rows[0]["step"] - 1 if rows else 0)
        append_lines(self.context.folder.metrics, map(self._row, rows))
        if step:
            self.context.say(f"{self.phase.name}: continues after step {step} of {len(self.of_steps)}")

    def _record(self, row: dict[str, Any]) -> dict[str, Any]:
        full = self._row(row)
        append_lines(self.context.folder.metrics, [full])
        self.context.track(self.context.folder.path.name, full["step"], full)
        return full

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row that PyTorch's loop would write."""
        step = row["step"]
        samples, lengths = self.of_steps[step - 1], self.shard.lengths()
        tokens = int(sum(lengths[sample] for sample in samples))
        return {
            "step": step,
            "loss": row["loss"],
            "gradient_norm": row["gradient_norm"],
            "learning_rate": self.rates[step - 1],
            "tokens": tokens,
            "target_tokens": int(sum(self.shard.targets(sample).sum() for sample in samples)),
            "seconds": round(row["seconds"], 4),
            "tokens_per_second": round(tokens / row["seconds"], 1),
            "peak_flops_share": None,
            "peak_memory_bytes": row["peak_memory_bytes"],
        }

    def request(self) -> dict[str, Any]:
        context, phase = self.context, self.phase
        base = context.base_folder(context.states[phase.model]).absolute()
        config = AutoConfig.from_pretrained(base)
        family, fields = as_tunix(config)
        lengths, read = self.shard.lengths(), {sample for samples in self.of_steps for sample in samples}
        length = -(-max(int(lengths[sample]) for sample in read) // LENGTHS) * LENGTHS
        most = max(map(len, self.of_steps))
        parts = -(-most // max(1, context.micro_batch_tokens // length))
        samples = np.full((len(self.of_steps), parts * -(-most // parts)), -1, np.int64)
        for step, chosen in enumerate(self.of_steps):
            samples[step, : len(chosen)] = chosen
        np.save(self.folder / "samples.npy", samples)
        lora = phase.trainable if isinstance(phase.trainable, Lora) else None
        return {
            "family": family,
            "config": fields,
            "base": str(base),
            "tied": bool(config.tie_word_embeddings),
            "lora": lora and {"rank": lora.rank, "alpha": lora.alpha, "targets": lora.targets},
            "seed": seed_of(context.recipe.seed, phase.name, "init") % 2**32,
            "precision": phase.precision,
            "adamw": phase.optimizer.model_dump(mode="json"),
            "learning_rates": self.rates,
            "steps": len(self.of_steps),
            "dataset": str(self.shard.folder.absolute()),
            "samples": str((self.folder / "samples.npy").absolute()),
            "parts": parts,
            "length": length,
            "checkpoints": str((self.folder / "checkpoints").absolute()),
            "checkpoint_every_steps": context.execution.checkpoint_every_steps,
            "keep_checkpoints": context.execution.keep_checkpoints,
            "output": str(self.output.absolute()),
        }

    def environment(self) -> dict[str, str]:
        threads, device = str(self.context.execution.threads), self.context.execution.device
        # XLA has no option of its own for the size of its pool. What was compiled is kept, so that a resumed run
        # compiles nothing again.
        given = {"NPROC": threads, "PJRT_NPROC": threads, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        kept = {"JAX_COMPILATION_CACHE_DIR": str(cache_folder() / "jax"), "TF_CPP_MIN_LOG_LEVEL": "2"}
        # Another environment's packages are not for it.
        ours = {name: value for name, value in without_secrets().items() if name != "PYTHONPATH"}
        return kept | ours | given | ({} if device == "auto" else {"JAX_PLATFORMS": device})

    def write(self, folder: Path) -> None:
        """The trained tensors, as files of a state."""
        match self.phase.trainable:
            case Lora() as lora:
                adapters.write(load_file(self.output), lora, folder, self.context.states[self.phase.model].base)
                self.output.unlink()
            case _:
                os.replace(self.output, folder / "model.safetensors")
