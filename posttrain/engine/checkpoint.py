"""Checkpoints that verify: written aside, synced, renamed; the newest good one is found, never remembered."""

import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from posttrain.errors import CheckpointError
from posttrain.run import faults
from posttrain.run.folder import digest_file, fsync_folder, write_json_atomic

MANIFEST = "manifest.json"
FILES = ("optimizer.safetensors", "state.json", "trainable.safetensors")


@dataclass(frozen=True)
class TrainingState:
    """What a phase carries from step to step. `identity` ties a checkpoint to its recipe, phase and data."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    identity: str

    def save(self, folder: Path, step: int) -> Path:
        """Commit `checkpoint-<step>` in `folder`; an unfinished write leaves only a temporary folder behind."""
        final = folder / f"checkpoint-{step}"
        temporary = folder / f"{final.name}.tmp-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            self._write(temporary, step)
            faults.reach("checkpoint.before_rename")
            if final.exists():
                shutil.rmtree(final)
            os.rename(temporary, final)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_folder(folder)
        faults.reach("checkpoint.after_rename")
        return final

    def _write(self, folder: Path, step: int) -> None:
        tensors = {name: parameter.detach().contiguous() for name, parameter in self.parameters.items()}
        save_file(tensors, folder / "trainable.safetensors")
        faults.reach("checkpoint.file_written")
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        moments = {
            f"{names[id(parameter)]}:{key}": value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        save_file(moments | {"torch_random_state": torch.get_rng_state()}, folder / "optimizer.safetensors")
        numpy_name, numpy_keys, *numpy_rest = np.random.get_state(legacy=True)
        state = {
            "step": step,
            "identity": self.identity,
            "python_random_state": random.getstate(),
            "numpy_random_state": [numpy_name, np.asarray(numpy_keys).tolist(), *numpy_rest],
        }
        (folder / "state.json").write_text(json.dumps(state))
        for file in folder.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        manifest = {
            file.name: {"bytes": file.stat().st_size, "sha256": digest_file(file)} for file in sorted(folder.iterdir())
        }
        faults.reach("checkpoint.before_manifest")
        write_json_atomic(folder / MANIFEST, manifest)

    def restore(self, checkpoint: Path) -> int:
        """Load a verified checkpoint into the parameters, optimizer and random generators; returns its step."""
        state = json.loads((checkpoint / "state.json").read_text())
        if state["identity"] != self.identity:
            raise CheckpointError(f"{checkpoint} belongs to another recipe or data set")
        tensors = load_file(checkpoint / "trainable.safetensors")
        moments = load_file(checkpoint / "optimizer.safetensors")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])
        torch.set_rng_state(moments.pop("torch_random_state"))
        self.optimizer.state.clear()
        for key, value in moments.items():
            name, _, moment = key.rpartition(":")
            self.optimizer.state[self.parameters[name]][moment] = value.clone()
        version, words, gauss = state["python_random_state"]
        random.setstate((version, tuple(words), gauss))
        name, words, *rest = state["numpy_random_state"]
        np.random.set_state((name, np.array(words, dtype=np.uint32), *rest))
        return int(state["step"])


def verify(checkpoint: Path) -> None:
    """Raise CheckpointError unless every file has the size and digest of the manifest."""
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
        if sorted(manifest) != list(FILES):
            raise CheckpointError(f"{checkpoint / MANIFEST} lists {sorted(manifest)} instead of {list(FILES)}")
        for name, expected in manifest.items():
            file = checkpoint / name
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{file} has {file.stat().st_size} bytes, its manifest says {expected['bytes']}")
            if digest_file(file) != expected["sha256"]:
                raise CheckpointError(f"{file} does not have the digest of its manifest")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Copy a checkpoint's weights into the model that its phase had; CheckpointError where it does not verify."""
    verify(checkpoint)
    with torch.no_grad():
        for name, tensor in load_file(checkpoint / "trainable.safetensors").items():
            try:
                model.get_parameter(name).copy_(tensor)
            except (AttributeError, RuntimeError) as error:
                raise CheckpointError(f"{checkpoint} was made for another model: {name}: {error}") from error


def by_step(folder: Path) -> list[Path]:
    """The checkpoints of a phase, the oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The highest checkpoint that verifies, and a message for each bad one, which is renamed aside."""
    messages = []
    for leftover in folder.glob("checkpoint-*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for checkpoint in reversed(by_step(folder)):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            aside = checkpoint.with_name(f"{checkpoint.name}.bad")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(checkpoint, aside)
            messages.append(f"{error}; set aside as {aside.name}")
            continue
        return checkpoint, messages
    return None, messages


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; called after a commit."""
    for checkpoint in by_step(folder)[:-keep]:
        shutil.rmtree(checkpoint)
