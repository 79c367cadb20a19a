"""Prepares one dataset: rows are read, checked, rendered by several processes, and committed as one folder.

The folder is made in a cache under the digest of what it is made from, and linked into the run.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.chat.render import renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.encode import Encoder, Unread, id_digest
from posttrain.data.faulty import FaultyRows
from posttrain.data.rows import Fault, Row
from posttrain.data.shard import FILES
from posttrain.data.shard_writer import FAULTY, ShardWriter
from posttrain.data.sources import content_digest, read_source, repeat, weight
from posttrain.errors import DataError
from posttrain.host.workers import in_order
from posttrain.recipe.types import ChatFormat, Dataset, HubSource
from posttrain.run import faults
from posttrain.run.folder import digest_file, digest_json, fsync_folder, write_json_atomic

BLOCK = 64
"""Rows that one process renders at a time: few, so that no process waits long for the first or for the last."""


def content_key(dataset: Dataset, chat: ChatFormat, tokenizer: Tokenizer, asker: str) -> str:
    """What the prepared bytes depend on: sources, the bytes behind them, the chat format, the tokenizer, the code.

    Not on where files lie, nor on what the dataset is called. Where it cannot be known what a source will hold, as with
    the newest revision of a hub's dataset, nobody shares it with `asker`.
    """
    digests = [content_digest(source) for source in dataset.sources]
    unknown = [
        isinstance(source, HubSource) and digest is None
        for source, digest in zip(dataset.sources, digests, strict=True)
    ]
    told = dataset.model_dump(mode="json", exclude={"name"})
    for source in told["sources"]:
        if "path" in source:
            source["path"] = Path(source["path"]).name
    return digest_json(
        {
            "dataset": told,
            "sources": digests,
            "asker": asker if any(unknown) else None,
            "chat": chat.model_dump(mode="json"),
            "tokenizer": tokenizer.digest,
            "code": _code_digest(),
        }
    )


@cache
def _code_digest() -> str:
    """Of the rooms that make the prepared bytes: what another version of them made is not found."""
    package = Path(__file__).parents[1]
    files = sorted(path for room in ("chat", "data", "worlds") for path in (package / room).rglob("*.py"))
    return digest_json([[path.relative_to(package).as_posix(), digest_file(path)] for path in files])


def prepare_dataset(
    dataset: Dataset,
    chat: ChatFormat,
    tokenizer: Tokenizer,
    folder: Path,
    key: str,
    workers: int,
    advance: Callable[[float], None],
) -> dict[str, Any]:
    """Write `folder` in one rename and return its description; one that is there and verifies is kept.

    More rows that are no good than the recipe allows raise DataError. After a kill it goes on from the last part that
    was saved. `advance` is told of rows that are done, a block at a time.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    with _alone(folder):
        description = committed(folder, key)
        if description is not None and not description["counts"]["unavailable"]:
            shutil.rmtree(partial, ignore_errors=True)
            return description
        writer = ShardWriter(partial, dataset.content)
        try:
            _write(dataset, Encoder(dataset, renderer(chat, tokenizer), tokenizer), writer, workers, advance)
            return _commit(dataset, writer, folder, key)
        except (OSError, DataError):
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            writer.close()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for another process that makes the same folder."""
    lock = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _write(
    dataset: Dataset, encoder: Encoder, writer: ShardWriter, workers: int, advance: Callable[[float], None]
) -> None:
    advance(writer.rows_read)
    faulty = FaultyRows(dataset, writer.reasons)
    for unread, block in in_order(encoder, _unread(dataset, writer.source, writer.source_read), workers):
        block.faults = [*unread.faults, *block.faults]
        faulty.add(block.faults)
        writer.append(block, unread.source, unread.rows)
        advance(unread.rows)
    faulty.check(writer.rows_read)
    repeated = writer.repeated_ids()
    if repeated:
        raise DataError(_name_repeated(dataset, repeated))
    # Whoever lets every source be missing lets the dataset be empty.
    if not writer.num_rows and writer.counts["unavailable"] < len(dataset.sources):
        raise DataError(
            f"dataset {dataset.name}: none of its rows is left ({dict(writer.counts)}); raise max_tokens "
            f"above {dataset.max_tokens}, or check its rows"
        )


def _unread(dataset: Dataset, first_source: int, first_row: int) -> Iterator[Unread]:
    """The rows of every source in blocks, which do not depend on who renders them."""
    for number, source in enumerate(dataset.sources[first_source:], first_source):
        counts: Counter[str] = Counter()
        placed = read_source(source, dataset.content, counts)
        for _ in islice(placed, first_row if number == first_source else 0):
            pass
        counted = counts.copy()
        while (block := list(islice(placed, BLOCK))) or counts != counted:
            good = [(place, row) for place, row in block if isinstance(row, Row)]
            passed_over, counted = counts - counted, counts.copy()
            yield Unread(
                source=number,
                rows=len(block),
                places=[place for place, _ in good],
                lines=[row.model_dump_json().encode() + b"\n" for _, row in good],
                passed_over=passed_over,
                faults=[(place, fault) for place, fault in block if isinstance(fault, Fault)],
            )


def _name_repeated(dataset: Dataset, repeated: set[int]) -> str:
    """Reads the sources again for the first id that comes twice: who has no such id need not remember any."""
    seen: dict[str, str] = {}
    for source in dataset.sources:
        for place, row in read_source(source, dataset.content):
            if isinstance(row, Row) and id_digest(row.id) in repeated:
                if row.id in seen:
                    return f"{place}: id {row.id!r} is already that of {seen[row.id]}, in dataset {dataset.name}"
                seen[row.id] = place
    raise AssertionError("two different ids have one digest of 64 bits")


def _commit(dataset: Dataset, writer: ShardWriter, folder: Path, key: str) -> dict[str, Any]:
    writer.finish()
    description = _description(dataset, writer, key)
    write_json_atomic(writer.data / "dataset.json", description)
    faults.reach("prepare.dataset_written")
    shutil.rmtree(folder, ignore_errors=True)
    faults.reach("prepare.before_commit")
    writer.data.rename(folder)
    fsync_folder(folder.parent)
    shutil.rmtree(writer.folder)
    return description


def _description(dataset: Dataset, writer: ShardWriter, key: str) -> dict[str, Any]:
    counts = {
        "rows": writer.num_rows,
        "dropped_too_long": writer.counts["dropped_too_long"],
        "cut_at_turn": writer.counts["cut_at_turn"],
        "faulty": sum(writer.reasons.values()),
        "filtered": writer.counts["filtered"],
        "unavailable": writer.counts["unavailable"],
    }
    if dataset.content != "tasks":
        counts |= {"tokens": writer.num_tokens, "target_tokens": writer.counts["target_tokens"]}
    parts = [
        {
            "rows": writer.parts[number]["rows"],
            "samples": writer.parts[number]["samples"],
            "weight": weight(source),
            "repeat": repeat(source),
        }
        for number, source in enumerate(dataset.sources)
    ]
    files = {name: digest_file(writer.data / name) for name in FILES[dataset.content]}
    return {
        "content": dataset.content,
        "key": key,
        "counts": counts,
        "faulty": dict(sorted(writer.reasons.items())),
        "parts": parts,
        "files": files,
        "digest": digest_json({"files": files, "parts": parts}),
    }


def committed(folder: Path, key: str) -> dict[str, Any] | None:
    """The description of an already prepared dataset, if it is of this key and its files still have their digests."""
    try:
        description: dict[str, Any] = json.loads((folder / "dataset.json").read_text())
        if description["key"] != key:
            return None
        for name, digest in description["files"].items():
            if digest_file(folder / name) != digest:
                return None
    except (OSError, ValueError, KeyError):
        return None
    return description


def link_dataset(made: Path, folder: Path, faulty: Path) -> None:
    """Put the prepared folder `made` at `folder` in one rename, and the list of its faulty rows at `faulty`.

    Files are shared where both lie on one file system, and copied elsewhere: either way the run keeps them if the cache
    is removed. The list of faulty rows names places and is no part of the data.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for file in sorted(made.iterdir()):
            if file.name != FAULTY:
                _link(file, temporary / file.name)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(folder.parent)
    faulty.unlink(missing_ok=True)
    if (made / FAULTY).stat().st_size:
        faulty.parent.mkdir(parents=True, exist_ok=True)
        _link(made / FAULTY, faulty)


def _link(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:
        # Another file system, or one without links.
        shutil.copy2(file, place)
