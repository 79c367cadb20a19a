"""The shipped evaluation set: every answer worked out again from its prompt, and no text shared with training data."""

import ast
import json
import operator
import re
from collections import Counter
from collections.abc import Callable
from datetime import date, timedelta
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from posttrain.chat.conversation import Message
from posttrain.data.evaluation_sets import find_set, read_set, shipped
from posttrain.data.overlap import shared_rows
from posttrain.data.records import EVALUATION_SETS
from posttrain.errors import DataError, InputError
from posttrain.recipe.load import find, shipped_names
from posttrain.recipe.types import PreparePhase, WorldSource
from posttrain.worlds.registry import rows, start

ITEMS = [json.loads(line) for line in (EVALUATION_SETS / "eval_v1.jsonl").read_text().splitlines()]
TASKS = {row["id"]: row for row in read_set(find_set("eval_v1", lambda file: "evaluation"), None).rows}
WEEK = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SIZES = {
    "kilometres metres": Fraction(1000), "hours minutes": Fraction(60), "kilograms grams": Fraction(1000),
    "days hours": Fraction(24), "centimetres metres": Fraction(1, 100), "seconds hours": Fraction(1, 3600),
    "kilometres per hour metres per second": Fraction(5, 18), "square metres square centimetres": Fraction(10_000),
}  # fmt: skip
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def exactly(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](exactly(node.left), exactly(node.right))
    assert isinstance(node, ast.Constant)
    return Fraction(node.value)


def numbers(text: str) -> list[int]:
    return [int(one) for one in re.findall(r"\d+", text)]


def arithmetic(prompt: str) -> Fraction:
    found = re.fullmatch(r"Work out (.+)\. Reply with the number\.", prompt)
    assert found
    return exactly(ast.parse(found[1], mode="eval").body)


def word_problem(prompt: str) -> Fraction:
    """By simulation, not by the formula."""
    n = numbers(prompt)
    if "crates" in prompt:
        jars = [jar for _ in range(n[0]) for jar in range(n[1])]
        return Fraction(len(jars[n[2] :]))
    if "van" in prompt:
        return Fraction(sum([n[1]] * n[0], n[2]))
    if "jacket" in prompt:
        return sum((Fraction(n[0]) - Fraction(n[0], 100) * n[1] for _ in range(n[2])), Fraction(0))
    filled = minutes = 0
    while filled < n[2]:
        filled, minutes = filled + n[0] + n[1], minutes + 1
    assert filled == n[2]
    return Fraction(minutes)


def calendar(prompt: str) -> str | Fraction:
    days = [date.fromisoformat(day) for day in re.findall(r"\d{4}-\d\d-\d\d", prompt)]
    if len(days) == 1:
        return WEEK[(days[0].toordinal() - 1) % 7]
    count = 0
    while days[0] < days[1]:
        days[0], count = days[0] + timedelta(days=1), count + 1
    return Fraction(count)


def text(prompt: str) -> str | Fraction:
    if found := re.match(r"Spell the word (\w+) backwards", prompt):
        return "".join(reversed(found[1]))
    if found := re.match(r"Put these words in alphabetical order.*: (.+)$", prompt):
        left, ordered = found[1].split(", "), list[str]()
        while left:
            ordered.append(left.pop(left.index(min(left))))
        return ", ".join(ordered)
    if found := re.match(r"How often does the letter (\w) occur in (\w+)\?", prompt):
        return Fraction(Counter(found[2])[found[1]])
    found = re.match(r"Which letter is number (\d+) in the word (\w+)", prompt)
    assert found
    return dict(enumerate(found[2], 1))[int(found[1])]


def sequence(prompt: str) -> Fraction:
    """The rule that explains every given number: a constant ratio, a sum of two before, or constant differences."""
    given = numbers(prompt)
    ratios = {Fraction(b, a) for a, b in pairwise(given)}
    if len(ratios) == 1:
        return given[-1] * ratios.pop()
    if all(a + b == c for a, b, c in zip(given, given[1:], given[2:], strict=False)):
        return Fraction(given[-2] + given[-1])
    levels = [given]
    while len(set(levels[-1])) > 1:
        levels.append([b - a for a, b in pairwise(levels[-1])])
    assert len(levels[-1]) > 1, "differences that never become constant explain nothing"
    return Fraction(sum(level[-1] for level in levels))


def units(prompt: str) -> Fraction:
    found = re.match(r"Convert ([\d.]+) (.+?) to (.+?)\. Reply", prompt)
    assert found
    return Fraction(found[1]) * SIZES[f"{found[2]} {found[3]}"]


def comparison(prompt: str) -> str:
    if found := re.match(r"Which of these is the largest: (.+)\?", prompt):
        return sorted(found[1].split(", "), key=Fraction)[-1]
    short, middle, long = sorted(numbers(prompt))
    return "yes" if short**2 + middle**2 == long**2 else "no"


SOLVERS: dict[str, Callable[[str], str | Fraction]] = {
    "arithmetic": arithmetic, "word_problem": word_problem, "calendar": calendar, "text": text, "sequence": sequence,
    "units": units, "comparison": comparison,
}  # fmt: skip


