"""Numbers of a phase's steps as columns, read on from where the last look ended: for whoever watches a long run."""

import json
import math
import os
from array import array
from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.report.read import number


class AddedLines:
    """Whole lines that were added to a file since the last look; begins anew where the file was replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self._is: tuple[int, int] | None = None

    def look(self, most_bytes: int) -> tuple[list[bytes], bool]:
        """At most about so many bytes of lines, and whether it is another file than before."""
        if not self.path.exists():
            replaced, self._is, self.offset = self._is is not None, None, 0
            return [], replaced
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            is_now = (status.st_dev, status.st_ino)
            replaced = self._is not in (None, is_now) or status.st_size < self.offset
            self._is = is_now
            if replaced:
                self.offset = 0
            file.seek(self.offset)
            lines = file.readlines(most_bytes) if status.st_size > self.offset else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        self.offset += sum(map(len, lines))
        return lines, replaced

    @property
    def at_end(self) -> bool:
        """Whether nothing but an unfinished line is left, as far as was seen."""
        try:
            return self.path.stat().st_size <= self.offset
        except OSError:
            return True


class StepColumns:
    """A metrics.jsonl by metric; a step that was run again after a kill counts as it was run last."""

    def __init__(self, path: Path) -> None:
        self._lines = AddedLines(path)
        self._begin()

    def _begin(self) -> None:
        self.steps: array[float] = array("d")
        self._columns: dict[str, array[float]] = {}

    def __len__(self) -> int:
        return len(self.steps)

    def read_on(self, most_bytes: int = 2**23) -> bool:
        """Take in what was added, as much as that at once; whether anything changed."""
        lines, replaced = self._lines.look(most_bytes)
        if replaced:
            self._begin()
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and (step := number(row.get("step"))) is not None:
                self._take(step, row)
        return bool(lines) or replaced

    @property
    def at_end(self) -> bool:
        return self._lines.at_end

    def _take(self, step: float, row: dict[str, Any]) -> None:
        place = len(self.steps)
        if self.steps and step <= self.steps[-1]:
            place = bisect_left(self.steps, step)
        if place == len(self.steps) or self.steps[place] != step:
            self.steps.insert(place, step)
            for column in self._columns.values():
                column.insert(place, math.nan)
        else:
            for column in self._columns.values():
                column[place] = math.nan
        for metric, raw in row.items():
            if (value := number(raw)) is not None and metric != "step":
                if metric not in self._columns:
                    self._columns[metric] = array("d", [math.nan]) * len(self.steps)
                self._columns[metric][place] = value

    def points(self, metric: str) -> np.ndarray:
        """Steps and values [N, 2] of the steps that have a number."""
        column = self._columns.get(metric)
        if column is None:
            return np.empty((0, 2))
        both = np.column_stack([np.array(self.steps), np.array(column)])
        return both[~np.isnan(both[:, 1])]

    def last(self, count: int) -> tuple[dict[str, Any], ...]:
        """The last so many steps as rows of the numbers they have."""
        places = range(max(0, len(self.steps) - count), len(self.steps))
        rows = []
        for place in places:
            numbers = {metric: column[place] for metric, column in self._columns.items()}
            rows.append({"step": int(self.steps[place])} | {m: v for m, v in numbers.items() if not math.isnan(v)})
        return tuple(rows)
