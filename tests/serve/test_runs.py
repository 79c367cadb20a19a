"""Runs over HTTP: one is started, stopped, held by somebody else, resumed, read, ranked and registered."""

import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from posttrain.run.folder import RunFolder, digest_file
from posttrain.run.lock import RunLock
from posttrain.serve.app import make_app
from posttrain.serve.settings import Settings
from tests.pipeline.command import posttrain
from tests.serve.conftest import Client
from tests.serve.serving import TOKEN, settings_at
from tests.serve.test_datasets import BUILD

EXECUTION = {"threads": 1}


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Settings]]:
    """One server for the tests of this file, which follow each other."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_REGISTRY", str(folder / "datasets"))
        settings = settings_at(folder)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with TestClient(make_app(settings), raise_server_exceptions=False, headers=headers) as client:
            yield client, settings


@pytest.fixture(scope="module")
def smoke(at: tuple[Client, Settings]) -> str:
    """Started, stopped in its middle, resumed, and at its end."""
    client, settings = at
    asked = {"recipe": "smoke", "flags": {"seed": 3}, "execution": EXECUTION}
    started = client.post("/api/runs", json=asked)
    assert started.status_code == 201 and started.json()["name"] == "smoke-seed-3", started.text
    assert client.post("/api/runs", json=asked).status_code == 409
    until(lambda: client.get("/api/runs/smoke-seed-3").json()["completed"])
    stopped = client.post("/api/runs/smoke-seed-3/cancel")
    assert stopped.status_code == 202 and stopped.json()["stopping"] is True
    until(lambda: client.get("/api/runs/smoke-seed-3").json()["state"] != "running")
    assert client.get("/api/runs/smoke-seed-3/status").json()["state"] == "stopped"
    idle = client.post("/api/runs/smoke-seed-3/cancel")
    assert idle.status_code == 200 and idle.json()["stopping"] is False
    _held_elsewhere(client, settings)
    resumed = client.post("/api/runs/smoke-seed-3/resume")
    assert resumed.status_code == 202, resumed.text
    return "smoke-seed-3"


def _held_elsewhere(client: Client, settings: Settings) -> None:
    run = RunFolder(settings.runs_dir / "smoke-seed-3")
    with RunLock(run) as lock:
        lock.path.write_text(json.dumps({"pid": 1, "host": f"not-{platform.node()}", "since": 0.0}))
        for path in ("resume", "cancel"):
            refused = client.post(f"/api/runs/smoke-seed-3/{path}")
            assert refused.status_code == 409 and f"process 1 on not-{platform.node()}" in refused.json()["detail"]


def until(reached: Callable[[], Any], within_s: float = 120.0) -> None:
    deadline = time.monotonic() + within_s
    while not reached():
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.2)


def events(client: Client, path: str, **headers: str) -> list[tuple[str, str | None, Any]]:
    """Name, id and data; the answer is there once the run has ended."""
    answer = client.get(path, headers=headers)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and line[0] != ":")
        if "data" in fields:
            found.append((fields["event"], fields.get("id"), json.loads(fields["data"])))
    return found


def test_the_log_is_followed_to_the_end_and_goes_on_where_it_was_lost(at: tuple[Client, Settings], smoke: str) -> None:
    client, settings = at
    heard = events(client, f"/api/runs/{smoke}/logs")
    assert [name for name, _, _ in heard[-1:]] == ["end"] and heard[-1][2] == {"state": "finished"}
    logs = sorted((settings.runs_dir / smoke / "logs").glob("attempt-*.log"))
    said = "".join(data["text"] for name, _, data in heard if name == "log")
    # Where the resumed run had not begun its log yet, the first one's came before it.
    assert len(logs) == 2 and said in (logs[-1].read_text(), "".join(log.read_text() for log in logs))
    rest = events(client, f"/api/runs/{smoke}/logs", **{"Last-Event-ID": "1:0"})
    whole = "".join(data["text"] for name, _, data in rest if name == "log")
    assert whole == "".join(log.read_text() for log in logs)
    last = next(identity for name, identity, _ in reversed(heard) if name == "log")
    assert [name for name, _, _ in events(client, f"/api/runs/{smoke}/logs", **{"Last-Event-ID": str(last)})] == ["end"]
    assert client.get(f"/api/runs/{smoke}/logs", headers={"Last-Event-ID": "x"}).status_code == 422
    assert client.get("/api/runs/none/logs").status_code == 404


def test_status_and_list_say_what_the_command_says(at: tuple[Client, Settings], smoke: str) -> None:
    client, settings = at
    told = client.get(f"/api/runs/{smoke}/status").json()
    assert (told["state"], told["recipe"], told["flags"]["seed"], told["seed"]) == ("finished", "smoke", 3, 3)
    assert {phase["status"] for phase in told["phases"]} <= {"complete", "skipped"} and told["run_id"]
    assert smoke in [run["name"] for run in client.get("/api/runs").json()["data"]]
    made = json.loads((settings.runs_dir / smoke / "run.json").read_text())["created_at"]
    assert told["created"] == datetime.fromisoformat(made).timestamp()
    said = posttrain("status", smoke, "--runs-dir", settings.runs_dir, cwd=settings.runs_dir).stdout
    for phase in told["phases"]:
        assert phase["name"] in said


def test_metrics_are_the_raw_ones(at: tuple[Client, Settings], smoke: str) -> None:
    client, settings = at
    text = (settings.runs_dir / smoke / "phases" / "tool_sft" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert client.get(f"/api/runs/{smoke}/metrics").json()["phases"]["tool_sft"] == rows
    part = client.get(f"/api/runs/{smoke}/metrics?phase=tool_sft&after_step=1&limit=2").json()
    wanted = [row for row in rows if row["step"] > 1]
    assert part == {"phases": {"tool_sft": wanted[:2]}, "more": ["tool_sft"] if len(wanted) > 2 else []}
    assert client.get(f"/api/runs/{smoke}/metrics?phase=none").status_code == 404


def test_artifacts_are_listed_with_digests_and_nothing_else_is_given(at: tuple[Client, Settings], smoke: str) -> None:
    client, settings = at
    folder = settings.runs_dir / smoke
    (settings.runs_dir / "secret").write_text("secret")
    (folder / "link").symlink_to(settings.runs_dir / "secret")
    (folder / "folder").symlink_to(settings.runs_dir)
    listed = {one["path"]: one for one in client.get(f"/api/runs/{smoke}/artifacts").json()["artifacts"]}
    path = "phases/tool_sft/final/adapter_model.safetensors"
    assert listed[path]["sha256"] == digest_file(folder / path) and listed["report.html"]["bytes"] > 0
    assert "link" not in listed and "folder/secret" not in listed
    given = client.get(f"/api/runs/{smoke}/artifacts/{path}")
    assert given.content == (folder / path).read_bytes()
    for wrong in (
        "%2e%2e/secret",
        "link",
        "folder/secret",
        "phases",
        "%2fetc%2fpasswd",
        "x%00",
        "phases/%2e%2e/report.md",
    ):
        assert client.get(f"/api/runs/{smoke}/artifacts/{wrong}").status_code == 404, wrong


def test_the_leaderboard_ranks_what_was_asked_alike(at: tuple[Client, Settings], smoke: str) -> None:
    client, _ = at
    entries = client.get("/api/evaluations/leaderboard", params={"dataset": "tools"}).json()
    of_run = [entry for entry in entries if entry["run"] == smoke]
    assert {"eval_base", "eval_grpo"} <= {entry["evaluation"].split("/")[1] for entry in of_run}
    for one, two in itertools.pairwise(entries):
        if (one["dataset"], one["dataset_digest"]) == (two["dataset"], two["dataset_digest"]):
            assert one["score"] >= two["score"] and two["rank"] == one["rank"] + 1
    assert client.get("/api/evaluations/leaderboard?dataset=none").json() == []


def test_a_registered_version_is_a_model_state_by_digest(at: tuple[Client, Settings], smoke: str) -> None:
    client, settings = at
    assert client.post("/api/models", json={"name": "caller", "description": "calls tools"}).status_code == 201
    assert client.post("/api/models", json={"name": "caller"}).status_code == 409
    first = client.post("/api/models/caller/versions", json={"run": smoke, "phase": "tool_sft", "version": "first"})
    assert first.status_code == 201, first.text
    result = json.loads((settings.runs_dir / smoke / "phases" / "tool_sft" / "result.json").read_text())
    assert first.json()["sha256"] == result["state"]["adapter_digest"] and first.json()["bytes"] > 0
    again = client.post("/api/models/caller/versions", json={"run": smoke, "version": "first"})
    assert again.status_code == 409 and "version 'first' already" in again.json()["detail"]
    numbered = client.post("/api/models/caller/versions", json={"run": smoke}).json()
    assert (numbered["version"] == "v2" and numbered["phase"] in result["state"]["phase"]) or numbered["phase"]
    listed = client.get("/api/models").json()
    assert (
        [one["version"] for one in listed[0]["versions"]]
        == ["first", "v2"]
        == [one["version"] for one in client.get("/api/models/caller").json()["versions"]]
    )
    assert client.get("/api/models/caller/versions/first").json()["fault"] is None
    weights = settings.runs_dir / smoke / "phases" / "tool_sft" / "final" / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + b"x")
    try:
        assert "was changed" in client.get("/api/models/caller/versions/first").json()["fault"]
        refused = client.post("/api/models/caller/versions", json={"run": smoke, "phase": "tool_sft"})
        assert refused.status_code == 409 and "was changed" in refused.json()["detail"]
    finally:
        weights.write_bytes(kept)
    wrong = ({"run": "none"}, {"run": smoke, "phase": "data"}, {"run": smoke, "phase": "../x"}, {"run": "../x"})
    assert [client.post("/api/models/caller/versions", json=one).status_code for one in wrong] == [404, 409, 422, 422]
    assert client.get("/api/models/none").status_code == client.get("/api/models/caller/versions/x").status_code == 404


def test_the_seeds_quick_start_to_its_report(at: tuple[Client, Settings]) -> None:
    """Generate, build, export, train, evaluate before and after, report; a few steps of the tiny base."""
    client, settings = at
    asked = {"count": 100, "seed": 42, "persist": True}
    assert client.post("/api/ungar/high-card-duel/generate", json=asked).status_code == 201
    built = client.post("/api/datasets/build", json=BUILD).json()
    exported = client.get("/api/datasets/hcd_baseline-v1/export.jsonl?format=tunix_sft").text
    assert len(exported.splitlines()) == built["trace_count"] == 100
    flags = {"quick_test": True, "dataset_key": built["dataset"], "evaluation": "world:duel_traces"}
    flags |= {"steps": 3, "samples_per_step": 4, "cases": 4}
    body = {"recipe": "trace_sft", "name": "my_run", "flags": flags, "execution": EXECUTION}
    started = client.post("/api/runs", json=body)
    assert started.status_code == 201, started.text
    assert events(client, "/api/runs/my_run/logs")[-1][2] == {"state": "finished"}
    told = client.get("/api/runs/my_run").json()
    assert told["flags"]["dataset_key"] == "hcd_baseline@v1" and told["git_sha"] and told["seed"] == 0
    board = client.get("/api/evaluations/leaderboard?dataset=questions").json()
    assert {entry["evaluation"] for entry in board} >= {"my_run/eval_before", "my_run/eval_after"}
    assert r"eval\_after" in client.get("/api/runs/my_run/artifacts/report.md").text
    words = ("report", "--before", "my_run/eval_before", "--after", "my_run/eval_after")
    report = posttrain(*words, "--runs-dir", settings.runs_dir, "--output", "delta_report.md", cwd=settings.runs_dir)
    assert report.returncode == 0, report.stderr
    assert "4" in Path(settings.runs_dir / "delta_report.md").read_text()


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        ({"recipe": "smok"}, 404, "did you mean smoke"),
        ({"recipe": "../x.py"}, 404, "there is no recipe"),
        ({"recipe": "smoke", "flags": {"sed": 1}}, 422, "did you mean seed"),
        ({"recipe": "smoke", "flags": {"seed": "1"}}, 422, "is str, not int"),
        ({"recipe": "smoke", "flags": {"seed": True}}, 422, "is bool, not int"),
        ({"recipe": "smoke", "name": "../x"}, 422, "name"),
        ({"recipe": "smoke", "execution": {"thread": 1}}, 422, "did you mean threads"),
        ({"recipe": "smoke", "execution": {"threads": 0}}, 422, "greater than"),
        ({"recipe": "smoke", "execution": {"sandbox": "off"}}, 422, "not taken from a request"),
        ({"recipe": "smoke", "execution": {"sampler_url": "http://10.0.0.1"}}, 422, "not taken from a request"),
        ({"recipe": "trace_sft", "flags": {"base": "/etc"}}, 422, "lies outside"),
        ({"recipe": "trace_sft", "flags": {"evaluation": "~/x.jsonl"}}, 422, "lies outside"),
        ({"recipe": "trace_sft", "flags": {"chat": "chatml"}}, 422, "is none of gemma"),
        ({"recipe": "smoke", "more": 1}, 422, "not permitted"),
    ],
)
def test_a_start_that_cannot_be_is_refused(
    at: tuple[Client, Settings], asked: dict[str, Any], status: int, said: str
) -> None:
    client, settings = at
    before = sorted(settings.runs_dir.glob("*")) if settings.runs_dir.exists() else []
    refused = client.post("/api/runs", json=asked)
    assert refused.status_code == status and said in refused.json()["detail"], refused.text
    assert (sorted(settings.runs_dir.glob("*")) if settings.runs_dir.exists() else []) == before


def test_a_resume_that_cannot_be_is_refused(at: tuple[Client, Settings], smoke: str) -> None:
    client, _ = at
    assert client.post("/api/runs/none/resume").status_code == 404
    assert client.post("/api/runs/UPPER/resume").status_code == 422
    for wrong in ({"redo_from": "--x"}, {"accept": ["no-colon"]}, {"more": 1}):
        assert client.post(f"/api/runs/{smoke}/resume", json=wrong).status_code == 422
    assert client.post(f"/api/runs/{smoke}/resume").status_code == 202
