"""The row shapes, one per content, and reading them from worlds and JSONL files."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posttrain.chat.conversation import Conversation, Message
from posttrain.errors import DataError
from posttrain.recipe.types import JsonlSource, Source
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


@dataclass(frozen=True)
class Fault:
    """A malformed row: the field (`row` for all of it) and the reason."""

    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


def _checked(value: Any, content: str) -> "Row | Fault":
    try:
        row = SHAPES[content].model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        return Fault(".".join(map(str, first["loc"])) or "row", first["msg"])
    if isinstance(row, TaskRow) and row.world not in registry.ENVIRONMENTS:
        known = ", ".join(sorted(registry.ENVIRONMENTS))
        return Fault("world", f"{row.world!r} plays no tasks; {known} do")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _jsonl(path: Path, content: str) -> Iterator[tuple[str, Row | Fault]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    with file:
        number = 0
        for number, line in enumerate(file, 1):
            yield f"{path} row {number}", _parsed(line, content)
        if not number:
            raise DataError(f"{path}: there is no row in it")


def _parsed(line: bytes, content: str) -> Row | Fault:
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return Fault("row", f"not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        hint = "" if line.endswith(b"\n") else " (the file ends inside this row: it is truncated)"
        return Fault("row", f"not JSON: {error}{hint}" if line.strip() else "an empty line")
    return _checked(value, content)


def read_source(source: Source, content: str) -> Iterator[tuple[str, Row | Fault]]:
    """(place, row) of every row in order, with a Fault in place of a malformed one; nothing is held in memory."""
    if isinstance(source, JsonlSource):
        yield from _jsonl(Path(source.path), content)
        return
    shape = SHAPES[content]
    made = registry.rows(source.world, content, source.split, source.count, source.seed)
    for number, value in enumerate(made, 1):
        yield f"world {source.world} row {number}", shape.model_validate(value)


def weight(source: Source) -> float:
    return 1.0


def repeat(source: Source) -> int:
    return 1
