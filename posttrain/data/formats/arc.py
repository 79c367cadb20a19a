"""`arc`: allenai/ai2_arc, a question with lettered choices; as conversations, or as tasks scored by the letter."""

from typing import Any

from posttrain.data.formats.format import BadRow, Fields, Format, Record, kind, text
from posttrain.data.formats.turns import answer, asked_and_answered, question


def conversation(record: Record) -> Fields:
    asked, right, _ = _read(record)
    return {"conversation": asked_and_answered(asked, right)}


def task(record: Record) -> Fields:
    asked, right, labels = _read(record)
    reference = {"kind": "choice", "answer": right, "choices": labels}
    return {"world": "answers", "prompt": question(asked), "reference": reference, "solution": (answer(right),)}


def _read(record: Record) -> tuple[str, str, list[str]]:
    """The question as it is asked, the right label, all labels."""
    choices: Any = record.get("choices")
    if not isinstance(choices, dict):
        raise BadRow("choices", f"is {kind(choices)}, not an object of `text` and `label`")
    texts, labels = choices.get("text"), choices.get("label")
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels) or not texts:
        raise BadRow("choices", "must have as many texts as labels, and at least one")
    right = text(record, "answerKey").strip()
    if right not in labels:
        raise BadRow("answerKey", f"is {right!r}; the choices are {', '.join(map(str, labels))}")
    lines = [f"{label}. {choice}" for label, choice in zip(labels, texts, strict=True)]
    asked = "\n".join([text(record, "question"), "", *lines, "", "Answer with the letter alone."])
    return asked, right, [str(label) for label in labels]


FORMAT = Format(
    columns=("question", "choices", "answerKey"),
    makes={"conversations": conversation, "tasks": task},
    reads="allenai/ai2_arc, subsets `ARC-Easy` and `ARC-Challenge`",
)
