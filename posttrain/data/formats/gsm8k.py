"""`gsm8k`: openai/gsm8k, whose answers end in `#### number`; as conversations, or as tasks scored by that number."""

from posttrain.data.formats.format import BadRow, Fields, Format, Record, text
from posttrain.data.formats.turns import answer, asked_and_answered, question
from posttrain.scoring.numbers import marked_number

TOLERANCE = 0.01


def conversation(record: Record) -> Fields:
    return {"conversation": asked_and_answered(text(record, "question"), _worked(record))}


def task(record: Record) -> Fields:
    worked = _worked(record)
    return {
        "world": "answers",
        "prompt": question(text(record, "question")),
        "reference": {"kind": "number", "answer": marked_number(worked), "tolerance": TOLERANCE},
        "solution": (answer(worked),),
    }


def _worked(record: Record) -> str:
    worked = text(record, "answer")
    if marked_number(worked) is None:
        raise BadRow("answer", "has no number behind `####`")
    return worked


FORMAT = Format(
    columns=("question", "answer"),
    makes={"conversations": conversation, "tasks": task},
    reads="openai/gsm8k, subsets `main` and `socratic`",
)
