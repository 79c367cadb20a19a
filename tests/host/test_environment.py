"""The environment of a command: where the hub's token is found, who gets it, and where caches go."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.errors import InputError, MachineError
from posttrain.host import environment, machine
from posttrain.host.environment import prepare
from posttrain.host.workers import in_order
from posttrain.run.redaction import without_secrets

TOKEN = "hf_" + "x" * 20


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(environment, "FIRST_PROCESS", tmp_path / "environ")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("given", "first", "place"),
    [
        ({"HF_TOKEN": TOKEN, "RUNPOD_SECRET_HF_TOKEN": "other"}, "", "HF_TOKEN"),
        ({"HF_TOKEN": " ", "RUNPOD_SECRET_HF_TOKEN": TOKEN}, "", "RUNPOD_SECRET_HF_TOKEN"),
        ({}, f"PATH=/bin\0HF_TOKEN={TOKEN}\0", "process 1"),
        ({}, f"RUNPOD_SECRET_HF_TOKEN={TOKEN}\0HF_TOKEN=\0", "process 1"),
    ],
)
def test_a_token_is_found_where_it_was_put(
    given: dict[str, str], first: str, place: str, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "environ").write_text(first)
    found = dict(given)
    assert prepare(found).token == place
    assert found["HF_TOKEN"] == TOKEN


def test_without_a_token_nothing_is_set(home: Path) -> None:
    found: dict[str, str] = {}
    assert prepare(found).token == "none" and "HF_TOKEN" not in found


def test_a_login_is_found_although_caches_move(home: Path, tmp_path: Path) -> None:
    login = home / ".cache" / "huggingface" / "token"
    login.parent.mkdir(parents=True)
    login.write_text(TOKEN)
    (tmp_path / "workspace").mkdir()
    found = {"POSTTRAIN_WORKSPACE": str(tmp_path / "workspace")}
    assert prepare(found).token == "login"
    assert found["HF_HOME"] == str(tmp_path / "workspace" / ".cache" / "huggingface")
    # The library itself finds it with this environment.
    asked = "import huggingface_hub; print(huggingface_hub.get_token())"
    told = subprocess.run([sys.executable, "-c", asked], env=os.environ | found, capture_output=True, text=True)
    assert told.stdout.strip() == TOKEN


def test_caches_move_and_what_was_set_stays(home: Path, tmp_path: Path) -> None:
    found = {"POSTTRAIN_WORKSPACE": str(tmp_path), "TMPDIR": "/elsewhere", "WANDB_MODE": "online"}
    prepared = prepare(found)
    assert prepared.workspace == tmp_path and prepared.problem is None
    assert found["TMPDIR"] == "/elsewhere" and found["TMP"] == str(tmp_path / "tmp")
    assert found["TORCH_HOME"] == str(tmp_path / ".cache" / "torch") and Path(found["TORCH_HOME"]).is_dir()
    assert (found["WANDB_MODE"], found["TOKENIZERS_PARALLELISM"]) == ("online", "false")
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_a_workspace_that_is_not_there_is_named(home: Path) -> None:
    with pytest.raises(InputError, match=r"POSTTRAIN_WORKSPACE=/nowhere: there is no such folder"):
        prepare({"POSTTRAIN_WORKSPACE": "/nowhere"})


def test_children_get_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "HF_TOKEN" not in without_secrets() and "PATH" in without_secrets()
    seen = [made for _, made in in_order(lambda job: os.environ.get("HF_TOKEN"), range(4), 2)]
    assert seen == [None] * 4 and os.environ["HF_TOKEN"] == TOKEN


def fake_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """A driver's program that lists these."""
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_the_drivers_gpus_are_read_and_ranks_choose_among_those_that_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "NVIDIA H100 NVL, 95830, 95320, 570.1, 9.0"
    fake_gpus(tmp_path, monkeypatch, line, line, line)
    first = machine.gpus()[0]
    assert (first.name, first.memory_bytes, first.capability) == ("NVIDIA H100 NVL", 95830 * 2**20, "9.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine.show_gpus("0,2")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,2"
    machine.show_gpus("1")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    with pytest.raises(MachineError, match=r"--gpu-ranks 1: there is no GPU 1; this machine has GPUs 0"):
        machine.show_gpus("1")


def test_without_a_gpu_no_rank_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(MachineError, match="this machine has no GPU"):
        machine.show_gpus("0")
