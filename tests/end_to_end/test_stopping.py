"""Signals in the middle of long work, and memory that runs out: nothing is lost, and the result is the same."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from posttrain.host.machine import is_out_of_memory
from posttrain.run.journal import read_lines
from tests.end_to_end.runs import POSTTRAIN, SMOKE, environment, essence, posttrain, result, smoke

SMALL = str(Path(__file__).parent / "recipes" / "small_sft.py")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    runs = tmp_path_factory.mktemp("undisturbed")
    done = smoke(runs)
    assert done.returncode == 0, done.stdout + done.stderr
    return essence(runs)


@pytest.mark.parametrize("phase", ["eval_base", "grpo"])
def test_sigterm_breaks_off_an_evaluation_or_a_rollout_and_changes_no_bit(
    phase: str, undisturbed: dict[str, object], tmp_path: Path
) -> None:
    child = subprocess.Popen(
        [*POSTTRAIN, "run", *SMOKE, "--runs-dir", str(tmp_path)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(f"{phase} ("):
            break
    journal = tmp_path / "smoke" / "events.jsonl"
    # The model is loaded by then, and the work goes on for longer than this.
    time.sleep(1.0)
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=120)[0]
    assert child.returncode == 4, said
    events = list(read_lines(journal))
    if events[-1]["event"] == "stopped" and phase == "eval_base":
        # Broken off, not finished: the evaluation is not complete.
        assert "phase_completed" not in [event["event"] for event in events if event.get("phase") == phase]
    assert smoke(tmp_path).returncode == 0
    assert essence(tmp_path) == undisturbed


def small(runs_dir: Path, *flags: str, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    words = ["run", SMALL, "--name", "own", "--runs-dir", str(runs_dir), "--threads", "1", *flags]
    return posttrain(*words, fault=fault)


def test_memory_that_runs_out_is_met_by_a_smaller_pass_and_the_same_batch(tmp_path: Path) -> None:
    assert small(tmp_path / "whole").returncode == 0
    done = small(tmp_path / "short", fault="train.pass#2:memory")
    assert done.returncode == 0, done.stderr
    assert "memory ran out in step 2" in done.stdout and "the global batch unchanged" in done.stdout
    (event,) = (
        event for event in read_lines(tmp_path / "short" / "own" / "events.jsonl") if event["event"] == "out_of_memory"
    )
    assert event["step"] == 2 and event["then"] < event["micro_batch_tokens"]
    rows = [
        list(read_lines(tmp_path / name / "own" / "phases" / "train" / "metrics.jsonl")) for name in ("whole", "short")
    ]
    for whole, short in zip(*rows, strict=True):
        # The same tokens and targets in every step; the order of sums alone differs.
        assert (whole["tokens"], whole["target_tokens"]) == (short["tokens"], short["target_tokens"])
        assert short["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert rows[0][0]["loss"] == rows[1][0]["loss"]


def test_a_single_item_that_does_not_fit_ends_the_run_with_the_ways_out(tmp_path: Path) -> None:
    ended = small(tmp_path, "--micro-batch-tokens", "1", fault="train.pass#2:memory")
    assert ended.returncode == 5
    assert "memory ran out in step 2" in ended.stderr and "--recompute full" in ended.stderr
    assert small(tmp_path, "--micro-batch-tokens", "1").returncode == 0
    assert result(tmp_path, "train", "own")["metrics"]["steps"] == 3


def test_a_phase_goes_on_with_the_pass_that_fitted(tmp_path: Path) -> None:
    words = ("--checkpoint-every-steps", "1")
    first = small(tmp_path, *words, fault="train.pass#1:memory")
    assert first.returncode == 0
    # Made again from the same inputs, it begins with the pass that fitted.
    again = posttrain("resume", "own", "--runs-dir", str(tmp_path), "--from", "train", fault="train.pass#1:memory")
    assert again.returncode == 5 and "memory ran out in step 1" in again.stderr


def test_torchs_own_complaint_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
