"""What the public command says when something is wrong, and that nothing committed is lost by it."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from posttrain.run.folder import digest_folder, shortest
from posttrain.run.journal import read_lines
from tests.end_to_end.runs import KILLED, POSTTRAIN, SMOKE, environment, essence, posttrain, smoke

RECIPES = Path(__file__).parent / "recipes"
SMALL = str(RECIPES / "small_sft.py")
TORCH = re.compile(r"^import time:.*\| +torch$", re.MULTILINE)


def run_small(runs_dir: Path, *flags: object, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    execution = ["--threads", "1", "--checkpoint-every-steps", "1"]
    words = ["run", SMALL, "--name", "own", "--runs-dir", runs_dir, *execution, *flags]
    return posttrain(*map(str, words), fault=fault)


def events(run: Path, name: str) -> list[dict]:
    return [event for event in read_lines(run / "events.jsonl") if event["event"] == name]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs with a finished smoke run; tests leave it as it is."""
    runs = tmp_path_factory.mktemp("undisturbed")
    done = smoke(runs)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs with a smoke run killed in its first training phase, after the checkpoints of steps 2 and 3."""
    runs = tmp_path_factory.mktemp("unfinished")
    assert smoke(runs, "--checkpoint-every-steps", "1", fault="checkpoint.rotated#3:kill").returncode == KILLED
    return runs


# ---------------------------------------------------------------- recipes, flags, names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "smokee"], ["no recipe 'smokee'", "did you mean smoke"]),
        (["run", "smoke", "--case", "3"], ["--case", "--cases"]),
        (["run", "smoke", "--name", "../x"], ["run name '../x' is not allowed", "--name"]),
        (
            ["run", str(RECIPES / "three_faults.py")],
            [
                "recipe 'three_faults' has 3 faults",
                "phases[data].datasets[own].sources[0].split: 'helout' is not allowed",
                "did you mean heldout",
                "phases[train].optimizer.learning_rate: -1.0 is not allowed: input should be greater than 0",
                "phases[train].stepps: there is no such field (did you mean steps",
            ],
        ),
    ],
)
def test_bad_words_exit_with_2_and_leave_no_folder(words: list[str], said: list[str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    refused = posttrain(*words, "--runs-dir", str(runs))
    assert refused.returncode == 2
    for part in said:
        assert part in refused.stderr
    assert "Traceback" not in refused.stderr and not runs.exists()


def test_a_run_made_by_another_recipe_is_refused_with_the_fields(undisturbed: Path) -> None:
    refused = smoke(undisturbed, "--cases", "7", "--name", "smoke")
    assert refused.returncode == 2
    for line in ("flags.cases: 6 -> 7", "phases[data].datasets[tools].sources[0].count: 6 -> 7"):
        assert line in refused.stderr
    assert f"posttrain resume smoke --runs-dir {shortest(undisturbed)}" in refused.stderr


# ---------------------------------------------------------------- a finished run


def test_a_finished_run_does_nothing_again_and_never_imports_torch(undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    for words in (["run", *SMOKE], ["plan", *SMOKE[:3]], ["plan", "smoke"], ["status", "smoke"], ["status"]):
        done = subprocess.run(
            [*POSTTRAIN, *words, "--runs-dir", str(undisturbed)],
            env=environment(PYTHONPROFILEIMPORTTIME="1"),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert "import time:" in done.stderr and not TORCH.search(done.stderr), words
        if words[0] == "run":
            assert "nothing left to do" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


# ---------------------------------------------------------------- data


def conversation(number: int) -> dict:
    turns = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "channel": "final", "content": "hi"}]
    return {"id": f"row-{number}", "conversation": {"messages": turns}}


def test_a_truncated_row_is_named_and_the_run_goes_on_once_it_is_mended(tmp_path: Path) -> None:
    rows = tmp_path / "own.jsonl"
    whole = "".join(json.dumps(conversation(number)) + "\n" for number in range(4))
    rows.write_text(whole[:-20])
    refused = run_small(tmp_path, "--rows", rows)
    assert refused.returncode == 2
    assert f"{rows} row 4: not JSON" in refused.stderr and "it is truncated" in refused.stderr
    assert not (tmp_path / "own" / "phases" / "data" / "data" / "own").exists()

    rows.write_text(whole)
    done = run_small(tmp_path, "--rows", rows)
    assert done.returncode == 0, done.stderr
    prepared = tmp_path / "own" / "phases" / "data" / "result.json"
    assert json.loads(prepared.read_text())["counts"]["own.rows"] == 4

    # A file that is gone takes nothing with it; one that was edited is read again.
    made = prepared.read_bytes()
    rows.unlink()
    assert "nothing left to do" in run_small(tmp_path, "--rows", rows).stdout
    assert prepared.read_bytes() == made
    rows.write_text(whole + json.dumps(conversation(4)) + "\n")
    again = run_small(tmp_path, "--rows", rows, fault="train.step:kill")
    assert again.returncode == KILLED and f"{rows} changed since it was read" in again.stdout
    assert json.loads(prepared.read_text())["counts"]["own.rows"] == 5


def test_a_row_that_cannot_be_rendered_is_named_with_its_file(tmp_path: Path) -> None:
    rows = tmp_path / "own.jsonl"
    faulty = conversation(1)
    faulty["conversation"]["messages"].insert(1, {"role": "tool", "content": "42"})
    rows.write_text(json.dumps(conversation(0)) + "\n" + json.dumps(faulty) + "\n")
    refused = run_small(tmp_path, "--rows", rows)
    assert refused.returncode == 2
    assert f"{rows} row 2" in refused.stderr and "sender" in refused.stderr


# ---------------------------------------------------------------- checkpoints, disk, numbers


def test_a_corrupt_checkpoint_is_set_aside_and_the_one_before_it_used(
    undisturbed: Path, unfinished: Path, tmp_path: Path
) -> None:
    shutil.copytree(unfinished, tmp_path, dirs_exist_ok=True)
    phase = tmp_path / "smoke" / "phases" / "tool_sft"
    assert sorted(path.name for path in phase.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    weights = phase / "checkpoint-3" / "trainable.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    # Died again at the first step of the phase after it: all that this test asks about is done by then.
    again = smoke(tmp_path, fault="train.step#3:kill")

    assert again.returncode == KILLED, again.stdout + again.stderr
    assert "checkpoint-3" in again.stdout and "set aside as checkpoint-3.bad" in again.stdout
    assert "continues after step 2 of 4, from checkpoint-2" in again.stdout
    assert [event["phase"] for event in events(tmp_path / "smoke", "checkpoint_set_aside")] == ["tool_sft"]
    assert digest_folder(phase / "final") == digest_folder(undisturbed / "smoke" / "phases" / "tool_sft" / "final")


def test_with_no_good_checkpoint_left_the_phase_begins_again(
    undisturbed: Path, unfinished: Path, tmp_path: Path
) -> None:
    shutil.copytree(unfinished, tmp_path, dirs_exist_ok=True)
    phase = tmp_path / "smoke" / "phases" / "tool_sft"
    (phase / "checkpoint-2" / "manifest.json").write_text("{}")
    (phase / "checkpoint-3" / "optimizer.safetensors").unlink()
    again = smoke(tmp_path, fault="train.step#5:kill")
    assert again.returncode == KILLED, again.stdout + again.stderr
    assert "checkpoint-2.bad" in again.stdout and "checkpoint-3.bad" in again.stdout
    assert "no checkpoint is left, begins again at step 1" in again.stdout
    assert digest_folder(phase / "final") == digest_folder(undisturbed / "smoke" / "phases" / "tool_sft" / "final")


def test_a_full_disk_loses_nothing_that_was_committed(undisturbed: Path, tmp_path: Path) -> None:
    complete: dict[Path, bytes] = {}
    points = (
        "checkpoint.file_written#1",
        "train.before_final#1",
        "merge.shard_written#1",
        "export.hf_written#1",
    )
    for point in points:
        stopped = smoke(tmp_path, fault=f"{point}:full")
        assert stopped.returncode == 5, stopped.stdout + stopped.stderr
        assert "the disk is full" in stopped.stderr and "Traceback" not in stopped.stderr
        assert f"posttrain resume smoke --runs-dir {shortest(tmp_path)}" in stopped.stderr
        assert all(path.read_bytes() == content for path, content in complete.items())
        complete = {path: path.read_bytes() for path in tmp_path.glob("smoke/phases/*/result.json")}
    assert len(complete) >= 10
    again = smoke(tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert essence(tmp_path) == essence(undisturbed)
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name or "partial" in path.name]


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path: Path) -> None:
    failed = run_small(tmp_path, "--learning-rate", "1e30")
    assert failed.returncode == 1
    assert "phase 'train'" in failed.stderr and "step 2: loss" in failed.stderr and "not finite" in failed.stderr
    phase = tmp_path / "own" / "phases" / "train"
    assert not (phase / "final").exists() and not (phase / "result.json").exists()
    assert [row["step"] for row in read_lines(phase / "metrics.jsonl")] == [1]

    kept = digest_folder(phase / "checkpoint-1")
    again = run_small(tmp_path, "--learning-rate", "1e30")
    assert again.returncode == 1 and "step 2: loss" in again.stderr
    assert digest_folder(phase / "checkpoint-1") == kept


# ---------------------------------------------------------------- gates


def test_a_failed_hard_gate_stops_the_run_until_it_is_accepted(tmp_path: Path) -> None:
    failed = run_small(tmp_path, "--loss-limit", "0.001")
    assert failed.returncode == 3
    assert re.search(r"loss: loss is \d+\.\d+, must be <= 0\.001", failed.stderr)
    where = f"--runs-dir {shortest(tmp_path)}"
    assert f"posttrain resume own {where} --from train" in failed.stderr
    assert f"posttrain resume own {where} --accept train:loss" in failed.stderr
    run = tmp_path / "own"
    made = digest_folder(run / "phases")

    again = run_small(tmp_path, "--loss-limit", "0.001")
    assert again.returncode == 3 and again.stderr == failed.stderr
    assert digest_folder(run / "phases") == made and len(events(run, "phase_started")) == 2

    accepted = run_small(tmp_path, "--loss-limit", "0.001", "--accept", "train:loss")
    assert accepted.returncode == 0, accepted.stderr
    assert digest_folder(run / "phases") == made
    assert [(event["phase"], event["gate"]) for event in events(run, "accepted")] == [("train", "loss")]
    assert "accepted" in (run / "report.md").read_text()


# ---------------------------------------------------------------- two processes, and signals


def test_a_second_process_is_refused_and_sigterm_stops_the_first_resumably(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "smoke"
    command = [*POSTTRAIN, "run", *SMOKE, "--runs-dir", str(tmp_path)]
    first = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while first.poll() is None and not (run / "phases" / "tool_sft" / "metrics.jsonl").exists():
            time.sleep(0.02)
        second = smoke(tmp_path)
        seen = posttrain("status", "smoke", "--runs-dir", str(tmp_path))
        first.send_signal(signal.SIGTERM)
        said, complaint = first.communicate(timeout=120)
    finally:
        first.kill()
    assert second.returncode == 2 and f"held by process {first.pid} on" in second.stderr
    assert f"held by process {first.pid}" in seen.stdout
    assert first.returncode == 4, complaint
    # Which of the two depends on the phase that it meets.
    assert re.search("SIGTERM: (finishing the step|breaking off what is made again) and saving", said)
    assert complaint.startswith("stopped ")
    assert f"posttrain resume smoke --runs-dir {shortest(tmp_path)}" in complaint

    resumed = posttrain("resume", "smoke", "--runs-dir", str(tmp_path))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert essence(tmp_path) == essence(undisturbed)
