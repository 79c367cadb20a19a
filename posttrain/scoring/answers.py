"""Answers with one reference: the final message is compared with it in the way the reference names."""

from collections.abc import Mapping
from typing import Any

from posttrain.scoring.numbers import last_number, marked_number
from posttrain.scoring.score import Score
from posttrain.scoring.snippets import score_snippet
from posttrain.scoring.text import contains, exact, similarity


def score_answer(reference: Mapping[str, Any], final: str) -> Score:
    """By the reference's `kind`.

    `number`: the one behind `####`, within `tolerance`; `numeric`: that or else the last one. `choice`: one of
    `choices`. `contains`: the answer stands in the text. `similarity`: how alike both are. `code`: a program, run with
    the reference's tests (`scoring.snippets`). `exact`, also without a kind: equal.
    Parts: `format`, whether there is an answer of that kind, and `exact`; of `similarity` also `similarity`, its value.
    """
    wanted = reference.get("answer")
    if wanted is None:
        return Score(value=None, reason="the task has no reference answer")
    said = final.strip()
    match reference.get("kind"):
        case "code":
            return score_snippet(reference, said)
        case "number" | "numeric" as kind:
            number = marked_number(said)
            if number is None and kind == "numeric":
                number = last_number(said)
            right = number is not None and abs(number - wanted) <= reference["tolerance"]
            return _score(number is not None, float(right), None if number is None else f"{number:g}")
        case "choice":
            letter = said.rstrip(".").strip("()")
            return _score(letter in reference["choices"], float(letter == wanted), letter)
        case "contains":
            return _score(bool(said), contains(said, wanted), said)
        case "similarity":
            alike = similarity(said, wanted)
            parts = {"format": float(bool(said)), "exact": exact(said, wanted), "similarity": alike}
            return Score(value=alike, parts=parts, answer=said or None)
        case _:
            return _score(bool(said), exact(said, wanted), said)


def _score(formed: bool, right: float, answer: str | None) -> Score:
    return Score(value=right, parts={"format": float(formed), "exact": right}, answer=answer or None)
