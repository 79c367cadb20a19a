"""Prepared datasets hold what the renderer says, and are there whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.chat.conversation import Conversation, Message
from posttrain.chat.render import renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.prepare import committed, prepare_dataset, spec_digest
from posttrain.data.shard import Shard
from posttrain.errors import DataError
from posttrain.recipe.types import EVERY_ROW, Dataset, FileSource, HarmonyFormat, WorldSource
from posttrain.run.folder import digest_folder
from posttrain.worlds.registry import row, rows


def dataset(world: str, content: str, count: int = 30, max_tokens: int = 2048) -> Dataset:
    source = WorldSource(kind="world", world=world, split="train", count=count, seed=0)
    return Dataset.model_validate({"name": world, "content": content, "sources": (source,), "max_tokens": max_tokens})


def prepare(wanted: Dataset, chat: HarmonyFormat, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    return prepare_dataset(wanted, chat, tokenizer, folder, "spec", lambda amount: None)


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
    assert not (tmp_path / "e").exists()


def _whole(chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    prepare(dataset("tools", "conversations"), chat, tokenizer, tmp_path / "whole")
    return tmp_path / "whole"


def test_a_row_without_targets_is_dropped(chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    silent = {"messages": [{"role": "user", "content": "hello"}]}
    spoken = {"messages": [*silent["messages"], {"role": "assistant", "channel": "final", "content": "hello"}]}
    lines = [{"id": "a", "conversation": silent}, {"id": "b", "conversation": spoken}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wanted = Dataset(
        name="own",
        content="conversations",
        sources=(
            FileSource(
                kind="file", path=str(file), format="rows", filters=(), selection=EVERY_ROW, reasoning_effort=None
            ),
        ),
        max_tokens=512,
    )
    description = prepare(wanted, chat, tokenizer, tmp_path / "d")
    assert description["counts"]["rows"] == 1 and description["counts"]["dropped_without_targets"] == 1
    assert Shard(tmp_path / "d").row(0)["id"] == "b"


def test_a_prepared_folder_is_recognised_until_a_byte_changes(
    chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    description = prepare(dataset("tools", "conversations"), chat, tokenizer, tmp_path / "d")
    assert committed(tmp_path / "d", "spec") == description
    assert committed(tmp_path / "d", "another") is None
    data = bytearray((tmp_path / "d" / "tokens.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "d" / "tokens.npy").write_bytes(data)
    assert committed(tmp_path / "d", "spec") is None


def test_the_spec_follows_the_bytes_of_a_file(chat: HarmonyFormat, tokenizer_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    wanted = Dataset(
        name="own",
        content="text",
        sources=(
            FileSource(
                kind="file", path=str(file), format="rows", filters=(), selection=EVERY_ROW, reasoning_effort=None
            ),
        ),
        max_tokens=9,
    )
    file.write_text('{"id":"a","text":"b"}\n')
    first = spec_digest(wanted, chat, tokenizer_folder / "tokenizer.json")
    file.write_text('{"id":"a","text":"c"}\n')
    assert spec_digest(wanted, chat, tokenizer_folder / "tokenizer.json") != first


KILLED = """
import sys
from pathlib import Path
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.prepare import prepare_dataset
from posttrain.recipe.types import Dataset, HarmonyFormat
wanted, chat, tokenizer, folder = sys.argv[1:]
prepare_dataset(
    Dataset.model_validate_json(wanted), HarmonyFormat.model_validate_json(chat), Tokenizer.load(Path(tokenizer)),
    Path(folder), "spec", lambda amount: None,
)
"""


@pytest.mark.parametrize("point", ["prepare.dataset_written", "prepare.before_commit"])
@pytest.mark.parametrize("old", [False, True])
def test_killed_before_the_rename_there_is_no_new_folder_and_again_the_same_bytes(
    point: str, old: bool, chat: HarmonyFormat, tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    wanted = dataset("tools", "conversations")
    prepare(wanted, chat, tokenizer, tmp_path / "undisturbed")
    folder = tmp_path / "d"
    if old:
        prepare(dataset("tools", "conversations", count=3), chat, tokenizer, folder)
    arguments = [wanted.model_dump_json(), chat.model_dump_json(), str(tokenizer_folder), str(folder)]
    environment = os.environ | {"POSTTRAIN_FAULT": f"{point}:kill"}
    ended = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not folder.exists() or Shard(folder).num_rows == 3
    prepare(wanted, chat, tokenizer, folder)
    assert digest_folder(folder) == digest_folder(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "undisturbed"]


def test_a_full_disk_leaves_nothing_half_written(
    chat: HarmonyFormat, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTTRAIN_FAULT", "prepare.dataset_written:full")
    with pytest.raises(OSError, match="No space left"):
        prepare(dataset("tools", "conversations"), chat, tokenizer, tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


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
