"""Checkpoints that verify: written aside, synced, renamed; the newest good one is found, never remembered."""

import json
import os
import random
import shutil
import threading
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

    def snapshot(self, step: int) -> "Snapshot":
        """The state after `step`; its tensors are the live ones until they are copied."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        moments = {
            # bitsandbytes counts steps by a plain number.
            f"{names[id(parameter)]}:{key}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        random_states = {"torch_random_state": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            random_states["cuda_random_state"] = torch.cuda.get_rng_state()
        numpy_name, numpy_keys, *numpy_rest = np.random.get_state(legacy=True)
        return Snapshot(
            step=step,
            tensors={
                "trainable.safetensors": {name: value.detach() for name, value in self.parameters.items()},
                "optimizer.safetensors": moments | random_states,
            },
            state={
                "step": step,
                "identity": self.identity,
                "python_random_state": random.getstate(),
                "numpy_random_state": [numpy_name, np.asarray(numpy_keys).tolist(), *numpy_rest],
            },
        )

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
        if (cuda_random_state := moments.pop("cuda_random_state", None)) is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda_random_state)
        self.optimizer.state.clear()
        for key, value in moments.items():
            name, _, moment = key.rpartition(":")
            parameter = self.parameters[name]
            number = value.dtype == torch.int64
            self.optimizer.state[parameter][moment] = int(value) if number else value.to(parameter.device, copy=True)
        version, words, gauss = state["python_random_state"]
        random.setstate((version, tuple(words), gauss))
        name, words, *rest = state["numpy_random_state"]
        np.random.set_state((name, np.array(words, dtype=np.uint32), *rest))
        return int(state["step"])


class Snapshot:
    """A state on its way to the disk."""

    def __init__(self, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]) -> None:
        self.step = step
        self.tensors = tensors
        self.state = state
        self._gpu = next((value.device for file in tensors.values() for value in file.values() if value.is_cuda), None)
        self._ready = torch.cuda.current_stream(self._gpu).record_event() if self._gpu else None

    def copy_to_host(self) -> None:
        """Put copies in place of the live tensors. From a GPU into page-locked memory, beside what it computes."""
        if self._ready is None:
            self._copy()
            return
        beside = torch.cuda.Stream(self._gpu)
        beside.wait_event(self._ready)
        with torch.cuda.stream(beside):
            self._copy()
        beside.synchronize()

    def _copy(self) -> None:
        for file in self.tensors.values():
            for name, value in file.items():
                copied = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                file[name] = copied.copy_(value, non_blocking=True)

    def commit(self, folder: Path) -> Path:
        """Write `checkpoint-<step>` in `folder`; an unfinished write leaves only a temporary folder behind."""
        final = folder / f"checkpoint-{self.step}"
        temporary = folder / f"{final.name}.tmp-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            self._write(temporary)
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

    def _write(self, folder: Path) -> None:
        for file, tensors in self.tensors.items():
            save_file(tensors, folder / file)
            faults.reach("checkpoint.file_written")
        (folder / "state.json").write_text(json.dumps(self.state))
        for path in folder.iterdir():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        manifest = {
            path.name: {"bytes": path.stat().st_size, "sha256": digest_file(path)} for path in sorted(folder.iterdir())
        }
        faults.reach("checkpoint.before_manifest")
        write_json_atomic(folder / MANIFEST, manifest)


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


class CheckpointWriter:
    """Commits checkpoints while training goes on, one at a time.

    The copy to the host is made beside the next step's forward and backward pass: only the optimizer changes what is
    saved, and it waits for the copy.
    """

    def __init__(self, state: TrainingState, folder: Path, keep: int) -> None:
        self.state, self.folder, self.keep = state, folder, keep
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._copied = threading.Event()
        self._copied.set()
        state.optimizer.register_step_pre_hook(self._hold_optimizer)

    def _hold_optimizer(self, *_: object) -> None:
        self._copied.wait()

    def begin(self, step: int) -> None:
        """Save the state as it is now. Waits for the checkpoint before it and raises what that one met."""
        self.wait()
        self._copied.clear()
        self._thread = threading.Thread(target=self._carry_out, args=(self.state.snapshot(step),), daemon=True)
        self._thread.start()

    def _carry_out(self, snapshot: Snapshot) -> None:
        try:
            try:
                snapshot.copy_to_host()
            finally:
                self._copied.set()
            snapshot.commit(self.folder)
            rotate(self.folder, self.keep)
            faults.reach("checkpoint.rotated")
        except BaseException as error:
            self._failure = error

    def check(self) -> None:
        """Raise what kept the last checkpoint from being committed."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def join(self) -> None:
        """Return when no checkpoint is being written."""
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> None:
        """`join`, then `check`."""
        self.join()
        self.check()
