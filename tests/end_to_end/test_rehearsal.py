"""`tui` itself on a toy GPT-OSS and rows in the true schemas, from a bare container to the report."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from posttrain.chat.tokenizer import Tokenizer
from posttrain.run.folder import ASSETS, RunFolder
from posttrain.run.journal import read_lines
from posttrain.run.lock import holder
from tests.data.hub_rows import write_hub
from tests.end_to_end.runs import POSTTRAIN, environment
from tests.end_to_end.test_detached import await_that
from tests.engine.toys import YARN, save_toy

GATED = "Salesforce/xlam-function-calling-60k"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy base with the tiny one's vocabulary, and a copy of the hub without the set that is gated."""
    folder = tmp_path_factory.mktemp("box")
    save_toy(folder / "toy", vocab_size=1024, max_position_embeddings=131072, rope_parameters=YARN | {"truncate": True})
    weights = load_file(folder / "toy" / "model.safetensors")
    # Answers end soon, at a token that the model's random states now often prefer.
    weights["lm_head.weight"][Tokenizer.load(ASSETS / "tiny_base").special("<|return|>")] *= 30
    save_file(weights, folder / "toy" / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (ASSETS / "tiny_base" / name).exists():
            shutil.copy(ASSETS / "tiny_base" / name, folder / "toy" / name)
    write_hub(folder / "hub", rows=60, without=(GATED,))
    (folder / "workspace").mkdir()
    (folder / "home").mkdir()
    return folder


def typed(place: Path, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """A command in the container: no token, no network, neither screen nor tmux."""
    bare = {name: value for name, value in environment().items() if not name.startswith(("HF_", "POSTTRAIN_CACHE"))}
    bare |= {
        "HOME": str(place / "home"),
        "HF_HUB_OFFLINE": "1",
        "POSTTRAIN_HUB_DIR": str(place / "hub"),
        "POSTTRAIN_WORKSPACE": str(place / "workspace"),
        "PATH": "/nonexistent",
    }
    return subprocess.run(
        [*POSTTRAIN, *words], env=bare | extra, cwd=place, capture_output=True, text=True, timeout=900
    )


TUI = (
    *("tui", "--base", "./toy", "--max-steps=1", "--batch-profile", "conservative", "--name", "box", "--device", "cpu"),
    *("--threads", "2", "--checkpoint-every-steps", "1", "--rollout-tokens", "32768"),
)


def events(place: Path) -> list[dict]:
    return list(read_lines(place / "runs" / "box" / "events.jsonl"))


def ended(place: Path) -> bool:
    return holder(RunFolder(place / "runs" / "box")) is None


def test_from_a_bare_container_to_the_report(place: Path) -> None:
    checked = typed(place, "doctor", *TUI)
    assert "hub token: no HF_TOKEN" in checked.stdout and "hf auth login" in checked.stdout
    assert f"access: {GATED}: HF_HUB_OFFLINE is set and there is no copy" in checked.stdout
    assert "neither screen nor tmux" in checked.stdout and "apt-get install -y screen" in checked.stdout
    planned = typed(place, "plan", *TUI)
    assert planned.returncode == 0 and "toy, 0.3M parameters" in planned.stdout, planned.stdout + planned.stderr

    begun = typed(place, "start", *TUI)
    assert begun.returncode == 0 and "goes on in a session of its own" in begun.stdout, begun.stderr
    # Killed in its first training phase.
    await_that(lambda: any(one.get("phase") == "tool_sft" for one in events(place)), 240)
    owner = holder(RunFolder(place / "runs" / "box"))
    assert owner is not None
    os.kill(owner.pid, signal.SIGKILL)
    await_that(lambda: ended(place))

    # Random weights do not pass the seed's gate.
    barred = typed(place, "resume", "box")
    assert barred.returncode == 3, barred.stderr
    assert "loss is" in barred.stderr and "must be <= 2" in barred.stderr
    assert "posttrain resume box --accept tool_sft:loss" in barred.stderr
    log = (place / "runs" / "box" / "logs" / "attempt-0001.log").read_text()
    assert f"{GATED}" in log and "going on without it" in log
    accepts = ["--accept", "tool_sft:loss"]
    for gate in (["merge:smoke_ok"], ["agent_sft:loss"]):
        barred = typed(place, "resume", "box", *accepts)
        if barred.returncode == 0:
            break
        assert barred.returncode == 3, barred.stderr
        accepts = ["--accept", *gate]
    else:
        barred = typed(place, "resume", "box", *accepts)
    assert barred.returncode == 0, barred.stdout + barred.stderr

    run = place / "runs" / "box"
    assert (run / "report.html").exists() and list(run.glob("phases/export/exports/hf/*.safetensors"))
    assert list(run.glob("phases/export/exports/gguf/*.gguf"))
    results = {path.parent.name: json.loads(path.read_text()) for path in run.glob("phases/*/result.json")}
    # The profile's numbers are what was done: 48 rows of 8192 tokens, 24 of 32768, 32 pairs, 16 groups of 4.
    assert results["grpo"]["counts"]["episodes"] == 16 * 4
    assert results["preference"]["counts"]["pairs_read"] == 32
    assert results["data"]["counts"]["tool_calls.unavailable"] == 1
    rebuilt = typed(place, "report", "box")
    assert rebuilt.returncode == 0
    again = typed(place, "start", "box")
    assert again.returncode == 0 and "nothing left to do" in again.stdout


def test_grpo_left_out_says_so_in_its_result_and_prepared_data_serves_a_second_run(place: Path) -> None:
    words = [*TUI[:-6], "--name=second", "--no-grpo", "--skip-data", "--from=data"]
    first = typed(place, "run", *words[:-1])
    assert first.returncode == 3, first.stdout + first.stderr
    assert "data: done" in first.stdout
    none = typed(place, "run", *words[:-1], "--seed", "7", POSTTRAIN_CACHE_DIR=str(place / "empty"))
    assert none.returncode == 2
