r"""`hh_rlhf`: Anthropic/hh-rlhf, two dialogues as text with `\n\nHuman: ` and `\n\nAssistant: ` in it."""

import re

from posttrain.data.formats.format import BadRow, Fields, Format, Record, text
from posttrain.data.formats.turns import Turns, answer

SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def fields(record: Record) -> Fields:
    """The last answers are the pair; everything before them must be the same."""
    chosen, rejected = _said(record, "chosen"), _said(record, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("rejected", "differs from chosen before the last answer")
    if chosen[-1] == rejected[-1]:
        raise BadRow("rejected", "is the same as chosen")
    turns = Turns("chosen")
    for speaker, said in chosen[:-1]:
        turns.user(said) if speaker == "Human" else turns.assistant(said)
    return {"prompt": turns.prompt(), "chosen": (answer(chosen[-1][1]),), "rejected": (answer(rejected[-1][1]),)}


def _said(record: Record, column: str) -> list[tuple[str, str]]:
    parts = SPEAKER.split(text(record, column))
    if parts[0].strip():
        raise BadRow(column, "does not begin with `Human:`")
    turns = [(speaker, said.strip()) for speaker, said in zip(parts[1::2], parts[2::2], strict=True)]
    if len(turns) < 2 or turns[-1][0] != "Assistant":
        raise BadRow(column, "does not end with an answer of the assistant")
    if not turns[-1][1]:
        raise BadRow(column, "ends with an empty answer")
    if turns[-2][0] != "Human":
        raise BadRow(column, "its last answer does not follow a question")
    return turns


FORMAT = Format(columns=("chosen", "rejected"), makes={"pairs": fields}, reads="Anthropic/hh-rlhf")
