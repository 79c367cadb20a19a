"""Messages at the end of a run, against a server and a command of our own."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.host import notify
from posttrain.host.notify import Message, send

MESSAGE = Message("r1", "failed", 1, "phase 'train' hf_abcdefghijklmnop")


@pytest.fixture
def hook() -> Iterator[tuple[str, list[dict], list[int]]]:
    """A webhook's address, what it was sent, and the codes it answers, one after another."""
    sent: list[dict] = []
    codes: list[int] = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(codes.pop(0) if codes else 200)
            self.end_headers()

        def log_message(self, *words: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", sent, codes
    server.shutdown()


def test_a_webhook_is_told_without_secrets(hook: tuple[str, list[dict], list[int]]) -> None:
    url, sent, _ = hook
    assert send(url, MESSAGE) is None
    assert sent[0]["run"] == "r1" and sent[0]["outcome"] == "failed" and sent[0]["exit_code"] == 1
    assert "hf_" not in sent[0]["content"] and sent[0]["text"].startswith("posttrain run r1: failed.")


def test_a_webhook_that_stumbles_is_asked_again_and_one_that_refuses_is_not(
    hook: tuple[str, list[dict], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify.time, "sleep", lambda seconds: None)
    url, sent, codes = hook
    codes += [503, 200]
    assert send(url, MESSAGE) is None and len(sent) == 2
    codes += [404]
    assert send(url, MESSAGE) == "the webhook answered 404" and len(sent) == 3
    assert "cannot be reached" in str(send("http://127.0.0.1:9", MESSAGE))


def test_a_command_reads_the_message_and_gets_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    assert send(f"cat > {tmp_path}/said; env > {tmp_path}/environment", MESSAGE) is None
    assert json.loads((tmp_path / "said").read_text())["outcome"] == "failed"
    assert "HF_TOKEN" not in (tmp_path / "environment").read_text()
    assert send("echo no >&2; exit 3", MESSAGE) == "the command ended with 3: no"