def played(item: dict[str, Any], *messages: Message) -> float | None:
    environment = start(TASKS[item["id"]])
    environment.respond(list(messages))
    return environment.score().value


def final(content: str) -> Message:
    return Message(role="assistant", channel="final", content=content)


@pytest.mark.parametrize("item", [one for one in ITEMS if one["category"] in SOLVERS], ids=lambda one: one["id"])
def test_the_answer_follows_from_the_prompt(item: dict[str, Any]) -> None:
    answer = SOLVERS[item["category"]](item["prompt"])
    if isinstance(answer, Fraction):
        assert abs(Fraction(item["expected_answer"]) - answer) < Fraction(1, 10**6)
        answer = f"{float(answer):g}" if answer.denominator > 1 else str(answer)
    assert played(item, final(str(answer))) == 1
    assert played(item, final("I do not know.")) == 0


KINDS = {"string": str, "integer": int, "number": (int, float), "boolean": bool}


@pytest.mark.parametrize("item", [one for one in ITEMS if one["category"] == "tool_call"], ids=lambda one: one["id"])
def test_a_call_is_one_that_its_tool_takes_with_values_from_the_prompt(item: dict[str, Any]) -> None:
    expected = item["expected_answer"]
    [tool] = [one["function"] for one in item["tools"] if one["function"]["name"] == expected["name"]]
    parameters = tool["parameters"]
    assert set(expected["arguments"]) == set(parameters["required"]) == set(parameters["properties"])
    for name, value in expected["arguments"].items():
        assert isinstance(value, KINDS[parameters["properties"][name]["type"]])  # type: ignore[arg-type]
        assert str(value).lower() in item["prompt"].lower()

    def call(name: str, arguments: dict[str, Any]) -> Message:
        content = json.dumps(arguments)
        return Message(role="assistant", channel="commentary", recipient=f"functions.{name}", content=content)

    assert played(item, call(expected["name"], expected["arguments"])) == 1
    assert played(item, call(expected["name"], {})) == 0
    assert played(item, final(json.dumps(expected))) == 0


@pytest.mark.parametrize("item", [one for one in ITEMS if one["category"] == "code"], ids=lambda one: one["id"])
def test_the_tests_of_a_program_pass_with_its_solution_and_fail_without(item: dict[str, Any]) -> None:
    name = re.search(r"`(\w+)\(", item["prompt"])
    assert name and all(name[1] in line for line in item["expected_answer"].splitlines())
    assert played(item, final(f"Here it is:\n\n```python\n{item['solution']}\n```\n")) == 1
    assert played(item, final(f"```python\ndef {name[1]}(*given):\n    return given\n```")) == 0


def test_the_set_is_large_and_mixed_and_has_every_scorer() -> None:
    assert len(ITEMS) >= 100 and len({item["id"] for item in ITEMS}) == len(ITEMS)
    assert {item["category"] for item in ITEMS} == {*SOLVERS, "tool_call", "code"}
    assert {item["difficulty"] for item in ITEMS} == {"easy", "medium", "hard"}
    assert {item["scorer"] for item in ITEMS} == {"exact", "numeric", "contains", "tool_call", "code"}
    assert len({item["prompt"] for item in ITEMS}) == len(ITEMS)


def test_no_row_that_a_shipped_recipe_trains_on_shares_13_words_with_the_set() -> None:
    sources = {
        (source.world, dataset.content, source.seed)
        for recipe in shipped_names()
        for phase in find(recipe).build({}).phases
        if isinstance(phase, PreparePhase)
        for dataset in phase.datasets
        for source in dataset.sources
        if isinstance(source, WorldSource) and source.split == "train"
    }
    assert {world for world, _, _ in sources} >= {"tools", "agent", "preferences", "repair", "language", "words"}
    for world, content, seed in sorted(sources):
        assert not shared_rows(rows(world, content, "train", 500, seed), TASKS.values()), (world, content)
    # The check does find what is shared.
    assert shared_rows(list(TASKS.values())[:3], TASKS.values(), 5)


def test_sets_are_found_by_name_file_and_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shipped() == ["coding_agent", "eval_v1"]
    file = tmp_path / "mine.jsonl"
    file.write_text('{"id": "eval-001", "prompt": "What is 2+2?", "expected_answer": "4"}\n{"prompt": "x"}\n')
    asked = read_set(find_set(str(file), lambda given: "evaluation"), None)
    assert asked.name == "mine" and [row["id"] for row in asked.rows] == ["eval-001"]
    assert asked.rows[0]["reference"] == {"kind": "numeric", "answer": 4.0, "tolerance": 1e-6}
    assert list(asked.left_out) == ["expected_answer: is empty"]
    assert len(read_set(find_set("tools", lambda given: "rows"), 7).rows) == 7
    with pytest.raises(InputError, match="did you mean eval_v1"):
        find_set("eval_v2", lambda given: "evaluation")
    file.write_text('{"id": "a", "prompt": "x", "expected_answer": "1"}\n' * 2)
    with pytest.raises(DataError, match="id 'a' comes twice"):
        read_set(find_set(str(file), lambda given: "evaluation"), None)
