"""Prepared datasets hold what the renderer says, and are there whole or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.chat.conversation import Conversation, Message
from posttrain.chat.render import Rendered, renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data import prepare as prepare_module
from posttrain.data.encode import Encoder, Unread
from posttrain.data.prepare import committed, content_key, link_dataset, prepare_dataset
from posttrain.data.shard import Shard
from posttrain.errors import DataError
from posttrain.recipe.types import EVERY_ROW, Dataset, FileSource, HarmonyFormat, Source, WorldSource
from posttrain.run.folder import digest_folder
from posttrain.worlds.registry import row, rows


def dataset(world: str, content: str, count: int = 30, max_tokens: int = 2048) -> Dataset:
    source = WorldSource(kind="world", world=world, split="train", count=count, seed=0)
    return made_of(source, content, max_tokens=max_tokens)


def made_of(source: Source, content: str, **settings: Any) -> Dataset:
    fields = {"name": "own", "content": content, "sources": (source,), "max_tokens": 512, "too_long": "drop"}
    return Dataset.model_validate(fields | {"faulty_share": 0.0} | settings)


def prepare(
    wanted: Dataset, chat: HarmonyFormat, tokenizer: Tokenizer, folder: Path, workers: int = 1
) -> dict[str, Any]:
    return prepare_dataset(wanted, chat, tokenizer, folder, "key", workers, lambda amount: None)


def test_conversations_are_the_renderers_tokens(chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path) -> None:
    description = prepare(dataset("tools", "conversations"), chat, tokenizer, tmp_path / "d")
    shard, render = Shard(tmp_path / "d"), renderer(chat, tokenizer)
    assert len(shard) == shard.num_rows == 30
    for number, source in enumerate(rows("tools", "conversations", "train", 30, 0)):
        rendered = render.render(Conversation.model_validate(source["conversation"]))
        assert shard.tokens(number).tolist() == rendered.tokens
        assert shard.targets(number).tolist() == rendered.targets
        assert shard.row(number)["id"] == source["id"]
    assert description["counts"]["tokens"] == sum(len(shard.tokens(n)) for n in range(30))
    assert description["counts"]["target_tokens"] == sum(int(shard.targets(n).sum()) for n in range(30))


def test_a_text_is_its_tokens_and_an_end(chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepare(dataset("language", "text"), chat, tokenizer, tmp_path / "d")
    shard = Shard(tmp_path / "d")
    for number in range(30):
        text = row("language", "text", "train", 0, number)["text"]
        assert tokenizer.decode(shard.tokens(number).tolist()) == text + "<|endoftext|>"
        assert not shard.targets(number)[0] and shard.targets(number)[1:].all()


def test_a_pair_shares_its_prompt_and_has_targets_after_it(
    chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare(dataset("preferences", "pairs", 60), chat, tokenizer, tmp_path / "d")
    shard, render = Shard(tmp_path / "d"), renderer(chat, tokenizer)
    assert len(shard) == 120 and shard.num_rows == 60
    for number in range(60):
        source, prefix = row("preferences", "pairs", "train", 0, number), shard.prefix(number)
        prompt = render.prompt(Conversation.model_validate(source["prompt"]))
        for sequence, side in ((2 * number, "chosen"), (2 * number + 1, "rejected")):
            assert shard.tokens(sequence)[:prefix].tolist() == prompt
            assert not shard.targets(sequence)[:prefix].any() and shard.targets(sequence)[prefix:].any()
            written = render.parse(shard.tokens(sequence)[prefix:].tolist())
            assert written == [Message(**message) for message in source[side]]
            # Everything after the prompt is what the model emits.
            assert shard.targets(sequence)[prefix:].all()


def test_tasks_keep_their_rows(chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepare(dataset("repair", "tasks"), chat, tokenizer, tmp_path / "d")
    shard = Shard(tmp_path / "d")
    assert (len(shard), shard.num_rows) == (0, 30)
    for number in range(30):
        # Through JSON, where a tuple is a list.
        assert shard.row(number)["reference"] == json.loads(
            json.dumps(row("repair", "tasks", "train", 0, number)["reference"])
        )


def test_what_is_dropped_is_counted(chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path) -> None:
    lengths = Shard(_whole(chat, tokenizer, tmp_path))
    limit = int(np.median([len(lengths.tokens(n)) for n in range(30)]))
    description = prepare(dataset("tools", "conversations", max_tokens=limit), chat, tokenizer, tmp_path / "d")
    kept = [lengths.row(n)["id"] for n in range(30) if len(lengths.tokens(n)) <= limit]
    shard = Shard(tmp_path / "d")
    assert [shard.row(n)["id"] for n in range(len(shard))] == kept
    assert description["counts"]["dropped_too_long"] == 30 - len(kept) > 0
    with pytest.raises(DataError, match="none of its rows is left"):
        prepare(dataset("tools", "conversations", max_tokens=5), chat, tokenizer, tmp_path / "e")
    assert not list(tmp_path.glob("e*")) + list(tmp_path.glob(".e.partial"))


def _whole(chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    prepare(dataset("tools", "conversations"), chat, tokenizer, tmp_path / "whole")
    return tmp_path / "whole"


def own_file(path: str) -> FileSource:
    return FileSource(kind="file", path=path, format="rows", filters=(), selection=EVERY_ROW, reasoning_effort=None)


def own_rows(tmp_path: Path, *lines: object) -> FileSource:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return own_file(str(file))


def talk(number: int, *turns: str, silent: bool = False) -> dict[str, Any]:
    """A conversation of as many turns as there are questions."""
    messages = []
    for question in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "channel": "final", "content": "yes", "train": not silent})
    return {"id": f"row-{number}", "conversation": {"messages": messages}}


def test_rows_that_are_no_good_are_refused_or_counted_by_reason(
    chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    unrenderable = talk(3, "hello")
    unrenderable["conversation"]["messages"][1]["channel"] = None
    source = own_rows(
        tmp_path,
        talk(0, "hello"),
        "nonsense",
        "other nonsense",
        talk(1, "hello", silent=True),
        {"id": "row-2"},
        unrenderable,
        *(talk(number, "hello") for number in range(4, 8)),
    )
    with pytest.raises(DataError, match=r"rows\.jsonl row 2: not JSON: .*mend or remove the row"):
        prepare(made_of(source, "conversations"), chat, tokenizer, tmp_path / "none")
    with pytest.raises(DataError) as refused:
        prepare(made_of(source, "conversations", faulty_share=0.4), chat, tokenizer, tmp_path / "few")
    assert "5 of 10 rows are no good, faulty_share allows 40.00%" in str(refused.value)
    assert "2 × row: not JSON: Expecting value: line … column … (char …)" in str(refused.value)
    assert "rows.jsonl row 4: nothing in it is a target to train on" in str(refused.value)
    left = [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert left == [tmp_path / "rows.jsonl"]

    description = prepare(made_of(source, "conversations", faulty_share=0.5), chat, tokenizer, tmp_path / "half")
    assert description["counts"]["rows"] == 5 and description["counts"]["faulty"] == 5
    assert sorted(description["faulty"].values()) == [1, 1, 1, 2]
    listed = [json.loads(line) for line in (tmp_path / "half" / "faulty_rows.jsonl").read_text().splitlines()]
    assert [(Path(line["place"]).name, line["field"]) for line in listed] == [
        ("rows.jsonl row 2", "row"),
        ("rows.jsonl row 3", "row"),
        ("rows.jsonl row 5", "conversation"),
        ("rows.jsonl row 4", "row"),
        ("rows.jsonl row 6", "row"),
    ]
    assert [Shard(tmp_path / "half").row(n)["id"] for n in range(5)] == ["row-0", "row-4", "row-5", "row-6", "row-7"]


def test_a_long_conversation_is_left_out_or_loses_its_last_turns(
    chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    short, long = talk(0, "one"), talk(1, "one", "two", "three " * 200)
    source = own_rows(tmp_path, short, long, talk(2, "four " * 200))
    dropped = prepare(made_of(source, "conversations"), chat, tokenizer, tmp_path / "dropped")
    assert dropped["counts"] | {"tokens": 0, "target_tokens": 0} == {
        **{"rows": 1, "dropped_too_long": 2, "cut_at_turn": 0, "faulty": 0, "tokens": 0, "target_tokens": 0},
        **{"filtered": 0, "unavailable": 0},
    }
    cut = prepare(made_of(source, "conversations", too_long="cut_at_turn"), chat, tokenizer, tmp_path / "cut")
    assert (cut["counts"]["rows"], cut["counts"]["cut_at_turn"], cut["counts"]["dropped_too_long"]) == (2, 1, 1)
    whole = Conversation.model_validate(long["conversation"])
    expected = renderer(chat, tokenizer).render(whole.model_copy(update={"messages": whole.messages[:4]}))
    shard = Shard(tmp_path / "cut")
    assert shard.tokens(len(shard) - 1).tolist() == expected.tokens
    assert shard.targets(len(shard) - 1).tolist() == expected.targets


def test_an_id_that_comes_twice_is_named_with_both_places(
    chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = own_rows(tmp_path, talk(0, "hello"), talk(1, "hello"), talk(0, "again"))
    with pytest.raises(DataError, match=r"rows\.jsonl row 3: id 'row-0' is already that of .*rows\.jsonl row 1"):
        prepare(made_of(source, "conversations"), chat, tokenizer, tmp_path / "d")


def test_a_prepared_folder_is_recognised_until_a_byte_changes(
    chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    description = prepare(dataset("tools", "conversations"), chat, tokenizer, tmp_path / "d")
    assert committed(tmp_path / "d", "key") == description
    assert committed(tmp_path / "d", "another") is None
    data = bytearray((tmp_path / "d" / "tokens.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "d" / "tokens.npy").write_bytes(data)
    assert committed(tmp_path / "d", "key") is None


def test_the_key_follows_the_bytes_of_a_file_and_not_its_place_or_the_datasets_name(
    chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def key(file: Path, text: str, **changes: Any) -> str:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        wanted = made_of(own_file(str(file)), "text", **changes)
        return content_key(wanted, chat, tokenizer, "asker")

    first = key(tmp_path / "rows.jsonl", "a")
    assert key(tmp_path / "elsewhere" / "rows.jsonl", "a", name="another") == first
    assert first not in (key(tmp_path / "rows.jsonl", "b"), key(tmp_path / "rows.jsonl", "a", max_tokens=9))


PREPARE = """
import sys
from pathlib import Path
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data import prepare, shard_writer
from posttrain.recipe.types import Dataset, HarmonyFormat
wanted, chat, tokenizer, folder, workers = sys.argv[1:]
shard_writer.PART_BYTES, prepare.BLOCK = 20_000, 16
print(prepare.prepare_dataset(
    Dataset.model_validate_json(wanted), HarmonyFormat.model_validate_json(chat), Tokenizer.load(Path(tokenizer)),
    Path(folder), "key", int(workers), lambda rows: None,
)["digest"])
"""


@pytest.fixture
def prepare_elsewhere(
    chat: HarmonyFormat, tokenizer_folder: Path, tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Prepares in a process of its own, in small blocks and parts."""

    def call(wanted: Dataset, name: str, workers: int = 1, **extra: Any) -> subprocess.CompletedProcess[str]:
        arguments = [wanted.model_dump_json(), chat.model_dump_json(), str(tokenizer_folder), str(tmp_path / name)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **extra.pop("environment", {})}
        command = [*extra.pop("before", ()), sys.executable, "-c", PREPARE, *arguments, str(workers)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **extra)

    return call


