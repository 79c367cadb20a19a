"""A recipe function's parameters as flags: name, type, default and help text."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from posttrain.errors import RecipeError
from posttrain.recipe.types import Recipe

FlagValue = str | int | float | bool | None
RecipeFunction = Callable[..., Recipe]


@dataclass(frozen=True)
class Flag:
    name: str
    type: type
    default: FlagValue
    choices: tuple[FlagValue, ...]
    """Empty when any value of the type will do."""
    help: str


def flags_of(function: RecipeFunction) -> list[Flag]:
    """Flags in the order of the signature; RecipeError when a parameter cannot be one."""
    hints = get_type_hints(function, include_extras=True)
    return [_flag(function.__name__, parameter, hints) for parameter in inspect.signature(function).parameters.values()]


def _flag(recipe: str, parameter: inspect.Parameter, hints: dict[str, Any]) -> Flag:
    where = f"recipe {recipe!r}, parameter {parameter.name!r}"
    if parameter.default is inspect.Parameter.empty:
        raise RecipeError(f"{where}: it has no default; a parameter is a flag and needs one")
    hint = hints.get(parameter.name)
    if get_origin(hint) is not Annotated:
        raise RecipeError(f"{where}: write its type as Annotated[int, 'help text']")
    kind, *notes = get_args(hint)
    text = next((note for note in notes if isinstance(note, str)), "")
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not NoneType)
    choices: tuple[FlagValue, ...] = ()
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        kind = type(choices[0])
    if kind not in (str, int, float, bool):
        raise RecipeError(f"{where}: a flag is str, int, float, bool or a Literal of these, not {kind!r}")
    return Flag(parameter.name, kind, parameter.default, choices, text)
