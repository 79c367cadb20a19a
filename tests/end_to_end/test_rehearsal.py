"""`tui` itself on a toy GPT-OSS and rows in the true schemas, from a bare container to the report."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from posttrain.chat.tokenizer import Tokenizer
from posttrain.run.folder import ASSETS, RunFolder
from posttrain.run.journal import read_lines
from posttrain.run.lock import holder
from tests.data.hub_rows import write_hub
from tests.data.sources import FIXTURES
from tests.end_to_end.disks import small_disk
from tests.end_to_end.hub import GATED, gated_hub
from tests.end_to_end.runs import POSTTRAIN, environment
from tests.end_to_end.test_detached import await_that
from tests.engine.toys import YARN, save_toy

TUI = ("tui", "--base", "./toy", "--device", "cpu", "--threads", "1", "--max-steps=1")
WHOLE = (*TUI, "--batch-profile", "conservative", "--name", "box", "--task-file", "tasks.jsonl")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy base with the tiny one's vocabulary, and a copy of the hub without the set that is gated."""
    folder = tmp_path_factory.mktemp("box")
    save_toy(folder / "toy", vocab_size=1024, max_position_embeddings=131072, rope_parameters=YARN)
    weights = load_file(folder / "toy" / "model.safetensors")
    # Random states now often prefer the token that ends an answer, so that no answer takes long.
    weights["lm_head.weight"][Tokenizer.load(ASSETS / "tiny_base").special("<|return|>")] *= 30
    save_file(weights, folder / "toy" / "model.safetensors", metadata={"format": "pt"})
    for file in (ASSETS / "tiny_base").iterdir():
        if file.is_file() and not (folder / "toy" / file.name).exists():
            shutil.copy(file, folder / "toy")
    write_hub(folder / "hub", rows=60, without=(GATED,))
    shutil.copy(FIXTURES / "code_tasks.jsonl", folder / "tasks.jsonl")
    (folder / "workspace").mkdir()
    (folder / "home").mkdir()
    return folder


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with gated_hub(set()) as url:
        yield url


