"""Worlds with one right answer: their solutions are right, and written in tokens that the tiny base has seen."""

from collections import Counter
from pathlib import Path

import pytest

from posttrain.chat.conversation import Message
from posttrain.chat.tokenizer import Tokenizer
from posttrain.run.folder import ASSETS
from posttrain.worlds.registry import ENVIRONMENTS, MAKERS, rows, start

DOCS = (Path(__file__).parents[2] / "docs" / "worlds.md").read_text()


@pytest.mark.parametrize("world", ["sums", "reverse", "alphabet", "duel", "tes", "tes_small"])
def test_the_solution_is_right(world: str) -> None:
    for row in rows(world, "tasks", "heldout", 150, 2):
        environment = start(row)
        assert environment.respond([Message(**message) for message in row["solution"]]) == []
        score = environment.score()
        assert score.parts.get("exact", score.parts.get("optimal")) == 1.0, row
        assert score.answer is not None


@pytest.mark.parametrize("world", ["sums", "reverse", "alphabet"])
def test_an_empty_answer_earns_nothing(world: str) -> None:
    for row in rows(world, "tasks", "train", 20, 2):
        environment = start(row)
        environment.respond([Message(role="assistant", channel="final", content="")])
        assert environment.score().value == 0.0


def test_sums_are_worked_line_by_line_and_never_go_below_zero() -> None:
    for row in rows("sums", "tasks", "train", 400, 0):
        *lines, last = row["solution"][0]["content"].split("\n")
        for line in lines:
            left, right = line.split(" = ")
            assert eval(left) == int(right) >= 0  # our own text
        assert last == f"#### {int(right)}" and row["reference"]["answer"] == int(right)


def test_reversed_twice_is_the_text_again() -> None:
    for row in rows("reverse", "tasks", "train", 100, 0):
        assert row["solution"][0]["content"][::-1] in row["prompt"]["messages"][0]["content"]


def test_sorted_names_are_those_of_the_request() -> None:
    for row in rows("alphabet", "tasks", "train", 100, 0):
        asked = row["prompt"]["messages"][0]["content"]
        answer = row["solution"][0]["content"].split(", ")
        assert sorted(answer) == sorted(asked.partition(": ")[2].split(", "))
        assert answer == sorted(answer, reverse="from z to a" in asked)


@pytest.fixture(scope="module")
def seen() -> Counter[int]:
    """How often the tiny base's own worlds show each token."""
    tokenizer = Tokenizer.load(ASSETS / "tiny_base")
    counts: Counter[int] = Counter()
    for source, count in (("language", 4000), ("words", 1000)):
        for row in rows(source, "text", "train", count, 0):
            counts.update(tokenizer.encode_with_specials(row["text"]))
    return counts


@pytest.mark.parametrize("world", ["tes_small", "duel", "sums"])
def test_the_tiny_base_has_seen_every_token(world: str, seen: Counter[int]) -> None:
    """What it never saw it cannot tell apart, and an adapter cannot teach it (docs/decisions.md)."""
    tokenizer = Tokenizer.load(ASSETS / "tiny_base")
    for row in rows(world, "tasks", "train", 300, 0):
        for text in (
            row["prompt"]["messages"][0]["content"],
            row["solution"][0]["content"],
            row["solution"][-1]["content"],
        ):
            unseen = {tokenizer.decode([token]) for token in tokenizer.encode(text) if seen[token] < 5}
            assert not unseen, text


def test_every_world_is_documented() -> None:
    assert {world for world in {*ENVIRONMENTS, *(world for world, _ in MAKERS)} if f"`{world}`" not in DOCS} == set()
