"""`posttrain doctor` against a hub of our own, full and read-only disks, and machines that lack things."""

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.disks import make_read_only, small_disk
from tests.end_to_end.hub import GATED, gated_hub
from tests.end_to_end.runs import POSTTRAIN, environment, posttrain

TOKEN = "hf_" + "t" * 24


@pytest.fixture
def hub() -> Iterator[tuple[str, set[str]]]:
    """A hub's address and the tokens that it accepts."""
    accepted = {TOKEN}
    with gated_hub(accepted) as url:
        yield url, accepted


def doctor(*words: str, **extra: str) -> tuple[int, dict[str, dict[str, Any]], str]:
    """Exit code, checks by name, and everything that was printed."""
    kept = {name: value for name, value in environment().items() if not name.startswith("HF_")}
    done = subprocess.run(
        [*POSTTRAIN, "doctor", *words, "--json"], env=kept | extra, capture_output=True, text=True, timeout=180
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, {one["name"]: one for one in json.loads(done.stdout)["checks"]}, done.stdout + done.stderr


def test_each_gated_set_is_asked_for_and_every_line_says_how_to_mend_it(
    hub: tuple[str, set[str]], tmp_path: Path
) -> None:
    url, _ = hub
    code, checks, printed = doctor(
        "tui", "--runs-dir", str(tmp_path), HF_ENDPOINT=url, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path)
    )
    assert checks["hub token"]["said"] == "found (HF_TOKEN), accepted by the hub" and TOKEN not in printed
    gated = checks[f"access: {GATED}"]
    # The recipe lets this one be missing.
    assert gated["status"] == "warning" and "the run goes on without it" in gated["said"]
    assert gated["mend"] == f"accept the terms on https://huggingface.co/datasets/{GATED}"
    assert checks["access: glaiveai/glaive-function-calling-v2"]["status"] == "ok"
    assert checks["access: openai/gpt-oss-20b"]["status"] == "ok"
    assert {f"toolchain: {name}" for name in ("python", "rust", "typescript", "go")} <= checks.keys()
    assert {"torch", "GPU", "sandbox", "detached sessions", "port 8000", "workspace"} <= checks.keys()
    assert all(one["mend"] for one in checks.values() if one["status"] != "ok")
    # A laptop has no room for this base: that is a failure, with what to change.
    assert code == 5 and checks["memory"]["status"] == "failure" and "its largest part is" in checks["memory"]["said"]


def test_a_revoked_token_is_said(hub: tuple[str, set[str]], tmp_path: Path) -> None:
    url, accepted = hub
    accepted.clear()
    code, checks, printed = doctor(HF_ENDPOINT=url, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path))
    assert code == 5 and checks["hub token"]["status"] == "failure"
    assert "revoked or mistyped" in checks["hub token"]["said"] and "hf auth login" in checks["hub token"]["mend"]
    assert TOKEN not in printed


def test_a_bare_container(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        _, checks, _ = doctor("--port", str(port), HOME=str(tmp_path), HF_HUB_OFFLINE="1", PATH="/nonexistent")
    assert checks["hub token"]["status"] == "warning" and "hf auth login" in checks["hub token"]["mend"]
    assert checks["detached sessions"]["mend"] == "apt-get install -y screen"
    assert checks["GPU"]["status"] == "warning" and checks["toolchain: go"]["mend"].startswith("apt-get install golang")
    assert checks[f"port {port}"]["status"] == "warning"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


def test_a_full_workspace(disk: Path, tmp_path: Path) -> None:
    (disk / "filling").write_bytes(bytes(2 * 2**20))
    code, checks, _ = doctor(POSTTRAIN_WORKSPACE=str(disk), HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    bad = [one for one in checks.values() if one["status"] == "failure"]
    assert code == 5 and any("No space left" in one["said"] for one in bad)
    assert any(str(disk) in one["said"] for one in bad)


def test_a_run_folder_on_a_read_only_disk(disk: Path) -> None:
    make_read_only(disk)
    refused = posttrain("run", "smoke", "--runs-dir", str(disk / "runs"))
    assert refused.returncode == 5 and "Read-only file system" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_no_gpu_for_a_run_that_asks_for_one(tmp_path: Path) -> None:
    refused = posttrain("run", "smoke", "--gpu-ranks", "1", "--runs-dir", str(tmp_path), timeout=60)
    if "this machine has no GPU" not in refused.stderr:
        pytest.skip("this machine has a GPU")
    assert refused.returncode == 5 and "--gpu-ranks 1: there is no GPU 1" in refused.stderr
