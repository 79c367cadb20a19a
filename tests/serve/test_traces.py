"""Traces over HTTP, with the requests that the seeds document, on both databases."""

import copy
import json
import uuid
from typing import Any

import pytest

from tests.serve.conftest import Client

TRACE: dict[str, Any] = {
    "trace_version": "1.0",
    "prompt": "What is 7 times 8?",
    "final_answer": "It is 56.",
    "steps": [
        {"i": 0, "type": "plan", "content": "Seven eights."},
        {"i": 1, "type": "compute", "content": "7 × 8 = 56"},
    ],
    "meta": {"source": "own", "game": "sums", "expected_answer": "56", "level": 3, "hard": True},
}

JSON = {"Content-Type": "application/json"}


def add(client: Client, **changed: Any) -> str:
    answer = client.post("/api/traces", json=TRACE | changed)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def test_a_trace_comes_back_as_it_was_sent(either: Client) -> None:
    created = either.post("/api/traces", json=TRACE).json()
    assert set(created) == {"id", "created_at", "trace_version"}
    found = either.get(f"/api/traces/{created['id']}").json()
    assert found["payload"] == TRACE
    assert (found["source"], found["game"], found["created_at"]) == ("own", "sums", created["created_at"])
    assert either.get(f"/api/traces/{uuid.uuid4()}").status_code == 404
    assert either.get("/api/traces/none").status_code == 422


def test_a_batch_is_kept_whole_or_not_at_all(either: Client) -> None:
    good = [TRACE | {"prompt": f"p{number}"} for number in range(1000)]
    made = either.post("/api/traces/batch", json=good).json()
    assert made["created_count"] == 1000 and len({one["id"] for one in made["traces"]}) == 1000
    assert either.get(f"/api/traces/{made['traces'][7]['id']}").json()["payload"]["prompt"] == "p7"
    bad = [*good[:2], TRACE | {"steps": []}]
    refused = either.post("/api/traces/batch", json=bad)
    assert refused.status_code == 422 and "2.steps" in refused.json()["detail"]
    assert [either.post("/api/traces/batch", json=many).status_code for many in ([], [*good, TRACE])] == [422, 422]
    assert either.get("/api/traces", params={"offset": 1000}).json()["data"] == []


def test_pages_go_from_the_newest_to_the_oldest(either: Client) -> None:
    either.post("/api/traces/batch", json=[TRACE | {"prompt": f"p{number}"} for number in range(25)])
    seen, offset = [], 0
    while offset is not None:
        page = either.get("/api/traces", params={"limit": 10, "offset": offset}).json()
        seen += [line["id"] for line in page["data"]]
        offset = page["pagination"]["next_offset"]
    prompts = [either.get(f"/api/traces/{one}").json()["payload"]["prompt"] for one in seen]
    assert prompts == [f"p{number}" for number in reversed(range(25))]
    for wrong in ({"limit": 0}, {"limit": 101}, {"offset": -1}, {"limit": "many"}):
        assert either.get("/api/traces", params=wrong).status_code == 422


def test_lists_are_filtered_in_the_query(either: Client) -> None:
    other = add(either, meta={"source": "ungar", "game": "high_card_duel"})
    own = add(either)
    either.post(f"/api/traces/{own}/score", json={})

    def found(**filters: Any) -> list[str]:
        return [line["id"] for line in either.get("/api/traces", params=filters).json()["data"]]

    created = either.get(f"/api/traces/{other}").json()["created_at"]
    assert found() == [own, other]
    assert found(source="ungar") == found(game="high_card_duel") == [other]
    assert found(source="ungar", game="sums") == found(trace_version="2") == []
    assert found(score_at_least=1) == [own] and found(score_at_least=1.1) == []
    assert found(created_after=created) == [own] and found(created_before=created) == []
    refused = either.get("/api/traces", params={"sorce": "own"})
    assert refused.status_code == 422 and "did you mean source" in refused.json()["detail"]
    assert either.get("/api/traces", params={"created_after": "2026-01-01T00:00:00"}).status_code == 422


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"prompt": "p" * 50_001}, "50000 characters"),
        ({"final_answer": ""}, "at least 1 character"),
        ({"prompt": "  "}, "prompt: is empty"),
        ({"steps": []}, "at least 1 item"),
        ({"steps": [{"i": 1, "type": "t", "content": "c"}] * 2}, "has the same `i` twice"),
        ({"steps": [{"i": i, "type": "t", "content": "c"} for i in (0, 2)]}, "does not count up by one"),
        ({"steps": [{"i": i, "type": "t", "content": "c"} for i in (1, 0)]}, "does not count up by one"),
        ({"steps": [{"i": 0, "type": "t", "content": "c" * 20_001}]}, "20000 characters"),
        ({"steps": [{"i": 0, "type": "t", "content": "c", "more": 1}]}, "not permitted"),
        ({"prompt": "a\0b"}, "null character"),
        ({"meta": {"a": "\ud800"}}, "surrogate"),
        ({"meta": {"a": float("nan")}}, "not JSON"),
        ({"meta": {"source": "s" * 257}}, "longer than 256"),
        ({"answer": "x"}, "not permitted"),
    ],
)
def test_a_trace_that_is_no_good_is_refused_with_the_field(client: Client, changed: dict[str, Any], fault: str) -> None:

    # As text: the client's own encoder refuses some of these.
    refused = client.post(
        "/api/traces", content=json.dumps(TRACE | changed), headers={"Content-Type": "application/json"}
    )
    assert refused.status_code == 422 and fault in refused.json()["detail"], refused.text
    assert client.get("/api/traces").json()["data"] == []


