"""`code_feedback`: m-a-p/CodeFeedback-Filtered-Instruction, as conversations, or as pairs against a stalling answer."""

from posttrain.data.formats.format import Fields, Format, Record, optional_text, text
from posttrain.data.formats.turns import answer, asked_and_answered, question

KEPT_SHARE = 0.3
STALL = "Before I can say more, this would have to be looked at in greater depth."


def conversation(record: Record) -> Fields:
    return {"conversation": asked_and_answered(text(record, "query"), text(record, "answer"), None, _language(record))}


def pair(record: Record) -> Fields:
    """Rejected: the answer's first 30 % and a sentence that puts the rest off."""
    good = text(record, "answer")
    kept = good[: int(len(good) * KEPT_SHARE)].rstrip()
    stalling = f"{kept}\n\n{STALL}" if kept else STALL
    return {
        "prompt": question(text(record, "query"), _language(record)),
        "chosen": (answer(good),),
        "rejected": (answer(stalling),),
    }


def _language(record: Record) -> dict[str, str]:
    language = optional_text(record, "lang")
    return {"language": language} if language else {}


FORMAT = Format(
    columns=("query", "answer"),
    makes={"conversations": conversation, "pairs": pair},
    reads="m-a-p/CodeFeedback-Filtered-Instruction",
)
