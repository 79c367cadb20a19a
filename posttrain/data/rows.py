"""The row shapes, one per content, and what is said of a record that is none."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posttrain.chat.conversation import Conversation, Message
from posttrain.recipe.types import Effort
from posttrain.worlds import registry


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, Field(min_length=1)]


class TextRow(Row):
    text: Annotated[str, Field(min_length=1)]


class ConversationRow(Row):
    conversation: Conversation


class PairRow(Row):
    prompt: Conversation
    chosen: Annotated[tuple[Message, ...], Field(min_length=1)]
    rejected: Annotated[tuple[Message, ...], Field(min_length=1)]


class TaskRow(Row):
    world: str
    prompt: Conversation
    reference: dict[str, Any]
    solution: tuple[Message, ...]
    tier: Annotated[str, Field(min_length=1)] | None = None
    """How hard it is, in words of the data set's own; a curriculum's stages choose by it."""


SHAPES: dict[str, type[Row]] = {
    "text": TextRow,
    "conversations": ConversationRow,
    "pairs": PairRow,
    "tasks": TaskRow,
}


@dataclass(frozen=True)
class Fault:
    """A malformed row: the field (`row` for all of it) and the reason."""

    field: str
    reason: str

    def __str__(self) -> str:
        return self.reason if self.field == "row" else f"{self.field}: {self.reason}"


def checked(value: Any, content: str) -> Row | Fault:
    """The value as a row of this content; of several faults the first."""
    try:
        row = SHAPES[content].model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        return Fault(".".join(map(str, first["loc"])) or "row", first["msg"])
    if isinstance(row, TaskRow) and row.world not in registry.ENVIRONMENTS:
        known = ", ".join(sorted(registry.ENVIRONMENTS))
        return Fault("world", f"{row.world!r} plays no tasks; {known} do")
    return row


def with_effort(row: Row, effort: Effort) -> Row:
    """The row with this reasoning effort for its conversation; a text has none."""
    for field in ("conversation", "prompt"):
        conversation = getattr(row, field, None)
        if isinstance(conversation, Conversation):
            return row.model_copy(update={field: conversation.model_copy(update={"reasoning_effort": effort})})
    return row
