"""A run's recipe as JSON: its digest, and the file that holds both."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posttrain.errors import RunFolderError
from posttrain.recipe.types import Recipe
from posttrain.run.folder import digest_json, write_json_atomic


def as_json(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def digest(recipe: Recipe) -> str:
    """SHA-256 of the recipe's canonical JSON: the run's identity."""
    return digest_json(as_json(recipe))


def save(recipe: Recipe, path: Path) -> None:
    write_json_atomic(path, {"digest": digest(recipe), "recipe": as_json(recipe)})


def load(path: Path) -> Recipe:
    """The recipe stored at `path`, equal to the one saved; RunFolderError when it cannot be read or was edited."""
    try:
        stored = json.loads(path.read_text())
        recipe = Recipe.model_validate(stored["recipe"])
        recorded = stored["digest"]
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise RunFolderError(
            f"{path} is not a readable recipe: {error}. It cannot be continued; choose another run with --name"
        ) from error
    if digest(recipe) != recorded:
        raise RunFolderError(
            f"{path} was changed after the run began: its digest is {digest(recipe)[:12]}, recorded was "
            f"{recorded[:12]}. Undo the change, or start another run with --name"
        )
    return recipe
