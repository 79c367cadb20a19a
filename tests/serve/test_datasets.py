"""Datasets over HTTP, and the seed's first steps as they are written there: generate, build, export."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from posttrain.chat.gemma import read_tunix_sft
from posttrain.serve.settings import Settings
from tests.pipeline.command import posttrain
from tests.serve.conftest import Client
from tests.serve.test_traces import TRACE, add

BUILD = {
    "dataset_name": "hcd_baseline",
    "dataset_version": "v1",
    "filters": {"source": "ungar", "game": "high_card_duel"},
    "limit": 100,
    "selection_strategy": "latest",
}


def lines(client: Client, path: str) -> list[dict[str, Any]]:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


def test_the_seeds_quick_start_up_to_the_export(either: Client, settings: Settings) -> None:
    add(either)
    generated = either.post("/api/ungar/high-card-duel/generate", json={"count": 100, "seed": 42, "persist": True})
    assert generated.status_code == 201
    built = either.post("/api/datasets/build", json=BUILD)
    assert built.status_code == 201, built.text
    told = built.json()
    assert (told["dataset_key"], told["trace_count"], told["matching"]) == ("hcd_baseline-v1", 100, 100)
    assert Path(told["manifest_path"]).is_file()
    rows = lines(either, "/api/datasets/hcd_baseline-v1/export.jsonl?format=tunix_sft")
    assert [row["id"] for row in rows] == generated.json()["trace_ids"]
    for row in rows:
        assert set(row) == {"id", "prompts", "final_answer", "metadata"}
        assert read_tunix_sft(row["prompts"]).messages[-1].content == row["final_answer"]
    assert {row["final_answer"] for row in rows} == {"fold", "call", "raise"}


def test_a_manifest_says_what_was_asked_and_what_is_in_it(client: Client) -> None:
    client.post("/api/ungar/high-card-duel/generate", json={"count": 5})
    asked = BUILD | {"provenance": {"by": "test"}, "session_id": "s1", "limit": 3}
    built = client.post("/api/datasets/build", json=asked).json()
    told = client.get("/api/datasets/hcd_baseline-v1/manifest").json()
    assert told["request"] == asked | {"selection_strategy": "latest"} or told["request"].items() <= asked.items()
    assert (told["dataset_key"], told["build_id"], told["trace_count"]) == ("hcd_baseline-v1", built["build_id"], 3)
    assert len(told["trace_ids"]) == 3 and told["schema_version"] == 1 and told["created_at"]
    assert told["statistics"]["steps"] == {"min": 4, "mean": 4.0, "p50": 4, "p95": 4, "p99": 4, "max": 4, "total": 12}
    assert told["statistics"]["characters"]["min"] > 0
    assert built["matching"] == 5 and built["trace_count"] == built["limit"] == 3


def test_the_latest_are_the_last_that_came_and_random_ones_follow_the_seed(either: Client) -> None:
    made = either.post("/api/traces/batch", json=[TRACE | {"prompt": f"p{n}"} for n in range(50)]).json()["traces"]

    def prompts(version: str, **more: Any) -> list[str]:
        asked = {"dataset_name": "d", "dataset_version": version, "limit": 10} | more
        assert either.post("/api/datasets/build", json=asked).status_code == 201
        return [row["prompt"] for row in lines(either, f"/api/datasets/d-{version}/export.jsonl")]

    assert prompts("latest") == [f"p{n}" for n in range(40, 50)]
    random = {"selection_strategy": "random"}
    one, two, other = (prompts(f"r{n}", **random, seed=seed) for n, seed in enumerate((7, 7, 8)))
    assert one == two != other and len(set(one)) == 10 and one == sorted(one, key=lambda text: int(text[1:]))
    assert len(made) == 50
    refused = either.post("/api/datasets/build", json={"dataset_name": "d", "dataset_version": "x", **random})
    assert refused.status_code == 422 and "needs a seed" in refused.json()["detail"]


def test_filters_reach_the_old_ones_too(either: Client) -> None:
    old = add(either, meta={"source": "rare", "level": 3, "hard": True, "name": "a'b"})
    either.post("/api/traces/batch", json=[TRACE | {"meta": {"source": "usual", "level": 1, "hard": 1}}] * 300)
    for number, filters in enumerate(
        ({"source": "rare"}, {"meta": {"level": 3}}, {"meta": {"hard": True}}, {"meta": {"name": "a'b", "level": 3.0}})
    ):
        asked = {"dataset_name": "rare", "dataset_version": f"v{number}", "filters": filters, "limit": 10}
        built = either.post("/api/datasets/build", json=asked)
        assert built.status_code == 201, built.text
        assert built.json()["trace_count"] == built.json()["matching"] == 1
        assert either.get(f"/api/datasets/rare-v{number}/manifest").json()["trace_ids"] == [old]


@pytest.mark.parametrize(
    ("changed", "status", "said"),
    [
        ({"filters": {"sorce": "ungar"}}, 422, "did you mean source"),
        ({"filters": {"source": None}}, 422, "is null"),
        ({"filters": {"source": "nobody"}}, 422, "an empty dataset is not built"),
        ({"limit": 0}, 422, "greater than or equal to 1"),
        ({"limit": 10_001}, 422, "less than or equal to 10000"),
        ({"selection_strategy": "random"}, 422, "needs a seed"),
        ({"selection_strategy": "best"}, 422, "'latest' or 'random'"),
        ({"dataset_name": "../x"}, 422, "dataset_name"),
        ({"dataset_name": "Upper"}, 422, "dataset_name"),
        ({"dataset_version": ""}, 422, "dataset_version"),
        ({"parent_dataset_id": "none-v1"}, 404, "there is no dataset 'none-v1'"),
        ({"more": 1}, 422, "not permitted"),
    ],
)
def test_a_build_that_cannot_be_is_refused(
    client: Client, settings: Settings, changed: dict[str, Any], status: int, said: str
) -> None:
    client.post("/api/ungar/high-card-duel/generate", json={"count": 2})
    refused = client.post("/api/datasets/build", json=BUILD | changed)
    assert refused.status_code == status and said in refused.json()["detail"], refused.text
    assert refused.headers["content-type"] == "application/problem+json"
    assert client.get("/api/datasets").json()["data"] == []
    assert list(settings.registry.folder.glob("*")) == []


def test_a_version_is_never_overwritten(client: Client) -> None:
    client.post("/api/ungar/high-card-duel/generate", json={"count": 3})
    first = client.post("/api/datasets/build", json=BUILD).json()
    again = client.post("/api/datasets/build", json=BUILD)
    assert again.status_code == 200 and again.json()["is_new"] is False
    assert again.json()["build_id"] == first["build_id"]
    client.post("/api/ungar/high-card-duel/generate", json={"count": 1})
    refused = client.post("/api/datasets/build", json=BUILD)
    assert refused.status_code == 409 and "never overwritten" in refused.json()["detail"]
    assert len(lines(client, "/api/datasets/hcd_baseline-v1/export.jsonl")) == 3


def test_of_many_that_build_one_version_with_other_rows_one_wins(client: Client) -> None:
    client.post("/api/ungar/high-card-duel/generate", json={"count": 60})

    def build(seed: int) -> int:
        asked = BUILD | {"selection_strategy": "random", "seed": seed, "limit": 20}
        return client.post("/api/datasets/build", json=asked).status_code

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(build, range(8))) == [201] + [409] * 7
    assert len(lines(client, "/api/datasets/hcd_baseline-v1/export.jsonl")) == 20


def test_the_registry_is_the_one_of_the_command(client: Client, settings: Settings, tmp_path: Path) -> None:
    traces = tmp_path / "traces.jsonl"
    traces.write_text(json.dumps(TRACE) + "\n")
    folder = ("--registry-dir", settings.registry.folder)
    assert posttrain("data", "add", "own@v1", traces, *folder, cwd=tmp_path).returncode == 0
    client.post("/api/ungar/high-card-duel/generate", json={"count": 4})
    client.post("/api/datasets/build", json=BUILD)
    listed = client.get("/api/datasets").json()["data"]
    assert [(one["dataset_key"], one["rows"]) for one in listed] == [("hcd_baseline-v1", 4), ("own-v1", 1)]
    assert [record["prompt"] for record in lines(client, "/api/datasets/own@v1/export.jsonl")] == [TRACE["prompt"]]
    shown = posttrain("data", "show", "hcd_baseline@v1", *folder, cwd=tmp_path)
    assert shown.returncode == 0 and "4 rows from traces" in shown.stdout
    assert posttrain("data", "verify", *folder, cwd=tmp_path).returncode == 0
    child = client.post("/api/datasets/build", json=BUILD | {"dataset_version": "v2", "parent_dataset_id": "own-v1"})
    assert client.get("/api/datasets/hcd_baseline-v2/manifest").json()["parent"]["key"] == "own@v1"
    assert child.status_code == 201


def test_a_key_that_means_two_datasets_is_refused(client: Client) -> None:
    add(client)

    def build(name: str, version: str) -> int:
        asked = {"dataset_name": name, "dataset_version": version}
        return client.post("/api/datasets/build", json=asked).status_code

    assert [build("a-b", "c"), build("a", "b-c"), build("a", "c")] == [201, 409, 201]
    assert client.get("/api/datasets/a-b-c/manifest").json()["name"] == "a-b"


def test_unknown_formats_and_keys(client: Client) -> None:
    add(client)
    client.post("/api/datasets/build", json={"dataset_name": "d", "dataset_version": "1"})
    assert client.get("/api/datasets/d-1/export.jsonl?format=parquet").status_code == 422
    for key in ("none-1", "d", "..", "%2e%2e%2fx-1", "d-1%00", "d@%2e%2e%2f%2e%2e%2fd@1"):
        assert client.get(f"/api/datasets/{key}/manifest").status_code == 404, key


def test_what_an_export_cannot_keep_is_refused_before_the_first_line(client: Client) -> None:
    add(client)
    add(client, prompt="a <start_of_turn> in a prompt")
    client.post("/api/datasets/build", json={"dataset_name": "d", "dataset_version": "1"})
    refused = client.get("/api/datasets/d-1/export.jsonl?format=tunix_sft")
    assert refused.status_code == 422 and "<start_of_turn>" in refused.json()["detail"]
    assert len(lines(client, "/api/datasets/d-1/export.jsonl")) == 2


# ---------------------------------------------------------------- ingest


def test_ingest_reads_its_folder_and_nothing_else(either: Client, settings: Settings, tmp_path: Path) -> None:
    (settings.ingest / "new").mkdir()
    (settings.ingest / "new" / "a.jsonl").write_text("".join(json.dumps(TRACE) + "\n" for _ in range(700)))
    (tmp_path / "outside.jsonl").write_text(json.dumps(TRACE) + "\n")
    (settings.ingest / "link.jsonl").symlink_to(tmp_path / "outside.jsonl")
    (settings.ingest / "notes.txt").write_text("x")
    done = either.post("/api/datasets/ingest", json={"path": "new/a.jsonl", "source_name": "import"})
    assert done.status_code == 201 and done.json()["ingested_count"] == 700
    kept = either.get(f"/api/traces/{done.json()['trace_ids'][0]}").json()
    assert kept["source"] == "import" and kept["payload"]["meta"]["ingested_source"] == "own"
    for path, status in (
        ("../../outside.jsonl", 422),
        (str(tmp_path / "outside.jsonl"), 422),
        ("link.jsonl", 422),
        ("new/../../ingest/new/a.jsonl", 422),
        ("/etc/passwd", 422),
        ("notes.txt", 422),
        ("none.jsonl", 404),
        ("new", 404),
    ):
        refused = either.post("/api/datasets/ingest", json={"path": path, "source_name": "import"})
        assert refused.status_code == status, (path, refused.text)


def test_a_file_with_a_bad_row_is_refused_whole(client: Client, settings: Settings) -> None:
    bad = TRACE | {"steps": [{"i": 0, "type": "t", "content": "c"}, {"i": 5, "type": "t", "content": "c"}]}
    for text, said in (
        (json.dumps(TRACE) + "\n" + json.dumps(bad) + "\n", "a.jsonl, row 2: "),
        (json.dumps(TRACE) + "\n{torn", "row 2: not JSON"),
        ("", "there is no row in it"),
    ):
        (settings.ingest / "a.jsonl").write_text(text)
        refused = client.post("/api/datasets/ingest", json={"path": "a.jsonl", "source_name": "import"})
        assert refused.status_code == 422 and said in refused.json()["detail"], refused.text
    assert client.get("/api/traces").json()["data"] == []


# ---------------------------------------------------------------- duel


def test_duels_follow_their_seed_and_can_be_seen_without_being_kept(either: Client) -> None:
    assert either.get("/api/ungar/status").json()["available"] is True
    asked = {"count": 4, "seed": 7, "persist": False}
    one, two = (either.post("/api/ungar/high-card-duel/generate", json=asked).json() for _ in range(2))
    assert one == two and one["trace_ids"] == [] and len(one["preview"]) == 3
    assert [trace["meta"]["seed"] for trace in one["preview"]] == [7, 8, 9]
    assert either.get("/api/traces").json()["data"] == []
    kept = either.post("/api/ungar/high-card-duel/generate", json=asked | {"persist": True}).json()["trace_ids"]
    seeds = [row["metadata"]["seed"] for row in lines(either, "/api/ungar/high-card-duel/export.jsonl")]
    assert seeds == [7, 8, 9, 10]
    chosen = ",".join([kept[2], kept[0]])
    found = lines(either, f"/api/ungar/high-card-duel/export.jsonl?trace_ids={chosen}&format=trace")
    assert [row["meta"]["seed"] for row in found] == [9, 7]
    assert len(lines(either, "/api/ungar/high-card-duel/export.jsonl?limit=2")) == 2
    assert either.get("/api/ungar/high-card-duel/export.jsonl?trace_ids=x").status_code == 422
    for wrong in ({"count": 0}, {"count": 1001}, {"count": 1, "seed": "x"}, {"count": 1, "variant": "poker"}):
        assert either.post("/api/ungar/high-card-duel/generate", json=wrong).status_code == 422


def test_the_seeds_duel_has_no_choice_and_ours_has_one(client: Client) -> None:
    shown: dict[str, list[dict[str, Any]]] = {}
    for variant in ("reveal", "decision"):
        asked = {"count": 100, "seed": 1, "variant": variant}
        made = client.post("/api/ungar/high-card-duel/generate", json=asked).json()["trace_ids"]
        path = f"/api/ungar/high-card-duel/export.jsonl?format=trace&trace_ids={','.join(made)}"
        shown[variant] = lines(client, path)
    for rows in shown.values():
        for row in rows:
            assert [step["type"] for step in row["steps"]] == ["legal_moves", "observation", "unseen", "decision"]
            assert {"game", "my_card", "opponent_card", "result", "seed"} <= row["meta"].keys()
    assert {row["final_answer"] for row in shown["reveal"]} == {"reveal"}
    assert {row["final_answer"] for row in shown["decision"]} == {"fold", "call", "raise"}
