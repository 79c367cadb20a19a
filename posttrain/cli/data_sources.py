"""What the options of `posttrain data add` and `build` say, as sources of a recipe."""

import sys
from typing import Any

from posttrain.data.formats.table import FORMATS, fitting
from posttrain.data.records import matching, records
from posttrain.data.registry import Registry
from posttrain.data.rows import SHAPES
from posttrain.errors import DataError, InputError
from posttrain.recipe.load import find
from posttrain.recipe.spelling import did_you_mean
from posttrain.recipe.types import (
    EVERY_ROW,
    Filter,
    HubSource,
    OneOf,
    PreparePhase,
    RegisteredSource,
    RowFormat,
    Source,
)


def parse_filters(given: tuple[str, ...]) -> tuple[Filter, ...]:
    """`column=value`; a value that reads as a number or a boolean stands for both it and its text."""
    filters: list[Filter] = []
    for text in given:
        column, equals, value = text.partition("=")
        if not column or not equals:
            raise InputError(f"--filter {text!r}: write it as COLUMN=VALUE")
        values: list[str | int | bool] = [value]
        if value in ("true", "false"):
            values.append(value == "true")
        elif value.lstrip("-").isdecimal():
            values.append(int(value))
        filters.append(OneOf(kind="one_of", column=column, values=tuple(values)))
    return tuple(filters)


def checked_format(name: str) -> RowFormat:
    known: list[RowFormat] = ["rows", *FORMATS]
    for one in known:
        if one == name:
            return one
    raise InputError(f"there is no row format {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")


def guessed_format(file: str) -> RowFormat:
    """Our own rows, or the format that needs the most of the columns there are; a tie has to be decided."""
    first = next((record for record in records(matching(file)[0]) if isinstance(record, dict)), None)
    if first is None:
        raise DataError(f"{file}: not one record can be read")
    if "id" in first and ({"conversation", "text", "reference"} & first.keys() or {"prompt", "chosen"} <= first.keys()):
        return "rows"
    fits = fitting(first)
    if not fits:
        raise DataError(f"{file}: no format fits the columns {', '.join(first)}; docs/data.md lists what each needs")
    best = [name for name in fits if len(FORMATS[name].columns) == len(FORMATS[fits[0]].columns)]
    if len(best) > 1:
        raise InputError(f"{file}: its columns fit {', '.join(best)}: say which with --format")
    print(f"format {fits[0]}", file=sys.stderr)
    return fits[0]


def content_of(name: RowFormat, given: str | None) -> str:
    made = list(SHAPES) if name == "rows" else list(FORMATS[name].makes)
    if given is not None:
        return given
    if len(made) > 1:
        raise InputError(f"format {name} can make {' and '.join(made)}: say which with --content")
    return made[0]


def recipe_sources(recipe: str, dataset: str | None) -> tuple[str, list[Source]]:
    phases = find(recipe).build({}).phases
    datasets = {one.name: one for phase in phases if isinstance(phase, PreparePhase) for one in phase.datasets}
    if dataset not in datasets:
        near = did_you_mean(dataset or "", datasets)
        raise InputError(f"--dataset {dataset!r}: recipe {recipe!r} has {', '.join(datasets) or 'none'}{near}")
    return datasets[dataset].content, list(datasets[dataset].sources)


def registered_sources(
    registry: Registry, keys: tuple[str, ...], filters: tuple[Filter, ...]
) -> tuple[str, list[Source]]:
    contents = {registry.find(key).content for key in keys}
    if len(contents) > 1:
        raise InputError(f"--from: one dataset has one content, these have {' and '.join(sorted(contents))}")
    sources: list[Source] = [
        RegisteredSource(kind="registered", dataset=key, filters=filters, selection=EVERY_ROW, reasoning_effort=None)
        for key in keys
    ]
    return contents.pop(), sources


def hub_sources(
    repo: str, given: dict[str, Any], filters: tuple[Filter, ...], content: str | None
) -> tuple[str, list[Source]]:
    if not given["row_format"]:
        raise InputError("--hub needs --format: how its columns become rows")
    source = HubSource(
        kind="hub",
        repo=repo,
        subset=given["subset"],
        split=given["split"],
        revision=given["revision"],
        files=given["hub_files"],
        format=checked_format(given["row_format"]),
        filters=filters,
        selection=EVERY_ROW,
        reasoning_effort=None,
        optional=False,
    )
    return content_of(source.format, content), [source]
