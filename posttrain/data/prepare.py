"""Prepares one dataset: rows are read and checked, rendered to tokens and targets, and committed as one folder."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.chat.conversation import Conversation
from posttrain.chat.render import Renderer, renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.rows import ConversationRow, PairRow, Row, TaskRow, TextRow
from posttrain.data.shard import FILES
from posttrain.data.sources import content_digest, place_of, read_rows
from posttrain.errors import ChatFormatError, DataError
from posttrain.recipe.types import ChatFormat, Dataset
from posttrain.run import faults
from posttrain.run.folder import digest_file, digest_json, fsync_folder, write_atomic, write_json_atomic

END_OF_TEXT = "<|endoftext|>"
BATCH = 256
Sequence = tuple[list[int], list[bool]]


@dataclass
class Encoded:
    """What has been kept so far, and what has not."""

    rows: list[bytes] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def drop(self, row: Row, sequences: list[Sequence], max_tokens: int) -> bool:
        """Whether the row must be left out, which is counted."""
        if any(len(tokens) > max_tokens for tokens, _ in sequences):
            self.counts["dropped_too_long"] += 1
            return True
        if any(not any(targets) for _, targets in sequences) and not isinstance(row, TaskRow):
            self.counts["dropped_without_targets"] += 1
            return True
        return False

    def keep(self, row: Row, sequences: list[Sequence]) -> None:
        self.rows.append((row.model_dump_json() + "\n").encode())
        if isinstance(row, TaskRow):
            return
        for tokens, targets in sequences:
            self.tokens.append(np.array(tokens, dtype=np.int32))
            self.targets.append(np.array(targets, dtype=bool))


def spec_digest(dataset: Dataset, chat: ChatFormat, tokenizer_file: Path) -> str:
    """What the prepared bytes depend on: the dataset, the bytes behind its sources, the chat format, the tokenizer."""
    return digest_json(
        {
            "dataset": dataset.model_dump(mode="json"),
            "sources": [content_digest(source) for source in dataset.sources],
            "chat": chat.model_dump(mode="json"),
            "tokenizer": digest_file(tokenizer_file),
        }
    )


def prepare_dataset(
    dataset: Dataset,
    chat: ChatFormat,
    tokenizer: Tokenizer,
    folder: Path,
    spec: str,
    advance: Callable[[float], None],
) -> dict[str, Any]:
    """Write `folder` in one rename and return its description; nothing is written unless every row can be read.

    `advance` is told of progress a batch at a time: half a row when it is read, half when it is rendered.
    """
    render, encoded = renderer(chat, tokenizer), Encoded()
    rows = list(_in_batches(read_rows(dataset), advance))
    for row in _in_batches(rows, advance):
        try:
            sequences = _sequences(row, render, tokenizer)
        except ChatFormatError as error:
            raise DataError(f"{place_of(dataset, row.id)}: id {row.id!r} cannot be rendered: {error}") from error
        if not encoded.drop(row, sequences, dataset.max_tokens):
            encoded.keep(row, sequences)
            if isinstance(row, PairRow):
                encoded.prefixes.append(len(render.prompt(row.prompt)))
    if not encoded.rows:
        raise DataError(
            f"dataset {dataset.name}: none of its rows is left ({dict(encoded.counts)}); raise max_tokens "
            f"above {dataset.max_tokens}, or check its rows"
        )
    return _commit(dataset, encoded, folder, spec)


def _in_batches(rows: Iterable[Row], advance: Callable[[float], None]) -> Iterator[Row]:
    passed = 0
    for row in rows:
        yield row
        passed += 1
        if passed == BATCH:
            advance(passed / 2)
            passed = 0
    advance(passed / 2)


def _sequences(row: Row, render: Renderer, tokenizer: Tokenizer) -> list[Sequence]:
    """The token sequences that a row is trained on or, for a task, its prompt."""
    match row:
        case TextRow():
            tokens = [*tokenizer.encode_with_specials(row.text), tokenizer.special(END_OF_TEXT)]
            # Nothing stands before the first token that could predict it.
            return [(tokens, [False] + [True] * (len(tokens) - 1))]
        case ConversationRow():
            rendered = render.render(row.conversation)
            return [(rendered.tokens, rendered.targets)]
        case PairRow():
            return [_completion(row.prompt, messages, render) for messages in (row.chosen, row.rejected)]
        case TaskRow():
            tokens = render.prompt(row.prompt)
            return [(tokens, [False] * len(tokens))]
    raise AssertionError(type(row))


def _completion(prompt: Conversation, messages: tuple[Any, ...], render: Renderer) -> Sequence:
    """Prompt and completion, with targets in the completion only: turns before it are context."""
    start = render.prompt(prompt)
    whole = render.render(prompt.model_copy(update={"messages": (*prompt.messages, *messages)}))
    if whole.tokens[: len(start)] != start:
        raise ChatFormatError("the completion does not continue its prompt")
    targets = [False] * len(start) + whole.targets[len(start) :]
    return whole.tokens, targets


def _commit(dataset: Dataset, encoded: Encoded, folder: Path, spec: str) -> dict[str, Any]:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_atomic(temporary / "rows.jsonl", b"".join(encoded.rows))
        if dataset.content != "tasks":
            lengths = [len(tokens) for tokens in encoded.tokens]
            _write_array(temporary / "tokens.npy", np.concatenate(encoded.tokens))
            _write_array(temporary / "targets.npy", np.concatenate(encoded.targets))
            _write_array(temporary / "offsets.npy", np.concatenate(([0], np.cumsum(lengths))).astype(np.int64))
        if dataset.content == "pairs":
            _write_array(temporary / "prefix.npy", np.array(encoded.prefixes, dtype=np.int32))
        description = _description(dataset, encoded, temporary, spec)
        write_json_atomic(temporary / "dataset.json", description)
        faults.reach("prepare.dataset_written")
        shutil.rmtree(folder, ignore_errors=True)
        faults.reach("prepare.before_commit")
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(folder.parent)
    return description


def _write_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _description(dataset: Dataset, encoded: Encoded, folder: Path, spec: str) -> dict[str, Any]:
    counts = {
        "rows": len(encoded.rows),
        "dropped_too_long": encoded.counts["dropped_too_long"],
        "dropped_without_targets": encoded.counts["dropped_without_targets"],
    }
    if dataset.content != "tasks":
        counts["tokens"] = sum(len(tokens) for tokens in encoded.tokens)
        counts["target_tokens"] = sum(int(targets.sum()) for targets in encoded.targets)
    files = {name: digest_file(folder / name) for name in FILES[dataset.content]}
    return {"content": dataset.content, "spec": spec, "counts": counts, "files": files, "digest": digest_json(files)}


def committed(folder: Path, spec: str) -> dict[str, Any] | None:
    """The description of an already prepared dataset, if it is of this spec and its files still have their digests."""
    try:
        description: dict[str, Any] = json.loads((folder / "dataset.json").read_text())
        if description["spec"] != spec:
            return None
        for name, digest in description["files"].items():
            if digest_file(folder / name) != digest:
                return None
    except (OSError, ValueError, KeyError):
        return None
    return description