@pytest.mark.parametrize(
    "point", ["prepare.part_saved", "prepare.part_saved#3", "prepare.dataset_written", "prepare.before_commit"]
)
@pytest.mark.parametrize(("old", "workers"), [(False, 1), (True, 1), (False, 2)])
def test_killed_there_is_no_new_folder_and_the_next_time_goes_on_to_the_same_bytes(
    point: str,
    old: bool,
    workers: int,
    chat: HarmonyFormat,
    tokenizer: Tokenizer,
    prepare_elsewhere: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = dataset("tools", "conversations", count=200)
    prepare(wanted, chat, tokenizer, tmp_path / "undisturbed")
    folder, partial = tmp_path / "d", tmp_path / ".d.partial"
    if old:
        prepare(dataset("tools", "conversations", count=3), chat, tokenizer, folder)
        (folder / "dataset.json").write_text((folder / "dataset.json").read_text().replace('"key"', '"other"', 2))
    ended = prepare_elsewhere(wanted, "d", workers, environment={"POSTTRAIN_FAULT": f"{point}:kill"})
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not folder.exists() or Shard(folder).num_rows == 3
    saved = json.loads((partial / "progress.json").read_text())["rows_read"]
    assert saved > 0

    done: list[float] = []
    monkeypatch.setattr("posttrain.data.prepare.BLOCK", 16)
    monkeypatch.setattr("posttrain.data.prepare._unread", counted(done))
    prepare(wanted, chat, tokenizer, folder)
    assert sum(done) == 200 - saved
    assert digest_folder(folder) == digest_folder(tmp_path / "undisturbed")
    assert not partial.exists()


def counted(done: list[float]) -> Callable[..., Iterator[Unread]]:
    """`_unread`, noting the rows that are rendered."""

    def unread(*arguments: Any) -> Iterator[Unread]:
        for block in ORIGINAL(*arguments):
            done.append(block.rows)
            yield block

    return unread


ORIGINAL = prepare_module._unread


def test_the_digest_is_the_same_whoever_makes_it_and_wherever(
    prepare_elsewhere: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Time zone, locale, working folder, cores and workers change nothing."""
    rows = "".join(json.dumps(talk(number, "où?", "später" * (number % 9))) + "\n" for number in range(90))
    digests, folders = set(), set()
    settings: list[dict[str, Any]] = [
        {"workers": 1, "environment": {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONUTF8": "0"}},
        {"workers": 3, "environment": {"TZ": "America/St_Johns", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "7"}},
        {"workers": 2, "before": ("taskset", "-c", str(min(os.sched_getaffinity(0))))},
    ]
    for number, setting in enumerate(settings):
        place = tmp_path / f"place-{number}"
        place.mkdir()
        (place / "rows.jsonl").write_text(rows)
        # As a recipe names it: the working folder decides where it is.
        wanted = made_of(own_file("rows.jsonl"), "conversations", too_long="cut_at_turn")
        made = prepare_elsewhere(wanted, f"made-{number}", cwd=place, **setting)
        assert made.returncode == 0, made.stderr
        digests.add(made.stdout)
        folders.add(digest_folder(tmp_path / f"made-{number}"))
    assert len(digests) == len(folders) == 1


def test_a_run_shares_the_caches_files_and_keeps_them_when_it_is_gone(
    chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = own_rows(tmp_path, talk(0, "hello"), "nonsense")
    wanted = made_of(source, "conversations", faulty_share=0.5)
    description = prepare(wanted, chat, tokenizer, tmp_path / "made")
    folder, faulty = tmp_path / "run" / "d", tmp_path / "run" / "faulty.jsonl"
    for _ in range(2):
        link_dataset(tmp_path / "made", folder, faulty)
    assert (folder / "tokens.npy").samefile(tmp_path / "made" / "tokens.npy")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("dataset.json", "offsets.npy", "rows.jsonl", "targets.npy", "tokens.npy")
    ]
    assert "rows.jsonl row 2" in faulty.read_text()
    shutil.rmtree(tmp_path / "made")
    assert committed(folder, "key") == description


def test_a_full_disk_leaves_nothing_half_written(
    chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTTRAIN_FAULT", "prepare.dataset_written:full")
    with pytest.raises(OSError, match="No space left"):
        prepare(dataset("tools", "conversations"), chat, tokenizer, tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == [".d.lock"]


def test_a_folder_that_is_no_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no prepared dataset"):
        Shard(tmp_path)
    (tmp_path / "dataset.json").write_text('{"content": "text"}')
    with pytest.raises(DataError, match=r"lacks rows\.jsonl"):
        Shard(tmp_path)


def test_nothing_here_imports_torch() -> None:
    script = (
        "import sys, posttrain.phases.prepare, posttrain.data.vocabulary, posttrain.data.shard\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_another_version_of_the_code_does_not_find_what_this_one_made(monkeypatch, tmp_path):
    prepare_module._code_digest.cache_clear()
    before = prepare_module._code_digest()
    package = tmp_path / "posttrain"
    shutil.copytree(
        Path(prepare_module.__file__).parents[1], package, ignore=shutil.ignore_patterns("assets", "__pycache__")
    )
    monkeypatch.setattr(prepare_module, "__file__", str(package / "data" / "prepare.py"))
    prepare_module._code_digest.cache_clear()
    assert prepare_module._code_digest() == before
    (package / "worlds" / "tools.py").write_text("# another world\n")
    prepare_module._code_digest.cache_clear()
    assert prepare_module._code_digest() != before
    monkeypatch.undo()
    prepare_module._code_digest.cache_clear()


def test_a_sequence_shorter_than_its_prompt_is_a_fault_of_its_row(tokenizer: Tokenizer) -> None:
    """A template may write less once an answer follows; such a pair has no prompt to share and no completion."""

    class Forgetful:
        def prompt(self, conversation: Conversation) -> list[int]:
            return [1, 2, 3, 4]

        def render(self, conversation: Conversation) -> Rendered:
            return Rendered([1, 2], [False, True])

    pair = row("preferences", "pairs", "train", 0, 0)
    line = json.dumps(pair).encode()
    encode = Encoder(dataset("preferences", "pairs"), Forgetful(), tokenizer)  # type: ignore[arg-type]
    block = encode(Unread(0, 1, ["rows.jsonl row 1"], [line], Counter(), []))
    ((place, fault),) = block.faults
    assert place == "rows.jsonl row 1" and "the completion does not continue its prompt" in fault.reason
    assert block.rows == [] and len(block.tokens) == 0