def typed(place: Path, hub: str, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """A command in the container: no token, neither screen nor tmux, and a hub that refuses the gated set."""
    kept = {name: value for name, value in environment().items() if not name.startswith(("HF_", "POSTTRAIN_CACHE"))}
    bare = {
        "HOME": str(place / "home"),
        "HF_ENDPOINT": hub,
        "POSTTRAIN_HUB_DIR": str(place / "hub"),
        "POSTTRAIN_WORKSPACE": str(place / "workspace"),
        "PATH": "/nonexistent",
    }
    done = subprocess.run(
        [*POSTTRAIN, *words], env=kept | bare | extra, cwd=place, capture_output=True, text=True, timeout=600
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done


def results(run: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in run.glob("phases/*/result.json")}


def phase_begun(run: Path, phase: str) -> bool:
    return any(event.get("phase") == phase for event in read_lines(run / "events.jsonl"))


def test_from_a_bare_container_to_the_report(place: Path, hub: str) -> None:
    run = place / "runs" / "box"
    checked = typed(place, hub, "doctor", *TUI)
    assert "hub token: no HF_TOKEN" in checked.stdout and "hf auth login" in checked.stdout
    assert f"access: {GATED}" in checked.stdout
    assert f"accept the terms on https://huggingface.co/datasets/{GATED}" in checked.stdout
    assert "neither screen nor tmux" in checked.stdout and "apt-get install -y screen" in checked.stdout
    planned = typed(place, hub, "plan", *WHOLE)
    assert planned.returncode == 0 and "./toy, 0.3M parameters" in planned.stdout, planned.stdout + planned.stderr

    begun = typed(place, hub, "start", *WHOLE)
    assert begun.returncode == 0 and "goes on in a session of its own" in begun.stdout, begun.stderr
    await_that(lambda: phase_begun(run, "tool_sft"), 240)
    owner = holder(RunFolder(run))
    assert owner is not None
    os.kill(owner.pid, signal.SIGKILL)
    await_that(lambda: holder(RunFolder(run)) is None)
    assert f"{GATED}" in (said := (run / "logs" / "session.log").read_text()) and "going on without it" in said

    # Random weights pass the seed's gate on neither loss; each is accepted by its name.
    barred = typed(place, hub, "resume", "box")
    for phase, limit in (("tool_sft", "2"), ("agent_sft", "1.8")):
        assert barred.returncode == 3, barred.stdout + barred.stderr
        assert f"must be <= {limit}" in barred.stderr
        assert f"posttrain resume box --accept {phase}:loss" in barred.stderr
        barred = typed(place, hub, "resume", "box", "--accept", f"{phase}:loss")
    assert barred.returncode == 0, barred.stdout + barred.stderr

    made = results(run)
    # The profile's numbers are what was done: rows of 48 × 8192 and 24 × 32768 tokens, 32 pairs, 16 groups of 4.
    for phase, row_tokens in (("tool_sft", 48 * 8192), ("agent_sft", 24 * 32768)):
        [step] = read_lines(run / "phases" / phase / "metrics.jsonl")
        assert step["tokens"] == pytest.approx(step["fill"] * row_tokens) and step["fill"] > 0.7
    episodes = list(read_lines(run / "phases" / "grpo" / "samples.jsonl"))
    assert len(episodes) == made["grpo"]["counts"]["episodes"] == 16 * 4
    # Recorded calls and tasks of one's own, each with the parts of its world.
    assert {"exact" in one["parts"] for one in episodes if "solution.py" not in one["prompt"]} == {True}
    assert {one["score"] for one in episodes if "solution.py" in one["prompt"]} == {-1.0}
    assert made["data"]["counts"]["tool_calls.unavailable"] == 1
    assert list(run.glob("phases/export/exports/hf/*.safetensors"))
    assert list(run.glob("phases/export/exports/gguf-auto/*.gguf"))
    (run / "report.html").unlink()
    rebuilt = typed(place, hub, "report", "box")
    assert rebuilt.returncode == 0 and "accepted" in (run / "report.md").read_text() and (run / "report.html").exists()
    again = typed(place, hub, "start", "box")
    assert again.returncode == 0 and "nothing left to do" in again.stdout


def test_a_full_workspace_ends_a_run_with_what_to_free(place: Path, hub: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "workspace") as full:
        (full / "filling").write_bytes(bytes(2 * 2**20 - 2**16))
        words = ("run", *TUI, "--quick-test", "--name", "full")
        ended = typed(place, hub, *words, POSTTRAIN_WORKSPACE=str(full))
        assert ended.returncode == 5, ended.stdout + ended.stderr
        assert "the disk is full" in ended.stderr and str(full) in ended.stderr
        assert "posttrain resume full" in ended.stderr
        (full / "filling").unlink()


def test_grpo_that_is_left_out_says_so_and_prepared_data_serves_a_second_run(place: Path, hub: str) -> None:
    words = ("run", *TUI, "--quick-test", "--no-grpo")
    first = typed(place, hub, *words, "--name=first")
    assert first.returncode == 0, first.stdout + first.stderr
    made = results(place / "runs" / "first")
    assert made["grpo"]["notes"] == ["skipped: --no-grpo was given"]
    assert made["grpo"]["state"] == made["preference"]["state"]
    none = typed(place, hub, *words, "--name=none", "--skip-data", POSTTRAIN_CACHE_DIR=str(place / "none"))
    assert none.returncode == 2 and "--skip-data was given" in none.stderr
    second = typed(place, hub, *words, "--name=second", "--skip-data")
    assert second.returncode == 0, second.stdout + second.stderr
    shards = [
        place / "runs" / name / "phases" / "data" / "data" / "agent" / "tokens.npy" for name in ("first", "second")
    ]
    assert shards[0].samefile(shards[1])
