"""What the state machine decides: skip, resume, start again, refuse, stop at a gate."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from posttrain.cli.main import main
from posttrain.run.folder import RunFolder
from posttrain.run.journal import read_lines
from posttrain.run.lock import RunLock
from posttrain.serve import control
from tests.pipeline.command import SMALL, made_by

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place_model: Callable[[Path], None]) -> Invoke:
    place_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def finished(invoke: Invoke, tmp_path: Path) -> Path:
    done = invoke("run", SMALL)
    assert done.exit_code == 0, done.output
    return tmp_path / "runs" / "small_recipe"


def events(run: Path, *names: str) -> list[dict[str, object]]:
    return [event for event in read_lines(run / "events.jsonl") if event.get("event") in names]


def test_a_finished_run_does_nothing_again(invoke: Invoke, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    again = invoke("run", SMALL)
    assert again.exit_code == 0 and "nothing left to do" in again.output
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_results_name_outputs_inputs_and_verdicts(finished: Path) -> None:
    result = json.loads((finished / "phases" / "calls" / "result.json").read_text())
    assert {output["path"].split("/")[1] for output in result["outputs"]} == {"calls", "choices"}
    assert [(verdict["gate"]["name"], verdict["passed"]) for verdict in result["gates"]] == [
        ("enough-rows", True),
        ("many-rows", False),
    ]
    manifest = json.loads((finished / "run.json").read_text())
    assert set(manifest["datasets"]) == {"words", "calls", "jobs"}
    assert manifest["attempts"][0]["outcome"] == "completed"
    assert manifest["attempts"][0]["execution"]["threads"] == 2


def test_a_changed_output_is_found_and_only_its_phase_made_again(invoke: Invoke, finished: Path) -> None:
    whole = made_by(finished)
    rows = finished / "phases" / "calls" / "data" / "choices" / "rows.jsonl"
    text = rows.read_bytes()
    rows.write_bytes(text[:-3] + b"x" + text[-2:])
    done = invoke("run", SMALL)
    assert done.exit_code == 0 and "choices/rows.jsonl was changed" in done.output
    assert made_by(finished) == whole
    assert [event["phase"] for event in events(finished, "phase_resumed")] == ["calls"]


def test_a_touched_output_with_the_same_content_is_still_complete(invoke: Invoke, finished: Path) -> None:
    os.utime(finished / "phases" / "words" / "data" / "text" / "rows.jsonl", (1, 1))
    assert "nothing left to do" in invoke("run", SMALL).output


@pytest.mark.parametrize("damage", [b"", b'{"phase": "calls", "ki', b"[]"])
def test_a_truncated_result_means_that_the_phase_is_not_complete(invoke: Invoke, finished: Path, damage: bytes) -> None:
    whole = made_by(finished)
    (finished / "phases" / "calls" / "result.json").write_bytes(damage)
    assert invoke("run", SMALL).exit_code == 0
    assert json.loads((finished / "phases" / "calls" / "result.json").read_text())["phase"] == "calls"
    assert made_by(finished) == whole


def test_a_torn_last_line_of_the_journal_is_tolerated(invoke: Invoke, finished: Path) -> None:
    with open(finished / "events.jsonl", "ab") as journal:
        journal.write(b'{"time": 1, "event": "redo_req')
    assert "nothing left to do" in invoke("run", SMALL).output
    assert invoke("run", SMALL, "--from", "jobs").exit_code == 0
    assert [event["phases"] for event in events(finished, "redo_requested")] == [["jobs"]]


def test_events_that_lack_what_they_should_name_are_survived(invoke: Invoke, finished: Path) -> None:
    """As another version, or another program, may have written them."""
    whole = made_by(finished)
    half = ({"event": "phase_started"}, {"event": "redo_requested"}, {"event": "accepted", "phase": "calls"}, {}, 7)
    append = [*half, {"event": "phase_started", "phase": "jobs"}]
    with open(finished / "events.jsonl", "a") as journal:
        journal.writelines(json.dumps(event) + "\n" for event in append)
    assert invoke("status", "small_recipe").exit_code == 0
    assert control.state_of(RunFolder(finished)).completed == ("words", "calls")
    (finished / "phases" / "jobs" / "result.json").unlink()
    again = invoke("run", SMALL)
    assert again.exit_code == 0 and "jobs: the journal does not say of what it was begun" in again.output
    assert made_by(finished) == whole


def test_another_recipe_on_the_same_folder_is_refused_with_the_fields(invoke: Invoke, finished: Path) -> None:
    refused = invoke("run", SMALL, "--rows", 7, "--name", "small_recipe")
    assert refused.exit_code == 2
    for line in ("flags.rows: 6 -> 7", "phases[calls].datasets[choices].sources[0].count: 6 -> 7", "--name NEW_NAME"):
        assert line in refused.output
    assert len(events(finished, "attempt_started")) == 1


def test_an_edited_recipe_file_is_refused(invoke: Invoke, finished: Path) -> None:
    stored = finished / "recipe.json"
    stored.write_text(stored.read_text().replace('"max_tokens": 4096', '"max_tokens": 4095', 1))
    refused = invoke("resume", "small_recipe")
    assert refused.exit_code == 2 and "was changed after the run began" in refused.output


def test_a_folder_that_is_no_run_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "thesis.txt").write_text("dear")
    refused = invoke("run", SMALL, "--name", "mine")
    assert refused.exit_code == 2 and "it is no run" in refused.output


def test_a_failed_hard_gate_fails_again_until_it_is_accepted_by_name(invoke: Invoke, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "small_recipe-least-50"
    failed = invoke("run", SMALL, "--least", 50)
    assert failed.exit_code == 3
    assert "calls.rows is 6, must be >= 50" in failed.output
    assert "--from calls" in failed.output and "--accept calls:enough-rows" in failed.output
    first = (run / "phases" / "calls" / "result.json").read_bytes()

    assert invoke("run", SMALL, "--least", 50).exit_code == 3
    assert (run / "phases" / "calls" / "result.json").read_bytes() == first
    assert not (run / "phases" / "jobs").exists()

    accepted = invoke("resume", run.name, "--accept", "calls:enough-rows")
    assert accepted.exit_code == 0, accepted.output
    assert [(one["phase"], one["gate"]) for one in events(run, "accepted")] == [("calls", "enough-rows")]
    assert "nothing left to do" in invoke("resume", run.name).output

    # Done again, the phase is judged again: the acceptance spoke of the old result.
    assert invoke("resume", run.name, "--from", "calls").exit_code == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--accept", "calls:many-rows"], "has no failed hard gate 'many-rows'"),
        (["--accept", "calls:enough-row"], "did you mean enough-rows"),
        (["--accept", "calls"], "write it as PHASE:GATE"),
        (["--from", "cals"], "did you mean calls?"),
        (["--threads", "0"], "--threads 0"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(invoke: Invoke, finished: Path, words: list[str], said: str) -> None:
    refused = invoke("resume", "small_recipe", *words)
    assert refused.exit_code == 2 and said in refused.output


def test_a_fresh_base_is_made_once(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("run", SMALL, "--fresh", "--rows", 2).exit_code == 0
    run = tmp_path / "runs" / "small_recipe-rows-2-fresh-true"
    made = (run / "base" / "tokenizer.json").stat().st_mtime_ns
    assert invoke("run", SMALL, "--fresh", "--rows", 2, "--from", "words").exit_code == 0
    assert (run / "base" / "tokenizer.json").stat().st_mtime_ns == made
    assert not list(run.glob(".base.tmp*"))


def test_a_base_that_changed_means_that_all_is_made_again(invoke: Invoke, finished: Path, tmp_path: Path) -> None:
    card = tmp_path / "model" / "config.json"
    card.write_text(card.read_text().replace("gpt_oss", "gpt_oss "))
    done = invoke("run", SMALL)
    assert done.exit_code == 0 and "its inputs changed since it was begun" in done.output
    assert len(events(finished, "phase_started")) == 6


def test_a_missing_base_is_named(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "model" / "config.json").unlink()
    refused = invoke("run", SMALL)
    assert refused.exit_code == 2 and "base model 'model': there is no config.json" in refused.output


def test_a_second_process_is_told_who_holds_the_run(invoke: Invoke, tmp_path: Path) -> None:
    with RunLock(RunFolder(tmp_path / "runs" / "small_recipe")):
        refused = invoke("run", SMALL)
    assert refused.exit_code == 2 and f"held by process {os.getpid()} on" in refused.output
    assert invoke("run", SMALL).exit_code == 0


def test_sigterm_finishes_what_is_at_hand_and_the_run_can_be_resumed(invoke: Invoke, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "small_recipe-rows-400"
    command = [sys.executable, "-m", "posttrain", "run", SMALL, "--rows=400"]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not events(run, "phase_started"):
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    _, complaint = child.communicate(timeout=120)
    assert child.returncode == 4 and "stopped" in complaint
    assert [event["event"] for event in events(run, "stopped", "failed")] == ["stopped"]
    assert invoke("resume", run.name).exit_code == 0


def test_an_unforeseen_error_ends_with_a_short_message_and_a_logged_traceback(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMO_TOKEN", "very-secret-value")
    recipe = tmp_path / "small_recipe.py"
    recipe.write_text(Path(SMALL).read_text().replace('"language", "text"', '"very-secret-value", "text"'))
    failed = invoke("run", recipe)
    assert failed.exit_code != 0
    log = (tmp_path / "runs" / "small_recipe" / "logs" / "attempt-0001.log").read_text()
    assert "very-secret-value" not in log and "[redacted]" in log
