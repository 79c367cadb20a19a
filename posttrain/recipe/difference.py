"""The difference of two recipes, field by field."""

import json
from collections.abc import Iterator
from typing import Any

from posttrain.recipe.types import Recipe


def difference(old: Recipe, new: Recipe) -> list[str]:
    """One line per differing field: its path, the value in `old`, the value in `new`."""
    pairs = _walk("", old.model_dump(mode="json"), new.model_dump(mode="json"))
    return [f"{path}: {_short(was)} -> {_short(now)}" for path, was, now in pairs]


_ABSENT = object()


def _walk(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            place = f"{path}.{key}" if path else key
            yield from _walk(place, old.get(key, _ABSENT), new.get(key, _ABSENT))
    elif isinstance(old, list) and isinstance(new, list):
        names = _element_names(old, new)
        for index in range(max(len(old), len(new))):
            was = old[index] if index < len(old) else _ABSENT
            now = new[index] if index < len(new) else _ABSENT
            yield from _walk(f"{path}[{names.get(index, index)}]", was, now)
    elif old != new:
        yield path, old, new


def _element_names(old: list[Any], new: list[Any]) -> dict[int, str]:
    """Elements that carry the same name on both sides are shown by it."""
    return {
        index: was["name"]
        for index, (was, now) in enumerate(zip(old, new, strict=False))
        if isinstance(was, dict) and isinstance(now, dict) and was.get("name") is not None
        if was.get("name") == now.get("name")
    }


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
