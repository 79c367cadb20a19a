"""Runs in sessions that outlive the shell: for real, in every kind of session that is installed."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.run.folder import RunFolder
from posttrain.run.journal import read_lines
from posttrain.run.lock import holder
from tests.end_to_end.runs import POSTTRAIN, environment, posttrain

LONG = str(Path(__file__).parent / "recipes" / "long_rollout.py")
SMALL = str(Path(__file__).parent / "recipes" / "small_sft.py")
SECRET = "hf_" + "s" * 24


def start(recipe: str, runs: Path, name: str, *flags: str, **extra: str) -> subprocess.CompletedProcess[str]:
    words = ["start", recipe, "--name", name, "--runs-dir", str(runs), "--threads", "1", *flags]
    return subprocess.run([*POSTTRAIN, *words], env=environment(**extra), capture_output=True, text=True, timeout=180)


def await_that(true: Callable[[], object], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.05)


def events(run: Path) -> list[str]:
    return [event["event"] for event in read_lines(run / "events.jsonl")]


def in_rollout(run: Path) -> bool:
    begun = [event.get("phase") for event in read_lines(run / "events.jsonl") if event["event"] == "phase_started"]
    return "grpo" in begun


@pytest.mark.parametrize("kind", ["screen", "tmux", "own"])
def test_a_run_goes_on_by_itself_and_is_stopped_in_the_middle_of_a_rollout(kind: str, tmp_path: Path) -> None:
    if kind != "own" and shutil.which(kind) is None:
        pytest.skip(f"{kind} is not installed")
    name = f"long-{kind}-{os.getpid()}"
    run = tmp_path / name
    begun = start(LONG, tmp_path, name, "--session", kind, HF_TOKEN=SECRET)
    assert begun.returncode == 0, begun.stderr
    try:
        assert f"posttrain attach {name}" in begun.stdout
        owner = holder(RunFolder(run))
        assert owner is not None
        # The run has the environment of who started it, secrets included; nobody's command line shows them.
        assert SECRET in Path(f"/proc/{owner.pid}/environ").read_text()
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        assert not any(SECRET.encode() in line for line in lines)

        again = start(LONG, tmp_path, name)
        assert again.returncode == 2 and f"already worked on by process {owner.pid}" in again.stderr
        await_that(lambda: in_rollout(run))
        shown = posttrain("status", name, "--runs-dir", str(tmp_path))
        assert "last sign of life" in shown.stdout and f"held by process {owner.pid}" in shown.stdout
    finally:
        stopped = posttrain("stop", name, "--runs-dir", str(tmp_path), timeout=180)
    assert stopped.returncode == 0 and "it goes on with: posttrain start" in stopped.stdout, stopped.stderr
    assert events(run)[-1] == "stopped" and not (run / "phases" / "grpo" / "samples.jsonl").exists()
    assert holder(RunFolder(run)) is None
    assert SECRET not in "".join(path.read_text() for path in run.rglob("*.json*"))
    # Its session has ended with it: there is nothing to attach to, and the message says what to type.
    await_that(lambda: "no process works on it" in posttrain("attach", name, "--runs-dir", str(tmp_path)).stderr)


def test_a_dead_session_is_said_and_the_run_starts_again(tmp_path: Path) -> None:
    kind = next((kind for kind in ("screen", "tmux") if shutil.which(kind)), "own")
    name = f"dead-{os.getpid()}"
    assert start(LONG, tmp_path, name, "--session", kind).returncode == 0
    owner = holder(RunFolder(tmp_path / name))
    assert owner is not None
    os.kill(owner.pid, signal.SIGKILL)
    await_that(lambda: holder(RunFolder(tmp_path / name)) is None)
    await_that(lambda: "dead" in posttrain("attach", name, "--runs-dir", str(tmp_path)).stderr)
    attached = posttrain("attach", name, "--runs-dir", str(tmp_path))
    assert attached.returncode == 2 and f"posttrain start {name}" in attached.stderr
    again = subprocess.run(
        [*POSTTRAIN, "start", name, "--runs-dir", str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert again.returncode == 0, again.stderr
    # It goes on with what it was carried out with before.
    assert len(json.loads((tmp_path / name / "run.json").read_text())["attempts"]) == 2
    assert posttrain("stop", name, "--now", "--runs-dir", str(tmp_path)).returncode == 0


def test_two_starts_at_once_make_one_run(tmp_path: Path) -> None:
    words = ["start", SMALL, "--name", "twice", "--runs-dir", str(tmp_path), "--session", "own"]
    both = [
        subprocess.Popen([*POSTTRAIN, *words], env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [child.communicate(timeout=180)[1] for child in both]
    assert sorted(child.returncode for child in both) == [0, 2]
    refused = next(text for child, text in zip(both, said, strict=True) if child.returncode == 2)
    assert "being started by another command" in refused or "already worked on" in refused
    followed = posttrain("logs", "twice", "-f", "--runs-dir", str(tmp_path))
    assert "train: done" in followed.stdout and events(tmp_path / "twice").count("attempt_started") == 1


def test_what_cannot_run_is_refused_before_a_session_is_opened(tmp_path: Path) -> None:
    refused = start("smokee", tmp_path, "x")
    assert refused.returncode == 2 and "did you mean smoke" in refused.stderr
    nothing = start(SMALL, tmp_path, "x", "--session", "screen", PATH="/nonexistent")
    assert nothing.returncode == 5 and "screen is not installed: apt-get install -y screen" in nothing.stderr


def test_the_end_is_told(tmp_path: Path) -> None:
    told = tmp_path / "told"
    done = posttrain("run", SMALL, "--name", "own", "--runs-dir", str(tmp_path), "--notify", f"cat > {told}")
    assert done.returncode == 0 and json.loads(told.read_text())["outcome"] == "completed"
    failed = posttrain(
        "run", SMALL, "--loss-limit", "0.1", "--name", "gate", "--runs-dir", str(tmp_path), "--notify", f"cat > {told}"
    )
    assert failed.returncode == 3 and json.loads(told.read_text())["exit_code"] == 3