def test_deep_nesting_is_refused(client: Client) -> None:
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    assert client.post("/api/traces", json=TRACE | {"meta": {"a": deep}}).status_code == 422
    assert client.post("/api/traces", content=b"[" * 100_000).status_code in (400, 422)


@pytest.mark.parametrize(
    ("answer", "criteria", "expected", "score"),
    [
        ("It is 56.", "answer", "56", 1.0),
        ("It is 57.", "answer", "56", 0.0),
        ("56", "exact", "56", 1.0),
        ("It is 56.", "exact", "56", 0.0),
        ("Paris, of course", "answer", "Paris", 1.0),
        ("1,000", "numeric", 1000, 1.0),
    ],
)
def test_a_score_compares_with_the_expected_answer(
    either: Client, answer: str, criteria: str, expected: Any, score: float
) -> None:
    identity = add(either, final_answer=answer, meta={})
    asked = {"criteria": criteria, "expected_answer": expected}
    given = either.post(f"/api/traces/{identity}/score", json=asked)
    assert given.status_code == 201 and given.json()["score"] == score


def test_length_earns_nothing_and_a_missing_reference_is_unscorable(client: Client) -> None:
    steps = [{"i": i, "type": "t", "content": "words " * 100} for i in range(100)]
    long, bare = add(client, final_answer="57", steps=steps), add(client, meta={})
    assert client.post(f"/api/traces/{long}/score", json={}).json()["score"] == 0.0
    unscorable = client.post(f"/api/traces/{bare}/score", json={}).json()
    assert unscorable["score"] is None and "no expected answer" in unscorable["details"]["reason"]
    assert client.post(f"/api/traces/{bare}/score", json={"criteria": "baseline"}).status_code == 422
    refused = client.post(f"/api/traces/{bare}/score", json={"criteria": "numeric", "expected_answer": "many"})
    assert refused.status_code == 422 and "'many', not a number" in refused.json()["detail"]


def test_two_traces_side_by_side_with_their_newest_scores(either: Client) -> None:
    base, other = add(either), add(either, final_answer="55")
    for identity in (base, other, other):
        either.post(f"/api/traces/{identity}/score", json={})
    both = either.get("/api/traces/compare", params={"base": base, "other": other}).json()
    assert [(side["id"], [score["score"] for score in side["scores"]]) for side in both.values()] == [
        (base, [1.0]),
        (other, [0.0]),
    ]
    assert both["other"]["payload"]["final_answer"] == "55"
    assert either.get("/api/traces/compare", params={"base": base, "other": str(uuid.uuid4())}).status_code == 404


def test_a_get_changes_nothing(client: Client, settings: Any) -> None:
    add(client)

    def everything() -> dict[str, Any]:
        root = settings.data_dir.parent
        # SQLite's reader keeps its place in the -shm file.
        return {
            str(path): path.read_bytes() if path.is_file() else None
            for path in root.rglob("*")
            if not path.name.endswith("-shm")
        }

    before = copy.deepcopy(everything())
    gets = ("/api/traces", "/api/datasets", "/api/runs", "/api/models", "/api/evaluations/leaderboard")
    for path in (*gets, "/api/ungar/status", "/api/ungar/high-card-duel/export.jsonl", "/openapi.json"):
        assert client.get(path).status_code == 200, path
    assert client.get("/api/runs/none").status_code == client.get("/api/datasets/a-b/manifest").status_code == 404
    assert everything() == before
