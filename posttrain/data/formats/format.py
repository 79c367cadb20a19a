"""What a row format is: the columns it needs, and one pure function from a record to a row's fields per content."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
Fields = dict[str, Any]
"""A row of `posttrain.data.rows` without its id."""


class BadRow(Exception):
    """A record that cannot become a row: the field at fault and the reason."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


@dataclass(frozen=True)
class Format:
    columns: tuple[str, ...]
    """Without these a source is refused before its first row."""
    makes: Mapping[str, Callable[[Record], Fields]]
    """By content."""
    reads: str
    """Whose rows these are, for the documentation and for messages."""

    def fits(self, columns: frozenset[str]) -> bool:
        return columns.issuperset(self.columns)


def text(record: Record, column: str) -> str:
    """A column that must be text and not blank, as it is."""
    value = record.get(column)
    if value is None:
        raise BadRow(column, "is missing")
    if not isinstance(value, str):
        raise BadRow(column, f"is {kind(value)}, not text")
    if not value.strip():
        raise BadRow(column, "is empty")
    return value


def optional_text(record: Record, column: str) -> str | None:
    """As `text`, but a missing or blank column is None."""
    value = record.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return text(record, column)


def items(record: Record, column: str) -> list[Any]:
    """A column that must be a list with something in it."""
    value = record.get(column)
    if value is None:
        raise BadRow(column, "is missing")
    if not isinstance(value, list):
        raise BadRow(column, f"is {kind(value)}, not a list")
    if not value:
        raise BadRow(column, "is empty")
    return value


def from_json(value: Any, field: str) -> Any:
    """The value of JSON text; what is no text is already a value."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadRow(field, f"is not JSON: {error}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def kind(value: Any) -> str:
    """What JSON calls the value's type."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
