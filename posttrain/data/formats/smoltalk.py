"""`smoltalk`: HuggingFaceTB/smoltalk and smol-smoltalk, `messages` and the subset that a row came from."""

from posttrain.data.formats import messages
from posttrain.data.formats.format import Fields, Format, Record, text


def fields(record: Record) -> Fields:
    return {"conversation": messages.conversation(record, {"source": text(record, "source")})}


FORMAT = Format(
    columns=("messages", "source"),
    makes={"conversations": fields},
    reads="HuggingFaceTB/smoltalk, HuggingFaceTB/smol-smoltalk",
)
