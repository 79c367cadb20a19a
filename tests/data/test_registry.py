"""Datasets are built once, never change, and have the digest of what is in them and of nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain.chat.conversation import Conversation
from posttrain.data.build import Built, Request, build
from posttrain.data.export import EXPORTS, exported
from posttrain.data.overlap import shared_rows
from posttrain.data.registry import Registry, split_key
from posttrain.data.sources import read_source
from posttrain.data.statistics import histogram, spread
from posttrain.errors import DataError
from posttrain.recipe.types import EVERY_ROW, OneOf, RegisteredSource, Source, WorldSource
from posttrain.worlds.registry import rows as world_rows
from tests.data.sources import FIXTURES, file, hub, read, said

DUELS = (OneOf(kind="one_of", column="meta.game", values=("high_card_duel",)),)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("POSTTRAIN_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("POSTTRAIN_HUB_DIR", str(FIXTURES / "hub"))
    return Registry.default()


def request(*sources: Source, content: str = "conversations", **changed: Any) -> Request:
    fields = {"limit": None, "strategy": "first", "seed": None, "parent": None, "fault_share": 0.0} | changed
    return Request(content=content, sources=sources, **fields)


def make(registry: Registry, key: str, *sources: Source, **changed: Any) -> Built:
    return build(registry, key, request(*sources, **changed))


def world(count: int = 20, seed: int = 0, name: str = "identity") -> WorldSource:
    return WorldSource(kind="world", world=name, split="train", count=count, seed=seed)


def ids(built: Built) -> list[str]:
    return [row["id"] for row in built.stored.read()]


def test_a_dataset_is_its_rows_and_says_where_they_come_from(registry: Registry) -> None:
    built = make(registry, "duels@v1", file("traces.jsonl", "rt_trace", filters=DUELS))
    assert built.is_new and ids(built) == ["traces.jsonl:2", "traces.jsonl:3", "traces.jsonl:4"]
    manifest = built.stored.manifest
    assert manifest["counts"] == {"rows": 3, "filtered": 1, "unavailable_sources": 0, "malformed": {}}
    (source,) = manifest["sources"]
    assert (source["format"], source["rows"], source["filters"][0]["column"]) == ("rt_trace", 3, "meta.game")
    assert len(source["digest"]) == 64 and manifest["parent"] is None
    assert manifest["statistics"]["messages"]["total"] == 9 and manifest["statistics"]["duplicates"] == 0
    assert (built.stored.folder / "ids.txt").read_text().splitlines()[0] == '"traces.jsonl:2"'
    assert built.stored.faults() == [] and registry.all_keys() == ["duels@v1"]


def test_the_same_again_is_there_already_and_another_is_refused(registry: Registry) -> None:
    first = make(registry, "a@1", world())
    again = make(registry, "a@1", world())
    assert first.is_new and not again.is_new and again.stored.digest == first.stored.digest
    before = (first.stored.folder / "manifest.json").read_bytes()
    with pytest.raises(DataError, match=r"a@1 exists with other rows .* never overwritten; .* new version"):
        make(registry, "a@1", world(seed=1))
    assert (first.stored.folder / "manifest.json").read_bytes() == before
    assert make(registry, "b@7", world()).stored.digest == first.stored.digest
    assert [path.name for path in registry.folder.iterdir() if path.name.startswith(".")] == []


def test_latest_first_and_random_are_exact(registry: Registry) -> None:
    source = file("traces.jsonl", "rt_trace")
    assert ids(make(registry, "a@first", source, limit=2)) == ["traces.jsonl:1", "traces.jsonl:2"]
    assert ids(make(registry, "a@latest", source, limit=2, strategy="latest")) == ["traces.jsonl:3", "traces.jsonl:4"]
    drawn = [ids(make(registry, f"r@{seed}", source, limit=2, strategy="random", seed=seed)) for seed in range(12)]
    assert all(len(pair) == 2 and pair == sorted(pair) for pair in drawn) and len({tuple(pair) for pair in drawn}) > 2
    assert ids(make(registry, "r@again", source, limit=2, strategy="random", seed=3)) == drawn[3]
    # The filter comes before the limit: three duels, of which two.
    built = make(registry, "d@1", file("traces.jsonl", "rt_trace", filters=DUELS), limit=2, strategy="latest")
    assert ids(built) == ["traces.jsonl:3", "traces.jsonl:4"]
    for missing in ({"limit": 2}, {"seed": 2}):
        with pytest.raises(DataError, match="a random selection needs a"):
            make(registry, "r@x", source, strategy="random", **missing)


def test_nothing_and_too_many_faults_are_refused(registry: Registry) -> None:
    nothing = (OneOf(kind="one_of", column="meta.game", values=("chess",)),)
    with pytest.raises(DataError, match=r"no row is left \(4 filtered\)"):
        make(registry, "a@1", file("traces.jsonl", "rt_trace", filters=nothing))
    with pytest.raises(DataError) as caught:
        make(registry, "a@1", file("messages.jsonl", "messages"))
    assert "a@1: 2 of 5 rows are malformed, more than the allowed share 0: 1 × messages[1].role" in str(caught.value)
    assert registry.all_keys() == [] and list(registry.folder.iterdir()) == []
    built = make(registry, "a@1", file("messages.jsonl", "messages"), fault_share=0.4)
    assert sum(built.stored.manifest["counts"]["malformed"].values()) == 2 == len(built.faults)
    with pytest.raises(DataError, match=r"id 'identity-train-0-0' is there twice"):
        make(registry, "b@1", world(), world())


def test_a_registered_dataset_is_a_source_and_a_parent(registry: Registry) -> None:
    parent = make(registry, "all@1", file("traces.jsonl", "rt_trace")).stored
    meta = (OneOf(kind="one_of", column="conversation.metadata.trace.meta.game", values=("sums",)),)
    source = RegisteredSource(
        kind="registered", dataset="all@1", filters=meta, selection=EVERY_ROW, reasoning_effort="high"
    )
    child = make(registry, "sums@1", source).stored
    assert [row["id"] for row in child.read()] == ["traces.jsonl:1"]
    assert child.manifest["parent"] == {"key": "all@1", "digest": parent.digest}
    ((_, row),) = read_source(source, "conversations")
    assert row.conversation.reasoning_effort == "high"  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"no dataset 'all@2'.*did you mean all@1"):
        registry.find("all@2")


@pytest.mark.parametrize("key", ["a", "a@", "@1", "../a@1", "a@../1", "A@1", "a@1/b", "a b@1", ""])
def test_a_key_that_is_none_is_named(key: str) -> None:
    with pytest.raises(DataError, match="write NAME@VERSION"):
        split_key(key)


def test_a_changed_byte_is_found(registry: Registry) -> None:
    stored = make(registry, "a@1", world()).stored
    stored.rows.write_bytes(stored.rows.read_bytes().replace(b"model", b"mouse", 1))
    assert stored.faults() == ["rows.jsonl has changed since it was built"]
    manifest = json.loads((stored.folder / "manifest.json").read_text())
    manifest["digest"] = "0" * 64
    (stored.folder / "manifest.json").write_text(json.dumps(manifest))
    stored.folder.joinpath("ids.txt").unlink()
    assert registry.find("a@1").faults() == [
        "ids.txt is missing",
        "rows.jsonl has changed since it was built",
        "manifest.json does not have the digest of its own files",
    ]


BUILD = """
import os, sys
from pathlib import Path
from posttrain.data.build import build
from posttrain.data.registry import Registry
from tests.data.test_registry import request, world
from tests.data.sources import FIXTURES, file, hub
from posttrain.recipe.types import Selection
one = Selection(max_samples=1, seed=5, repeat=1, weight=None)
sources = [file("traces.jsonl", "rt_trace"), file("messages.jsonl", "messages"), world(),
           hub("HuggingFaceTB/smol-smoltalk", "smoltalk", selection=one)]
