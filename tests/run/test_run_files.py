"""Lock, redaction, log, manifest and names of runs."""

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from posttrain.errors import RunFolderError
from posttrain.recipe.types import Execution
from posttrain.recipes.trace_sft import trace_sft
from posttrain.run import manifest
from posttrain.run.attempt_log import AttemptLog, log_path
from posttrain.run.folder import RunFolder
from posttrain.run.journal import Journal
from posttrain.run.lock import RunLock, holder
from posttrain.run.redaction import redact, redact_json


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "UPPER", "a" * 65, "a\n", "-x"])
def test_run_names_that_are_no_plain_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="--name"):
        RunFolder.named(tmp_path, name)


def test_the_lock_is_held_by_one_and_freed_by_death(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "mine")
    assert holder(run) is None
    code = (
        "import sys,time;from pathlib import Path;from posttrain.run.lock import RunLock;"
        "from posttrain.run.folder import RunFolder\n"
        "with RunLock(RunFolder(Path(sys.argv[1]))): print('held', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match=f"held by process {child.pid} on "), RunLock(run):
            pass
        assert f"process {child.pid} on" in str(holder(run))
    finally:
        child.kill()
        child.communicate()
    with RunLock(run):
        assert f"process {os.getpid()} on" in str(holder(run))
    assert holder(run) is None


def test_secrets_are_taken_out_by_value_and_by_look() -> None:
    environment = {"HF_TOKEN": "abcdefgh1234", "MY_API_KEY": "zyxwvuts9876", "PATH": "/usr/bin/env", "SHORT_KEY": "abc"}
    text = "abcdefgh1234 zyxwvuts9876 /usr/bin/env abc hf_ABCDEFGHIJKLMNOP sk-proj-12345678 Bearer aaaaaaaaaa"
    assert redact(text, environment) == "[redacted] [redacted] /usr/bin/env abc [redacted] [redacted] Bearer [redacted]"
    assert redact("a task-specific sky, hf_hub, half_a", {}) == "a task-specific sky, hf_hub, half_a"


def test_logs_and_manifests_are_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "abcdefgh1234")
    log = AttemptLog(tmp_path / "log")
    log.write("\x1b[31mwith abcdefgh1234\x1b[0m\nand more")
    log.close()
    assert [line[9:] for line in (tmp_path / "log").read_text().splitlines()] == ["with [redacted]", "and more"]
    assert redact_json({"a": ["abcdefgh1234", 1]}) == {"a": ["[redacted]", 1]}


def test_attempts_are_numbered_and_keep_their_execution(tmp_path: Path) -> None:
    run, recipe = RunFolder(tmp_path / "mine"), trace_sft(seed=1, dataset_key="duels@v1", evaluation="asked@v2")
    assert manifest.begin_attempt(run, recipe, "trace_sft", Execution(threads=3), {"cpu": "x"}) == 1
    manifest.end_attempt(run, 1, "stopped")
    assert manifest.begin_attempt(run, recipe, "trace_sft", Execution(), {"cpu": "x"}) == 2
    stored = json.loads(run.manifest.read_text())
    assert [(one["outcome"], one["execution"]["threads"]) for one in stored["attempts"]] == [("stopped", 3), (None, 2)]
    assert stored["packages"]["torch"] and stored["seed"] == 1 and len(stored["run_id"]) == 32
    assert (stored["recipe"], stored["dataset_key"]) == ("trace_sft", "duels@v1")
    assert stored["training_config"] == recipe.flags and stored["artifacts_path"] == str(run.path)
    assert datetime.fromisoformat(stored["created_at"]).tzinfo is not None and "git_sha" in stored
    assert log_path(run, 2).name == "attempt-0002.log"


def test_versions_are_read_without_importing() -> None:
    code = (
        "import sys; from posttrain.run.manifest import package_versions; package_versions();"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


def test_a_torn_line_stays_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "events.jsonl")
    journal.write("first")
    with open(journal.path, "ab") as file:
        file.write(b'{"event": "to')
    assert [event["event"] for event in journal.read()] == ["first"]
    journal.write("second")
    assert [event["event"] for event in journal.read()] == ["first", "second"]
