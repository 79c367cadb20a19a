"""Checkpoints written beside the training hold the state they were asked for, or say why there is none."""

import json
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from posttrain.engine.checkpoint import CheckpointWriter, Snapshot, TrainingState, newest, verify


def training(seed: int = 0, device: str = "cpu") -> TrainingState:
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: nn.Parameter(torch.randn(5, 3, generator=generator).to(device)) for name in ("a", "b")}
    state = TrainingState(parameters, torch.optim.AdamW(parameters.values(), lr=0.1, fused=True), "this phase")
    step(state)
    return state


def step(state: TrainingState) -> None:
    for number, parameter in enumerate(state.parameters.values()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    state.optimizer.step()


def values(state: TrainingState) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in state.parameters.items()}


def test_the_optimizer_waits_for_the_copy_and_what_is_saved_is_the_state_before_it(tmp_path, monkeypatch) -> None:
    state = training()
    writer = CheckpointWriter(state, tmp_path, keep=2)
    before, copying, copy = values(state), threading.Event(), Snapshot.copy_to_host

    def late(snapshot: Snapshot) -> None:
        assert copying.wait(20)
        copy(snapshot)

    monkeypatch.setattr(Snapshot, "copy_to_host", late)
    writer.begin(1)
    updating = threading.Thread(target=step, args=(state,))
    updating.start()
    updating.join(0.2)
    assert updating.is_alive() and torch.equal(state.parameters["a"], before["a"])
    copying.set()
    updating.join(20)
    writer.wait()

    assert not torch.equal(state.parameters["a"], before["a"])
    verify(tmp_path / "checkpoint-1")
    stored = load_file(tmp_path / "checkpoint-1" / "trainable.safetensors")
    assert stored.keys() == before.keys()
    assert all(torch.equal(stored[name], before[name]) for name in before)


def test_a_restored_state_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    state = training()
    writer = CheckpointWriter(state, tmp_path, keep=2)
    writer.begin(7)
    drawn = torch.rand(2), np.random.rand(2), random.random()
    step(state)
    writer.wait()

    other = training(seed=1)
    found, messages = newest(tmp_path)
    assert found is not None and messages == [] and other.restore(found) == 7
    again = torch.rand(2), np.random.rand(2), random.random()
    step(other)

    assert all(torch.equal(value, values(state)[name]) for name, value in values(other).items())
    assert torch.equal(again[0], drawn[0]) and np.array_equal(again[1], drawn[1]) and again[2] == drawn[2]


def test_only_so_many_are_kept_and_never_one_of_another_run(tmp_path: Path) -> None:
    writer = CheckpointWriter(training(), tmp_path, keep=2)
    for number in (1, 2, 10):
        writer.begin(number)
    writer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    assert json.loads((tmp_path / "checkpoint-10" / "state.json").read_text())["identity"] == "this phase"


@pytest.mark.parametrize("point", ["checkpoint.file_written", "checkpoint.before_rename"])
def test_what_the_disk_answered_surfaces_at_the_next_step_and_leaves_nothing(point, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("POSTTRAIN_FAULT", f"{point}:full")
    monkeypatch.setattr("posttrain.run.faults._arrivals", {})
    state = training()
    writer = CheckpointWriter(state, tmp_path, keep=2)
    writer.check()
    writer.begin(1)
    writer.join()
    with pytest.raises(OSError, match=r"No space left.*fault at"):
        writer.check()
    assert list(tmp_path.iterdir()) == []
    step(state)
    writer.begin(2)
    writer.wait()
    assert newest(tmp_path)[0] == tmp_path / "checkpoint-2"


@pytest.mark.gpu
def test_a_state_on_a_gpu_is_saved_beside_what_it_computes_and_comes_back(tmp_path: Path) -> None:
    state = training(device="cuda")
    writer = CheckpointWriter(state, tmp_path, keep=2)
    before = values(state)
    writer.begin(1)
    drawn = torch.rand(2, device="cuda")
    step(state)
    writer.wait()
    other = training(seed=1, device="cuda")
    assert other.restore(tmp_path / "checkpoint-1") == 1
    assert all(torch.equal(value, before[name]) for name, value in values(other).items())
    assert torch.equal(torch.rand(2, device="cuda"), drawn)
    step(other)
    assert all(torch.equal(value, values(state)[name]) for name, value in values(other).items())
