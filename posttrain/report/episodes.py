"""An index of episodes (samples.jsonl) or answers (answers.jsonl), read on from where the last look ended.

A line of an episode is long, and most of it is token numbers; the index holds what episodes are chosen by.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from posttrain.report.read import mapping, number
from posttrain.report.steps import AddedLines

Order = Literal["newest", "oldest", "best", "worst"]
Outcome = Literal["any", "scored", "unscorable"]
TOKENS = b', "prompt_tokens": '
"""Begins the numbers; within a text the quotes would be escaped."""


class Head(NamedTuple):
    offset: int
    length: int
    step: int | None
    """None of an answer."""
    task: str
    score: float | None
    ended: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """Which episodes, and in which order."""

    first_step: int | None = None
    last_step: int | None = None
    outcome: Outcome = "any"
    least: float | None = None
    most: float | None = None
    ended: str | None = None
    task: str = ""
    """Part of the task's name."""
    order: Order = "newest"

    def takes(self, head: Head) -> bool:
        if self.outcome != "any" and (self.outcome == "scored") != (head.score is not None):
            return False
        for bound, sign in ((self.least, 1), (self.most, -1)):
            if bound is not None and (head.score is None or sign * head.score < sign * bound):
                return False
        if self.first_step is not None and (head.step is None or head.step < self.first_step):
            return False
        if self.last_step is not None and (head.step is None or head.step > self.last_step):
            return False
        return (self.ended is None or head.ended == self.ended) and self.task in head.task


class EpisodeIndex:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = AddedLines(path)
        self._begin()

    def _begin(self) -> None:
        self.heads: list[Head] = []
        self.of_task: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.heads)

    @property
    def at_end(self) -> bool:
        return self._lines.at_end

    def read_on(self, most_bytes: int = 2**25) -> bool:
        """Take in what was added, about so much of it at once; whether anything changed."""
        before = self._lines.offset
        lines, replaced = self._lines.look(most_bytes)
        if replaced:
            before = 0
            self._begin()
        for line in lines:
            if head := _head(before, line):
                self.of_task.setdefault(head.task, []).append(len(self.heads))
                self.heads.append(head)
            before += len(line)
        return bool(lines) or replaced

    def chosen(self, choice: Choice) -> list[int]:
        """Numbers of the episodes that `choice` takes, in its order; what has no score comes last by score."""
        numbers = [place for place, head in enumerate(self.heads) if choice.takes(head)]
        match choice.order:
            case "newest":
                numbers.reverse()
            case "best" | "worst":
                sign = -1 if choice.order == "best" else 1
                numbers.sort(key=lambda place: _score_key(self.heads[place].score, sign))
        return numbers

    def rows(self, numbers: list[int]) -> Iterator[dict[str, Any]]:
        """Their lines as they were written, without the token numbers."""
        with open(self.path, "rb") as file:
            for place in numbers:
                head = self.heads[place]
                file.seek(head.offset)
                yield _without_tokens(file.read(head.length)) or {}


def _score_key(score: float | None, sign: int) -> tuple[bool, float]:
    return score is None, 0.0 if score is None else sign * score


def _without_tokens(line: bytes) -> dict[str, Any] | None:
    text, found, _ = line.partition(TOKENS)
    try:
        row = json.loads(text + b"}" if found else line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _head(offset: int, line: bytes) -> Head | None:
    row = _without_tokens(line)
    if row is None:
        return None
    step = number(row.get("step"))
    task = str(row.get("task") or f"{row.get('dataset')}/{row.get('id')}")
    score, ended, reason = number(row.get("score")), str(row.get("ended") or ""), str(row.get("reason") or "")
    return Head(offset, len(line), None if step is None else int(step), task, score, ended, reason)


def score_parts(row: dict[str, Any]) -> dict[str, float]:
    return {str(part): value for part, raw in mapping(row.get("parts")).items() if (value := number(raw)) is not None}