wanted = request(*sources, fault_share=0.5, limit=15, strategy="random", seed=4)
made = build(Registry(Path(sys.argv[1])), "a@1", wanted)
assert not {"torch", "transformers"} & set(sys.modules)
print(made.stored.digest)
"""


def test_the_digest_is_the_same_in_any_zone_locale_folder_and_on_any_core(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    places = [
        {"TZ": "Pacific/Auckland", "LC_ALL": "C", "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
        {"TZ": "America/New_York", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "7"},
    ]
    digests = []
    for number, place in enumerate(places):
        folder = tmp_path / str(number)
        folder.mkdir()
        paths = {"PYTHONPATH": str(root), "POSTTRAIN_HUB_DIR": str(FIXTURES / "hub")}
        one_core = ["taskset", "-c", str(min(os.sched_getaffinity(0)))] if number else []
        command = [*one_core, sys.executable, "-c", BUILD, str(folder / "registry")]
        ended = subprocess.run(command, cwd=folder, env=os.environ | place | paths, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        digests.append(ended.stdout)
    assert digests[0] == digests[1] and len(digests[0].strip()) == 64


# ---------------------------------------------------------------- statistics


def test_statistics_by_hand() -> None:
    assert spread([4, 1, 3, 2]) == {"min": 1, "mean": 2.5, "p50": 2, "p95": 4, "p99": 4, "max": 4, "total": 10}
    assert spread(range(1, 101))["p95"] == 95 and spread([]) == {}
    assert histogram([0, 4, 5, 19], 4) == [(0, 4, 2), (5, 9, 1), (10, 14, 0), (15, 19, 1)]
    assert sum(count for _, _, count in histogram(range(13, 977, 7), 16)) == len(range(13, 977, 7))


def test_duplicates_and_tools_are_counted(registry: Registry, tmp_path: Path) -> None:
    line = (FIXTURES / "messages.jsonl").read_text().splitlines()[0]
    (tmp_path / "twice.jsonl").write_text(f"{line}\n{line}\n")
    found = make(registry, "a@1", file(tmp_path / "twice.jsonl", "messages")).stored.manifest["statistics"]
    assert (found["duplicates"], found["most_called"], found["tools_offered"]["max"]) == (1, {"set_light": 2}, 1)


def test_shared_runs_of_words_are_found() -> None:
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    rows = [{"id": "a", "text": f"Before. {text.upper()}!"}, {"id": "b", "text": text.replace("seven", "7")}]
    assert shared_rows(rows, [{"id": "c", "text": text}]) == ["a"]
    assert shared_rows(rows, [{"id": "c", "text": text}], 6) == ["a", "b"]


# ---------------------------------------------------------------- exports


def one(built: Built, shape: str, place: int = 0) -> list[dict[str, Any]]:
    row = list(built.stored.read())[place]
    return list(exported(row, built.stored.content, shape))


def test_a_trace_comes_back_as_it_was(registry: Registry) -> None:
    built = make(registry, "a@1", file("traces.jsonl", "rt_trace"))
    given = [json.loads(line) for line in (FIXTURES / "traces.jsonl").read_text().splitlines()]
    assert [one(built, "trace", place)[0] for place in range(4)] == given


def test_the_rt_shapes(registry: Registry) -> None:
    built = make(registry, "a@1", file("traces.jsonl", "rt_trace"))
    response = "Reasoning:\n1. Seven eights.\n2. 7 × 8 = 56\nAnswer: 56"
    meta = {"source": "own", "game": "sums"}
    assert one(built, "tunix_sft") == [
        {
            "id": "traces.jsonl:1",
            "prompts": "<start_of_turn>user\nWhat is 7 times 8?<end_of_turn>\n"
            f"<start_of_turn>model\n{response}<end_of_turn>",
            "final_answer": "56",
            "metadata": meta,
        }
    ]
    assert one(built, "training_example") == [
        {"id": "traces.jsonl:1", "prompt": "What is 7 times 8?", "response": response, "metadata": meta}
    ]


def test_a_tool_conversation_becomes_a_trace_of_its_steps(registry: Registry) -> None:
    built = make(registry, "a@1", file("messages.jsonl", "messages"), limit=1)
    (trace,) = one(built, "trace")
    assert trace["prompt"] == "Use the tool.\n\nLight on in the hall." and trace["final_answer"] == "It is on."
    assert [(step["i"], step["type"]) for step in trace["steps"]] == [
        (1, "thought"),
        (2, "message"),
        (3, "tool_call"),
        (4, "tool_result"),
    ]


@pytest.mark.parametrize("name", ["tools", "agent", "identity", "spelling"])
def test_messages_come_back_as_the_same_conversations(registry: Registry, tmp_path: Path, name: str) -> None:
    built = make(registry, "a@1", world(40, name=name))
    path = tmp_path / "out.jsonl"
    lines = [record for row in built.stored.read() for record in exported(row, "conversations", "messages")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    back, faults = read(file(path, "messages"), "conversations")
    assert not faults
    for row, source in zip(back, world_rows(name, "conversations", "train", 40, 0), strict=True):
        assert row.conversation == Conversation.model_validate(source["conversation"])


def test_pairs_and_tasks_in_trls_shapes(registry: Registry, tmp_path: Path) -> None:
    pairs = make(registry, "p@1", hub("Anthropic/hh-rlhf", "hh_rlhf"), content="pairs", fault_share=1.0)
    (pair,) = one(pairs, "preference")
    assert pair["prompt"][-1] == {"role": "user", "content": "Another?"}
    assert (pair["chosen"], pair["rejected"]) == (
        [{"role": "assistant", "content": "A plum."}],
        [{"role": "assistant", "content": "No."}],
    )
    assert [row["label"] for row in one(pairs, "unpaired_preference")] == [True, False]
    (tmp_path / "p.jsonl").write_text(json.dumps(pair) + "\n")
    back, _ = read(file(tmp_path / "p.jsonl", "preference"), "pairs")
    assert said(back[0].prompt)[0] == ("user", "Name a fruit.") and said(back[0].chosen)[0][-1] == "A plum."
    tasks = make(registry, "t@1", hub("openai/gsm8k", "gsm8k", "main", "test"), content="tasks")
    assert one(tasks, "prompt_only")[0]["prompt"][0]["role"] == "user"
    talks = make(registry, "c@1", hub("HuggingFaceTB/smol-smoltalk", "smoltalk"))
    assert one(talks, "prompt_completion", 1)[0]["completion"] == [{"role": "assistant", "content": "Fine."}]


def test_a_shape_that_does_not_fit_is_named(registry: Registry) -> None:
    built = make(registry, "a@1", world())
    with pytest.raises(DataError, match=r"conversations cannot be exported as preference; they can as rows, messages"):
        one(built, "preference")
    with pytest.raises(DataError, match=r"no export format 'csv'; there are rows, messages, trace"):
        one(built, "csv")
    assert all(contents for contents in EXPORTS.values())
