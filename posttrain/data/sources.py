"""Rows of a recipe's sources, one at a time: records are read, filtered, selected and converted to a content's rows."""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from posttrain.data import hub
from posttrain.data.filters import passes
from posttrain.data.formats.decision_table import with_rewards
from posttrain.data.formats.format import BadRow
from posttrain.data.formats.table import FORMATS, check_columns, check_content
from posttrain.data.records import matching, records
from posttrain.data.registry import Registry
from posttrain.data.rows import SHAPES, Fault, Row, checked, with_effort
from posttrain.errors import DataError
from posttrain.recipe.types import (
    CodeSource,
    DecisionTableSource,
    FileSource,
    HubSource,
    RegisteredSource,
    RowFormat,
    Selection,
    Source,
    WorldSource,
)
from posttrain.run.folder import digest_file, digest_folder
from posttrain.worlds import registry as worlds
from posttrain.worlds.code import mutate, trajectories
from posttrain.worlds.code.tree import folder_of, read_tree

Placed = Iterator[tuple[str, Row | Fault]]
Numbered = Iterator[tuple[str, dict[str, Any] | Fault]]
RecordSource = FileSource | HubSource | DecisionTableSource | RegisteredSource


def read_source(source: Source, content: str, counts: Counter[str] | None = None) -> Placed:
    """(place, row) of every selected row in order, with a Fault in place of a malformed one; nothing is held in memory.

    `counts` is told of what is no fault and yet not read: `filtered`, `unavailable`.
    DataError where the source as a whole cannot be read: no file, wrong columns, a format that makes other content.
    """
    counts = Counter() if counts is None else counts
    if isinstance(source, WorldSource):
        return _world(source, content)
    if isinstance(source, CodeSource):
        return _code(source, content, counts)
    name = _format(source)
    check_content(name, content, label(source))
    return _selected(source.selection, lambda found: _converted(source, name, content, found), counts)


def _format(source: RecordSource) -> RowFormat:
    match source:
        case RegisteredSource():
            return "rows"
        case DecisionTableSource():
            return "decision_table"
    return source.format


def label(source: Source) -> str:
    """What the source is called in places and ids: without folders, so that both are the same wherever it lies."""
    match source:
        case WorldSource():
            return f"world {source.world}"
        case FileSource() | DecisionTableSource() | CodeSource():
            return Path(source.path).name
        case RegisteredSource():
            return source.dataset
    parts = (source.repo, source.subset, source.files)
    return "/".join(part for part in parts if part) + f":{source.split}"


def local_files(source: Source) -> list[Path]:
    """The files on this machine that the source is read from."""
    match source:
        case FileSource() | DecisionTableSource():
            return [path for path in matching(source.path) if path.is_file()]
        case CodeSource():
            return [folder_of(source.path) / name for name in read_tree(source.path).files]
        case RegisteredSource():
            return [Registry.default().find(source.dataset).rows]
    return []


def content_digest(source: Source) -> str | None:
    """Digest of the bytes behind the source, or the commit they belong to; None where the source says it all itself."""
    match source:
        case FileSource() | DecisionTableSource():
            digests = [digest_file(path) for path in local_files(source)]
            return digests[0] if len(digests) == 1 else " ".join(digests) or None
        case CodeSource():
            return read_tree(source.path).digest
        case RegisteredSource():
            return Registry.default().find(source.dataset).digest
        case HubSource():
            copy = hub.mirrored(source)
            return source.revision if copy is None else digest_folder(copy)
    return None


def weight(source: Source) -> float | None:
    """A world makes as many rows as the recipe wants, so that it has no weight of its own."""
    return None if isinstance(source, WorldSource | CodeSource) else source.selection.weight


def repeat(source: Source) -> int:
    return 1 if isinstance(source, WorldSource | CodeSource) else source.selection.repeat


# ---------------------------------------------------------------- one source


def _world(source: WorldSource, content: str) -> Placed:
    made = worlds.rows(source.world, content, source.split, source.count, source.seed)
    shape = SHAPES[content]
    return ((f"world {source.world} row {number}", shape.model_validate(row)) for number, row in enumerate(made, 1))


