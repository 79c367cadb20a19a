"""`posttrain serve`: what it refuses before it listens, and what it prints."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from posttrain.cli import serve
from posttrain.cli.main import main
from tests.serve.soak import TOKEN, served


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "NEEDED", ("fastapi", "no_such_package"))
    refused = CliRunner().invoke(main, ["serve"])
    assert refused.exit_code == 5 and "needs no_such_package" in refused.output
    assert "pip install 'posttrain[serve]'" in refused.output


@pytest.mark.parametrize(
    ("words", "environment", "code", "said"),
    [
        (["--host", "0.0.0.0"], {}, 2, "set a token of your own in POSTTRAIN_TOKEN"),
        ([], {"POSTTRAIN_TOKEN": "short"}, 2, "at least 16"),
        (["--port", "0"], {"POSTTRAIN_DATABASE_URL": "mysql://host/name"}, 2, "'mysql' is not served"),
        (["--host", "192.0.2.1"], {"POSTTRAIN_TOKEN": TOKEN}, 5, "cannot listen at 192.0.2.1"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], environment: dict[str, str], code: int, said: str
) -> None:
    # `serve` takes them out of the environment.
    for name in ("POSTTRAIN_TOKEN", "POSTTRAIN_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused = CliRunner().invoke(main, ["serve", "--data-dir", str(tmp_path), *words])
    assert refused.exit_code == code and said in refused.output, refused.output


def test_the_printed_address_logs_in_and_a_taken_port_is_named(tmp_path: Path) -> None:
    with served(tmp_path) as url:
        with httpx.Client(base_url=url) as http:
            assert http.get("/api/runs").status_code == 401
            assert http.get(f"/api/runs?token={TOKEN}", follow_redirects=True).json()["data"] == []
        command = [sys.executable, "-m", "posttrain", "serve", "--port", url.rpartition(":")[2]]
        taken = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert taken.returncode == 5 and "choose another with --port" in taken.stderr


def test_a_token_is_made_for_a_start_and_the_way_through_a_tunnel_is_told(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("POSTTRAIN_TOKEN")}
    command = [sys.executable, "-m", "posttrain", "serve", "--port", "0", "--data-dir", str(tmp_path / "data")]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(4)]
    # Not SIGINT, which a shell's background jobs are born deaf to until the server listens for it.
    process.terminate()
    process.wait(30)
    token = said[1].rpartition("/?token=")[2].strip()
    port = said[1].partition("127.0.0.1:")[2].partition("/")[0]
    assert len(token) >= 32 and f"ssh -N -L {port}:127.0.0.1:{port} " in said[3]
