"""Finds a recipe function by name or by path, calls it, and checks what it returns."""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from posttrain.errors import InputError, RecipeError
from posttrain.recipe.check import check, plain
from posttrain.recipe.flags import Flag, FlagValue, RecipeFunction, flags_of
from posttrain.recipe.spelling import did_you_mean
from posttrain.recipe.types import Recipe, drafting

SHIPPED = "posttrain.recipes"


@dataclass(frozen=True)
class FoundRecipe:
    name: str
    function: RecipeFunction
    flags: list[Flag]

    @property
    def purpose(self) -> str:
        """The first paragraph of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n\n")[0]

    def build(self, values: Mapping[str, FlagValue]) -> Recipe:
        """The recipe with these flags, checked; RecipeError names every fault."""
        with drafting():
            draft: Any = self.function(**values)
        if not isinstance(draft, Recipe):
            raise RecipeError(f"recipe {self.name!r} returned {type(draft).__name__}, not a Recipe")
        check(draft)
        return Recipe.model_validate(plain(draft))

    def default_run_name(self, values: Mapping[str, FlagValue]) -> str:
        """The recipe's name and its non-default flags, in the order of the signature."""
        parts = [self.name]
        for flag in self.flags:
            value = values.get(flag.name, flag.default)
            if value != flag.default:
                parts.append(f"{flag.name}-{_plain_text(value)}")
        return "-".join(parts).lower()[:64].rstrip("-._")


def _plain_text(value: FlagValue) -> str:
    text = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in str(value).lower())
    return text.strip("-.") or "empty"


def shipped_names() -> list[str]:
    """Names of the recipes inside the package."""
    folder = importlib.import_module(SHIPPED).__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def find(name: str) -> FoundRecipe:
    """The recipe called `name`, or the function at `file.py[:function]`."""
    if name.partition(":")[0].endswith(".py"):
        path, _, function_name = name.partition(":")
        module = _import_file(Path(path))
        return _found(module, function_name or Path(path).stem, path)
    names = shipped_names()
    if name not in names:
        raise InputError(
            f"there is no recipe {name!r}{did_you_mean(name, names)}; recipes: {', '.join(names) or 'none'}; "
            f"a recipe of your own is given as FILE.py or FILE.py:FUNCTION"
        )
    return _found(importlib.import_module(f"{SHIPPED}.{name}"), name, name)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no recipe file {path}")
    specification = importlib.util.spec_from_file_location(f"recipe_file_{path.stem}", path)
    if specification is None or specification.loader is None:
        raise InputError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    try:
        with drafting():
            specification.loader.exec_module(module)
    except (SyntaxError, ImportError, NameError) as error:
        raise RecipeError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _found(module: ModuleType, function_name: str, source: str) -> FoundRecipe:
    function = getattr(module, function_name, None)
    if not inspect.isfunction(function):
        own = [name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"]
        raise InputError(
            f"{source} has no function {function_name!r}{did_you_mean(function_name, own)}; "
            f"functions in it: {', '.join(own) or 'none'}"
        )
    return FoundRecipe(function_name, function, flags_of(function))
