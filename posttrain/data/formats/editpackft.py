"""`editpackft`: nuprl/EditPackFT, commits whose message was rewritten as an instruction."""

from posttrain.data.formats.commitpackft import edit
from posttrain.data.formats.format import Fields, Format, Record, text


def fields(record: Record) -> Fields:
    return edit(record, text(record, "instruction"))


FORMAT = Format(
    columns=("old_contents", "new_contents", "instruction"), makes={"conversations": fields}, reads="nuprl/EditPackFT"
)
