"""Training and held-out rows share no name, no tool and no program."""

import ast
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from posttrain.worlds.names import NAME_LIKE, ORDINARY, name, split_of
from posttrain.worlds.registry import MAKERS, rows


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def names_in(row: dict[str, Any]) -> set[str]:
    return {word for text in strings(row) for word in NAME_LIKE.findall(text)} - ORDINARY - {"fine", "same", "late"}


def tools_in(row: dict[str, Any]) -> set[str]:
    return {tool["name"] for tool in row["prompt"]["tools"]}


def test_tool_rows_share_no_name_and_no_tool() -> None:
    seen = {split: list(rows("tools", "tasks", split, 3000, 0)) for split in ("train", "heldout")}
    names = {split: set().union(*map(names_in, made)) for split, made in seen.items()}
    tools = {split: set().union(*map(tools_in, made)) for split, made in seen.items()}
    assert len(names["train"]) > 3000 and len(names["heldout"]) > 1000
    assert not names["train"] & names["heldout"]
    assert not tools["train"] & tools["heldout"]
    assert {tool.split("_")[1] for tool in tools["train"]}.isdisjoint(tool.split("_")[1] for tool in tools["heldout"])


@pytest.mark.parametrize("world", ["language", "words"])
def test_language_of_the_base_holds_no_heldout_name(world: str) -> None:
    held = {word for row in rows("tools", "tasks", "heldout", 2000, 0) for word in names_in(row)}
    for row in rows(world, "text", "train", 3000, 0):
        # Values that a string function returns are cut and repeated names, not names.
        text = "\n".join(line for line in row["text"].split("\n") if not line.startswith("assert"))
        assert not held & set(NAME_LIKE.findall(text)), text


class Renamer(ast.NodeTransformer):
    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def place(self, name: str) -> str:
        return self.known.setdefault(name, f"v{len(self.known)}")

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(self.place(node.arg))

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return node if node.id in ("any", "max", "min", "sum", "range") else ast.Name(self.place(node.id), node.ctx)


def renamed(code: str) -> str:
    """The function without its docstring, with names replaced in order of appearance."""
    tree = ast.parse(code)
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    function.body = function.body[1:]
    return ast.dump(Renamer().visit(tree))


def right_code(row: dict[str, Any]) -> str:
    patch = json.loads(row["solution"][1]["content"])
    code: str = row["reference"]["code"].replace(patch["old"], patch["new"])
    return code


def test_repair_programs_are_disjoint_however_their_names_are_chosen() -> None:
    train = {renamed(right_code(row)) for row in rows("repair", "tasks", "train", 3000, 0)}
    held = {renamed(right_code(row)) for row in rows("repair", "tasks", "heldout", 1500, 0)}
    assert len(train) > 1500 and len(held) > 500
    assert not train & held


def test_agent_programs_and_language_programs_are_training_programs() -> None:
    held = {renamed(right_code(row)) for row in rows("repair", "tasks", "heldout", 1500, 0)}
    for row in rows("language", "text", "train", 3000, 0):
        for part in row["text"].split("\n\n"):
            if part.startswith("def f("):
                assert renamed(part) not in held


def test_words_in_repair_tests_belong_to_the_split() -> None:
    for split in ("train", "heldout"):
        for row in rows("repair", "tasks", split, 500, 0):
            for arguments, _ in (*row["reference"]["visible"], *row["reference"]["hidden"]):
                assert all(split_of(value) == split for value in arguments if isinstance(value, str))


def test_a_name_is_drawn_from_its_split_and_is_no_ordinary_word() -> None:
    rng = random.Random(3)
    for split in ("train", "heldout"):
        for _ in range(2000):
            word = name(rng, split)
            assert split_of(word) == split and word not in ORDINARY and NAME_LIKE.fullmatch(word)


@pytest.mark.parametrize(("world", "content"), sorted(MAKERS))
def test_a_row_is_a_function_of_its_number(world: str, content: str) -> None:
    first = list(rows(world, content, "train", 20, 7))
    assert list(rows(world, content, "train", 30, 7))[:20] == first
    assert list(rows(world, content, "train", 20, 8)) != first
    assert len({row["id"] for row in first}) == 20
