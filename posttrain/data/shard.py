"""A prepared dataset on disk, memory-mapped: source rows, and for everything but tasks their tokens and targets."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.mixture import Mixture, Part
from posttrain.errors import DataError

FILES = {
    "text": ("rows.jsonl", "tokens.npy", "targets.npy", "offsets.npy"),
    "conversations": ("rows.jsonl", "tokens.npy", "targets.npy", "offsets.npy"),
    "pairs": ("rows.jsonl", "tokens.npy", "targets.npy", "offsets.npy", "prefix.npy"),
    "tasks": ("rows.jsonl",),
}
"""By content, beside `dataset.json`."""
SCANNED_BYTES = 2**24


class Shard:
    """Sequence i has `tokens(i)` and `targets(i)`, not shifted; pair n is sequences 2n (chosen) and 2n + 1."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            self.description: dict[str, Any] = json.loads((self.folder / "dataset.json").read_text())
            self.content: str = self.description["content"]
            missing = [name for name in FILES[self.content] if not (self.folder / name).exists()]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{self.folder} is no prepared dataset ({type(error).__name__}: {error}); "
                "run its prepare phase again with --from"
            ) from error
        if missing:
            raise DataError(f"{self.folder} lacks {', '.join(missing)}; run its prepare phase again with --from")

    @property
    def num_rows(self) -> int:
        return int(self.description["counts"]["rows"])

    def __len__(self) -> int:
        """Number of sequences; none for tasks."""
        return 0 if self.content == "tasks" else len(self._offsets) - 1

    def lengths(self) -> np.ndarray:
        """Tokens of every sequence."""
        return np.diff(self._offsets)

    def mixture(self, seed: int) -> Mixture:
        """The order in which samples are read; a sample is a sequence, a pair or a task."""
        counted = "rows" if self.content in ("pairs", "tasks") else "samples"
        parts = [Part(part[counted], part["weight"], part["repeat"]) for part in self.description["parts"]]
        return Mixture(tuple(parts), seed)

    def tokens(self, sequence: int) -> np.ndarray:
        return self._tokens[self._span(sequence)]

    def targets(self, sequence: int) -> np.ndarray:
        return self._targets[self._span(sequence)]

    def prefix(self, pair: int) -> int:
        """How many tokens pair `pair`'s two sequences share: their prompt."""
        return int(self._prefixes[pair])

    def row(self, number: int) -> dict[str, Any]:
        start, stop = self._lines[number], self._lines[number + 1]
        row: dict[str, Any] = json.loads(self._text[start:stop].tobytes())
        return row

    def _span(self, sequence: int) -> slice:
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)} in {self.folder}")
        return slice(int(self._offsets[sequence]), int(self._offsets[sequence + 1]))

    def _array(self, name: str) -> np.ndarray:
        array: np.ndarray = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return array

    @cached_property
    def _tokens(self) -> np.ndarray:
        return self._array("tokens")

    @cached_property
    def _targets(self) -> np.ndarray:
        return self._array("targets")

    @cached_property
    def _offsets(self) -> np.ndarray:
        return self._array("offsets")

    @cached_property
    def _prefixes(self) -> np.ndarray:
        return self._array("prefix")

    @cached_property
    def _text(self) -> np.ndarray:
        return np.memmap(self.folder / "rows.jsonl", dtype=np.uint8, mode="r")

    @cached_property
    def _lines(self) -> np.ndarray:
        return line_starts(self._text)


def line_starts(text: np.ndarray) -> np.ndarray:
    """Where each line of these bytes begins, and where the last one ends; found a piece at a time."""
    found = [np.zeros(1, dtype=np.int64)]
    for start in range(0, len(text), SCANNED_BYTES):
        piece = text[start : start + SCANNED_BYTES]
        found.append(np.flatnonzero(piece == ord("\n")) + start + 1)
    return np.concatenate(found)
