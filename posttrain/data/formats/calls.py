"""Tasks out of recorded conversations: which call comes first."""

from posttrain.data.formats.format import BadRow, Fields
from posttrain.worlds import calls


def call_task(fields: Fields) -> Fields:
    """The fields of a conversation row as those of a task in the world `calls`."""
    task = calls.task(fields["conversation"])
    if task is None:
        raise BadRow("conversation", "no user's request is followed by a call")
    return task
