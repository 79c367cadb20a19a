"""The append-only journal of a run, and the line files phases append to."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def as_line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()


def append_lines(path: Path, rows: Iterable[dict[str, Any]], sync: bool = False) -> None:
    """Append JSON lines; a torn last line left by a kill is ended first, so that it stays alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = b"".join(map(as_line, rows))
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                lines = b"\n" + lines
        file.write(lines)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The file's rows in order; a torn line (no end, or no JSON object) is skipped, a missing file is empty."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


class Journal:
    """Events of a run: `{"time": unix seconds, "event": name, ...}`, synced one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **fields: Any) -> None:
        append_lines(self.path, [{"time": time.time(), "event": event, **fields}], sync=True)

    def read(self) -> Iterator[dict[str, Any]]:
        return read_lines(self.path)
