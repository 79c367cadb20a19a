"""A faulty row is named: file, row, field, reason."""

import json
from pathlib import Path

import pytest

from posttrain.data.rows import Fault, Row
from posttrain.data.sources import read_source
from posttrain.errors import DataError
from posttrain.recipe.types import EVERY_ROW, FileSource, WorldSource

GOOD = '{"id":"a","text":"hello"}\n'


def read(path: Path, content: str = "text") -> list[tuple[str, Row | Fault]]:
    source = FileSource(
        kind="file", path=str(path), format="rows", filters=(), selection=EVERY_ROW, reasoning_effort=None
    )
    return list(read_source(source, content))


def fault(tmp_path: Path, data: str | bytes, content: str = "text") -> str:
    """The last row's place and fault."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    place, found = read(path, content)[-1]
    assert isinstance(found, Fault) and str(path) in place
    return f"{place}: {found}"


@pytest.mark.parametrize(
    ("data", "row", "reason"),
    [
        (GOOD + '{"id":"b","te', 2, "truncated"),
        (GOOD + "nonsense\n", 2, "not JSON"),
        (GOOD + "\n", 2, "an empty line"),
        (GOOD.encode() + b'{"id":"b","text":"\xff"}\n', 2, "not UTF-8 at byte 18"),
        ('{"id":"a"}\n', 1, "text: Field required"),
        ('{"id":"a","text":3}\n', 1, "text: Input should be a valid string"),
        ('{"id":"a","text":"b","txt":"c"}\n', 1, "txt: Extra inputs are not permitted"),
        ('{"text":"b"}\n', 1, "id: Field required"),
        ("[1]\n", 1, "Input should be an object"),
        ('{"id":"a","text":NaN}\n', 1, "NaN is not JSON"),
    ],
)
def test_file_row_and_reason_are_named(tmp_path: Path, data: str | bytes, row: int, reason: str) -> None:
    message = fault(tmp_path, data)
    assert f"rows.jsonl row {row}: " in message and reason in message


def test_a_file_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="there is no row in it"):
        read(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read: No such file"):
        read(tmp_path / "nowhere.jsonl")


def test_a_message_of_an_unknown_role_is_named(tmp_path: Path) -> None:
    row = {"id": "a", "conversation": {"messages": [{"role": "robot", "content": "x"}]}}
    assert "conversation.messages.0.role" in fault(tmp_path, json.dumps(row) + "\n", "conversations")


def test_a_task_of_an_unknown_world_is_named(tmp_path: Path) -> None:
    row = {"id": "a", "world": "mars", "prompt": {"messages": []}, "reference": {}, "solution": []}
    assert (
        "world: 'mars' plays no tasks; answers, calculator, calls, code, decisions, repair, spelling, tools do"
        in fault(tmp_path, json.dumps(row) + "\n", "tasks")
    )


def test_a_last_row_without_an_end_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD.rstrip("\n"))
    assert [row.id for _, row in read(path) if isinstance(row, Row)] == ["a"]


@pytest.mark.parametrize(
    ("world", "content", "reason"),
    [
        ("tool", "tasks", "no world 'tool'; there are .*Did you mean tools"),
        ("agent", "tasks", "world 'agent' makes no tasks; it makes conversations"),
    ],
)
def test_a_world_that_cannot_make_it_is_named(world: str, content: str, reason: str) -> None:
    source = WorldSource(kind="world", world=world, split="train", count=1, seed=0)
    with pytest.raises(DataError, match=reason):
        list(read_source(source, content))
