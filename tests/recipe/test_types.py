"""The rule of the recipe types: nothing that changes the weights has a default."""

from typing import get_args

import pytest
from pydantic import BaseModel

from posttrain.recipe import types
from posttrain.recipe.types import Execution, Frozen, Recipe

WEIGHT_CHANGING = [
    kind
    for kind in vars(types).values()
    if isinstance(kind, type) and issubclass(kind, Frozen) and kind not in (Frozen, Execution)
]


@pytest.mark.parametrize("kind", WEIGHT_CHANGING, ids=lambda kind: kind.__name__)
def test_no_field_has_a_default(kind: type[BaseModel]) -> None:
    assert [name for name, field in kind.model_fields.items() if not field.is_required()] == []


def test_the_recipe_reaches_all_of_them() -> None:
    """So that none is forgotten above: every model below `Recipe` is in the list."""
    seen: set[type] = set()

    def visit(annotation: object) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in seen:
            seen.add(annotation)
            for field in annotation.model_fields.values():
                visit(field.annotation)
        for part in get_args(annotation):
            visit(part)

    visit(Recipe)
    assert seen <= set(WEIGHT_CHANGING)
    assert len(seen) > 15


def test_execution_needs_nothing_given() -> None:
    assert Execution() == Execution.model_validate({})
