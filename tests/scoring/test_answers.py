"""Answers against one reference, by every kind of comparison."""

from typing import Any

import pytest

from posttrain.scoring.answers import score_answer
from posttrain.scoring.numbers import last_number, marked_number
from posttrain.scoring.text import contains, exact, similarity

NUMBER = {"kind": "number", "answer": 1200.0, "tolerance": 0.01}
NUMERIC = {"kind": "numeric", "answer": 42.0, "tolerance": 1e-6}
CODE = {"kind": "code", "answer": "assert f(2) == 4\nassert f(3) == 6", "files": {}, "answer_file": "solution.py"}
CHOICE = {"kind": "choice", "answer": "B", "choices": ["A", "B"]}


@pytest.mark.parametrize(
    ("reference", "said", "value", "formed", "answer"),
    [
        (NUMBER, "1000 + 200\n#### 1,200", 1.0, 1.0, "1200"),
        (NUMBER, "#### 1200.009", 1.0, 1.0, "1200.01"),
        (NUMBER, "#### 1200.02", 0.0, 1.0, "1200.02"),
        (NUMBER, "It is 1200", 0.0, 0.0, None),
        (NUMBER, "#### 3 or #### $1200", 1.0, 1.0, "1200"),
        (CHOICE, "(B).", 1.0, 1.0, "B"),
        (CHOICE, "A", 0.0, 1.0, "A"),
        (CHOICE, "C", 0.0, 0.0, "C"),
        ({"kind": "contains", "answer": "kelmo"}, "That is kelmo-52.", 1.0, 1.0, "That is kelmo-52."),
        ({"kind": "contains", "answer": "kelmo"}, "", 0.0, 0.0, None),
        ({"kind": "exact", "answer": "kelmo"}, " kelmo\n", 1.0, 1.0, "kelmo"),
        ({"answer": "kelmo"}, "Kelmo", 0.0, 1.0, "Kelmo"),
        (NUMERIC, "6 * 7 = 42.", 1.0, 1.0, "42"),
        (NUMERIC, "#### 42\nas 7 is in 49", 1.0, 1.0, "42"),
        (NUMERIC, "42, not 43", 0.0, 1.0, "43"),
        (NUMERIC, "forty-two", 0.0, 0.0, None),
    ],
)
def test_kinds(reference: dict[str, Any], said: str, value: float, formed: float, answer: str | None) -> None:
    score = score_answer(reference, said)
    assert (score.value, score.parts["exact"], score.parts["format"]) == (value, value, formed)
    assert score.answer == answer


def test_without_a_reference_nothing_is_scored() -> None:
    assert score_answer({"kind": "exact"}, "anything").value is None


def test_similarity_is_the_value_and_equality_is_told_apart() -> None:
    # 'bal' and 'nel' have only the l in common: 2 * 1 / 6
    score = score_answer({"kind": "similarity", "answer": "bal"}, "nel")
    assert score.value == pytest.approx(1 / 3) and score.parts["exact"] == 0.0
    assert score_answer({"kind": "similarity", "answer": "bal"}, "bal").value == 1.0


def test_text_scorers() -> None:
    assert exact(" a b", "a b ") == 1.0 and exact("a  b", "a b") == 0.0
    assert contains("the id is 7", "7") == 1.0 and contains("anything", "  ") == 0.0
    assert similarity("abcd", "bcda") == 0.75


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 89.", 89.0),
        ("3 - 14", 14.0),
        ("x = -2.5", -2.5),
        ("1,234,567 in all", 1234567.0),
        ("a1", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_only_a_marked_number_is_gsm8ks_answer() -> None:
    assert marked_number("#### 5\n#### 7") == 7.0 and marked_number("7") is None


@pytest.mark.parametrize(
    ("said", "value", "parts"),
    [
        ("```python\ndef f(x):\n    return 0\n```\nNo:\n```python\ndef f(x):\n    return 2 * x\n```", 1, (1, 1, 1)),
        ("def f(x):\n    return 2 * x", 1, (0, 1, 1)),
        ("```\ndef f(x):\n    return 4\n```", 0, (1, 1, 0.5)),
        ("```\ndef f(x) return 4\n```", 0, (1, 0, 0)),
        ("```\nimport sys\nsys.exit(0)\n```", 0, (1, 1, 0)),
        ("I cannot.", 0, (0, 0, 0)),
        ("```python\n```", 0, (0, 0, 0)),
        ("", 0, (0, 0, 0)),
    ],
)
def test_a_program_is_right_where_every_test_passes(said: str, value: float, parts: tuple[float, ...]) -> None:
    score = score_answer({**CODE, "language": "python"}, said)
    assert (score.value, *(score.parts[name] for name in ("format", "compiles", "tests"))) == (value, *parts)


def test_a_program_without_tests_or_in_an_unknown_language_is_unscorable() -> None:
    unasked = score_answer({**CODE, "language": "python", "answer": "x = 1"}, "x")
    assert unasked.value is None and "line 1 of the tests is no assert" in str(unasked.reason)
    foreign = score_answer({**CODE, "language": "cobol"}, "x")
    assert foreign.value is None and "no evaluator for 'cobol'" in str(foreign.reason)
