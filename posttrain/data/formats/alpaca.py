"""`alpaca`: an instruction, perhaps with input to it, and the output."""

from posttrain.data.formats.format import Fields, Format, Record, optional_text, text
from posttrain.data.formats.turns import asked_and_answered


def fields(record: Record) -> Fields:
    asked, given = text(record, "instruction"), optional_text(record, "input")
    asked = asked if given is None else f"{asked}\n\n{given}"
    return {"conversation": asked_and_answered(asked, text(record, "output"), optional_text(record, "system"))}


FORMAT = Format(
    columns=("instruction", "output"),
    makes={"conversations": fields},
    reads="Stanford Alpaca and its many successors: `instruction`, `input`, `output`, `system`",
)
