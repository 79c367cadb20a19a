"""Filters of a recipe on a record."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.recipe.types import Filter, OneOf, Part, TextLength


def passes(record: Mapping[str, Any], filters: Sequence[Filter]) -> bool:
    """Whether all hold; a column that is missing, or no text where one is needed, holds none."""
    return all(_holds(one, record) for one in filters)


def _holds(one: Filter, record: Mapping[str, Any]) -> bool:
    if isinstance(one, OneOf):
        value = column(record, one.column)
        return any(value == wanted and type(value) is type(wanted) for wanted in one.values)
    if isinstance(one, TextLength):
        value = column(record, one.column)
        most = math.inf if one.at_most is None else one.at_most
        return isinstance(value, str) and one.at_least <= len(value) <= most
    if isinstance(one, Part):
        value = column(record, one.column)
        return value is not None and part_of(value, one.of) in one.keep
    first, second = column(record, one.first), column(record, one.second)
    if not isinstance(first, str) or not isinstance(second, str):
        return False
    return first != second and abs(len(first) - len(second)) <= one.at_most


def column(record: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or of a field nested in it; None where there is none."""
    if path in record:
        return record[path]
    value: Any = record
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def part_of(value: Any, parts: int) -> int:
    """In which of so many equal parts a value falls."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") % parts
