"""The row shapes, one per content, and reading them from worlds and JSONL files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posttrain.chat.conversation import Conversation, Message
from posttrain.errors import DataError
from posttrain.recipe.types import Dataset, JsonlSource, Source
from posttrain.worlds import registry


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, Field(min_length=1)]


class TextRow(Row):
    text: Annotated[str, Field(min_length=1)]


class ConversationRow(Row):
    conversation: Conversation


class PairRow(Row):
    prompt: Conversation
    chosen: Annotated[tuple[Message, ...], Field(min_length=1)]
    rejected: Annotated[tuple[Message, ...], Field(min_length=1)]


class TaskRow(Row):
    world: str
    prompt: Conversation
    reference: dict[str, Any]
    solution: tuple[Message, ...]


SHAPES: dict[str, type[Row]] = {
    "text": TextRow,
    "conversations": ConversationRow,
    "pairs": PairRow,
    "tasks": TaskRow,
}


def _reasons(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'row'}: {fault['msg']}" for fault in error.errors())


def _checked(value: Any, content: str, where: str) -> Row:
    try:
        row = SHAPES[content].model_validate(value)
    except ValidationError as error:
        raise DataError(f"{where}: {_reasons(error)}. Rows of content {content!r} are expected") from None
    if isinstance(row, TaskRow) and row.world not in registry.ENVIRONMENTS:
        known = ", ".join(sorted(registry.ENVIRONMENTS))
        raise DataError(f"{where}: world: {row.world!r} plays no tasks; {known} do")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _jsonl(path: Path, content: str) -> Iterator[tuple[str, Row]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not data.strip():
        raise DataError(f"{path}: there is no row in it")
    lines = data.split(b"\n")
    ended = lines[-1] == b""
    for number, line in enumerate(lines[:-1] if ended else lines, 1):
        where = f"{path} row {number}"
        try:
            value = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 at byte {error.start}") from None
        except (ValueError, RecursionError) as error:
            cut = not ended and number == len(lines)
            reason = "an empty line" if not line.strip() else f"not JSON: {error}"
            hint = " (the file ends inside this row: it is truncated)" if cut else ""
            raise DataError(f"{where}: {reason}{hint}") from None
        yield where, _checked(value, content, where)


def _source(source: Source, content: str) -> Iterator[tuple[str, Row]]:
    if isinstance(source, JsonlSource):
        yield from _jsonl(Path(source.path), content)
        return
    shape = SHAPES[content]
    made = registry.rows(source.world, content, source.split, source.count, source.seed)
    for number, value in enumerate(made, 1):
        yield f"world {source.world} row {number}", shape.model_validate(value)


def read_rows(dataset: Dataset) -> Iterator[Row]:
    """Every row of every source in order. DataError names source, row and reason; ids are unique in a dataset."""
    return (row for _, row in _placed(dataset))


def place_of(dataset: Dataset, row_id: str) -> str:
    """Source and number of a row, for a message about it."""
    return next(where for where, row in _placed(dataset) if row.id == row_id)


def _placed(dataset: Dataset) -> Iterator[tuple[str, Row]]:
    seen: dict[str, str] = {}
    for source in dataset.sources:
        for where, row in _source(source, dataset.content):
            if row.id in seen:
                raise DataError(f"{where}: id {row.id!r} is already that of {seen[row.id]}, in dataset {dataset.name}")
            seen[row.id] = where
            yield where, row
