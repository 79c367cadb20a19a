"""`text`: a document per record, as TRL's language modelling shape has it."""

from posttrain.data.formats.format import Fields, Format, Record, text


def document(record: Record) -> Fields:
    return {"text": text(record, "text")}


FORMAT = Format(columns=("text",), makes={"text": document}, reads="plain text, TRL language modelling")