def _code(source: CodeSource, content: str, counts: Counter[str]) -> Placed:
    """Mutants and tasks that became no row are counted as filtered."""
    makers: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
        "tasks": lambda tasks, seed, told: tasks,
        "conversations": trajectories.conversations,
        "pairs": trajectories.pairs,
    }
    if content not in makers:
        raise DataError(f"a source tree makes no {content}; it makes {', '.join(makers)}")
    told: Counter[str] = Counter()
    split = None if source.split == "all" else source.split
    made = mutate.tasks(source.path, source.language, split, source.count, told)
    for number, row in enumerate(makers[content](made, source.seed, told), 1):
        counts["filtered"] = mutate.dropped(told)
        yield f"{label(source)} mutant {number}", SHAPES[content].model_validate(row)
    counts["filtered"] = mutate.dropped(told)


def _selected(selection: Selection, read: Callable[[Counter[str]], Placed], counts: Counter[str]) -> Placed:
    """The first `max_samples` good rows, or so many drawn at random: then the source is read once to count them."""
    if selection.max_samples is None or selection.seed is None:
        yield from _first(read(counts), selection.max_samples)
        return
    good = sum(isinstance(row, Row) for _, row in read(Counter()))
    chosen = set(random.Random(selection.seed).sample(range(good), min(good, selection.max_samples)))
    number = -1
    for place, row in read(counts):
        if isinstance(row, Fault):
            yield place, row
            continue
        number += 1
        if number in chosen:
            yield place, row


def _first(placed: Placed, most: int | None) -> Placed:
    good = 0
    for place, row in placed:
        yield place, row
        good += isinstance(row, Row)
        if good == most:
            return


def _converted(source: RecordSource, name: RowFormat, content: str, counts: Counter[str]) -> Placed:
    columns_seen = False
    for number, (place, record) in enumerate(_records(source, counts), 1):
        if isinstance(record, Fault):
            yield place, record
            continue
        if not columns_seen:
            check_columns(name, record, label(source))
            columns_seen = True
        if not passes(record, source.filters):
            counts["filtered"] += 1
            continue
        row = _row(record, name, content, f"{label(source)}:{number}")
        if isinstance(row, Row) and source.reasoning_effort is not None:
            row = with_effort(row, source.reasoning_effort)
        yield place, row


def _row(record: dict[str, Any], name: RowFormat, content: str, row_id: str) -> Row | Fault:
    if name == "rows":
        return checked(record, content)
    try:
        return checked({"id": row_id, **FORMATS[name].makes[content](record)}, content)
    except BadRow as bad:
        return Fault(bad.field, bad.reason)


def _records(source: RecordSource, counts: Counter[str]) -> Numbered:
    match source:
        case HubSource():
            yield from _hub(source, counts)
        case FileSource():
            yield from _files(source.path)
        case DecisionTableSource():
            for place, record in _files(source.path):
                yield place, record if isinstance(record, Fault) else _rewarded(record, source.tau)
        case RegisteredSource():
            for number, record in enumerate(records(Registry.default().find(source.dataset).rows), 1):
                yield f"{source.dataset} row {number}", record


def _files(pattern: str) -> Numbered:
    for path in matching(pattern):
        for number, record in enumerate(records(path), 1):
            yield f"{path} row {number}", record


def _rewarded(record: dict[str, Any], tau: float) -> dict[str, Any] | Fault:
    try:
        return with_rewards(record, tau)
    except BadRow as bad:
        return Fault(bad.field, bad.reason)


def _hub(source: HubSource, counts: Counter[str]) -> Numbered:
    place = " ".join(part for part in (source.repo, source.subset, source.files, source.split) if part)
    try:
        for number, record in enumerate(hub.hub_records(source), 1):
            yield f"{place} row {number}", record
    except hub.Unavailable as error:
        if not source.optional:
            raise DataError(f"{error}; a recipe may go on without it by `optional=True`") from error
        counts["unavailable"] += 1
        print(f"warning: {error}; going on without it", file=sys.stderr, flush=True)
