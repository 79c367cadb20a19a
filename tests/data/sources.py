"""Sources over the fixtures, and rows written down shortly."""

from pathlib import Path
from typing import Any

from posttrain.chat.conversation import Conversation, Message
from posttrain.data.rows import Fault, Row
from posttrain.data.sources import read_source
from posttrain.recipe.types import EVERY_ROW, FileSource, HubSource, Source

FIXTURES = Path(__file__).parent / "fixtures"
HUB = FIXTURES / "hub"


def file(name: str | Path, row_format: Any, **changed: Any) -> FileSource:
    fields = {"filters": (), "selection": EVERY_ROW, "reasoning_effort": None} | changed
    return FileSource(kind="file", path=str(FIXTURES / name), format=row_format, **fields)


def hub(repo: str, row_format: Any, subset: str | None = None, split: str = "train", **changed: Any) -> HubSource:
    fields = {"files": None, "filters": (), "selection": EVERY_ROW, "reasoning_effort": None, "optional": False}
    return HubSource(
        kind="hub", repo=repo, subset=subset, split=split, revision=None, format=row_format, **(fields | changed)
    )


def read(source: Source, content: str) -> tuple[list[Any], list[str]]:
    """Good rows, and the others as `row N: field: reason`."""
    placed = list(read_source(source, content))
    faults = [f"{place[place.rindex('row') :]}: {row}" for place, row in placed if isinstance(row, Fault)]
    return [row for _, row in placed if isinstance(row, Row)], faults


Said = tuple[str, ...]


def said(messages: tuple[Message, ...] | Conversation) -> list[Said]:
    """Role, channel or the tool's name, content; `(context)` is put behind what is not trained."""
    if isinstance(messages, Conversation):
        messages = messages.messages
    return [_said(message) for message in messages]


def _said(message: Message) -> Said:
    where = message.recipient or message.sender or message.channel or ""
    words = (message.role, where.removeprefix("functions."), message.content)
    return tuple(word for word in words if word) + (() if message.train else ("(context)",))
