"""`posttrain doctor` against a hub of our own, full and read-only disks, and machines that lack things."""

import ctypes
import http.server
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import POSTTRAIN, environment, posttrain

GATED = "Salesforce/xlam-function-calling-60k"
TOKEN = "hf_" + "t" * 24
MS_RDONLY, MS_REMOUNT = 1, 32


@pytest.fixture
def hub() -> Iterator[tuple[str, set[str]]]:
    """A hub's address and the tokens that it accepts; one set is gated for everybody."""
    accepted = {TOKEN}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = (self.headers.get("Authorization") or "").removeprefix("Bearer ") in accepted
            if self.path == "/api/whoami-v2":
                self.answer(200 if known else 401, {"name": "me"})
            elif GATED in self.path:
                self.answer(403, {"error": "gated"}, "GatedRepo")
            elif "missing" in self.path:
                self.answer(404, {"error": "no"}, "RepoNotFound")
            else:
                self.answer(200, {})

        def answer(self, code: int, body: dict, error: str = "") -> None:
            self.send_response(code)
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *words: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", accepted
    server.shutdown()


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
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=2m"):
        pytest.skip("nothing may be mounted here")
    yield folder
    libc.umount2(os.fsencode(folder), 2)


def test_a_full_workspace(small_disk: Path, tmp_path: Path) -> None:
    (small_disk / "filling").write_bytes(bytes(2 * 2**20))
    code, checks, _ = doctor(POSTTRAIN_WORKSPACE=str(small_disk), HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    bad = [one for one in checks.values() if one["status"] == "failure"]
    assert code == 5 and any("No space left" in one["said"] for one in bad)
    assert any(str(small_disk) in one["said"] for one in bad)


def test_a_run_folder_on_a_read_only_disk(small_disk: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(b"tmpfs", os.fsencode(small_disk), b"tmpfs", MS_REMOUNT | MS_RDONLY, b"size=2m") == 0
    refused = posttrain("run", "smoke", "--runs-dir", str(small_disk / "runs"))
    assert refused.returncode == 5 and "Read-only file system" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_no_gpu_for_a_run_that_asks_for_one(tmp_path: Path) -> None:
    refused = posttrain("run", "smoke", "--gpu-ranks", "1", "--runs-dir", str(tmp_path), timeout=60)
    if "this machine has no GPU" not in refused.stderr:
        pytest.skip("this machine has a GPU")
    assert refused.returncode == 5 and "--gpu-ranks 1: there is no GPU 1" in refused.stderr
