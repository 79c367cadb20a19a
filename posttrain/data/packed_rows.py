"""Rows of a fixed number of tokens, filled with whole documents: best fit over the seeded order."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from posttrain.data.mixture import Mixture
from posttrain.errors import DataError

WINDOW = 2048
"""Documents of the seeded order that are packed together; what fits badly waits for the next window."""
FULL = 0.9999
"""A row that is at least this full is done."""
WAITING = 4
"""At most one row in so many waits, so that a window's work is bounded whatever the lengths are."""


def best_fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Rows of places in `lengths`: the longest first, each into the fullest row that still has room for it.

    Equal lengths are taken in their order and equal rooms by the newest row, so the answer is one.
    """
    rows: list[list[int]] = []
    rooms = [row_tokens]
    rows_with: dict[int, list[int]] = {}
    for place in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = lengths[place]
        at = bisect_left(rooms, length)
        room = rooms[at]
        if room == row_tokens:
            number = len(rows)
            rows.append([place])
        else:
            number = rows_with[room].pop()
            rows[number].append(place)
            if not rows_with[room]:
                del rows_with[room], rooms[at]
        left = room - length
        if left in rows_with:
            rows_with[left].append(number)
        elif left:
            rows_with[left] = [number]
            insort(rooms, left)
    return rows


def pack_epoch(documents: np.ndarray, lengths: np.ndarray, row_tokens: int, seed: Sequence[int]) -> list[np.ndarray]:
    """All of `documents`, in windows of their order, as rows of document numbers; each window's rows are shuffled.

    `lengths` are those of all documents. Rows that are not full wait for the next window, the emptiest first; the last
    window keeps what it has.
    """
    rows: list[np.ndarray] = []
    waiting = np.empty(0, dtype=np.int64)
    for first in range(0, len(documents), WINDOW):
        window = np.concatenate([waiting, documents[first : first + WINDOW]])
        sizes = lengths[window].tolist()
        packed = best_fit(sizes, row_tokens)
        done: list[list[int]] = packed
        waits: list[list[int]] = []
        if first + WINDOW < len(documents):
            done, waits = _set_apart(packed, [sum(sizes[place] for place in row) for row in packed], row_tokens)
        order = np.random.default_rng([*seed, first]).permutation(len(done))
        rows += [window[done[number]] for number in order]
        waiting = window[[place for row in waits for place in row]] if waits else waiting[:0]
    return rows


def _set_apart(packed: list[list[int]], tokens: list[int], row_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Rows that are done, and the emptiest ones, which wait."""
    emptiest = sorted(range(len(packed)), key=tokens.__getitem__)[: max(1, len(packed) // WAITING)]
    waits = {number for number in emptiest if tokens[number] < FULL * row_tokens}
    done = [row for number, row in enumerate(packed) if number not in waits]
    return done, [packed[number] for number in sorted(waits)]


class PackedRows:
    """The rows of every epoch, numbered through: a pure function of mixture, lengths and row size."""

    def __init__(self, mixture: Mixture, lengths: np.ndarray, row_tokens: int) -> None:
        if len(lengths) and int(lengths.max()) > row_tokens:
            longest = int(lengths.argmax())
            raise DataError(
                f"sample {longest} has {lengths[longest]} tokens and a row only {row_tokens}; "
                "lower the dataset's max_tokens, or raise the row's tokens"
            )
        self._mixture = mixture
        self._lengths = lengths
        self._row_tokens = row_tokens
        self._firsts = [0]
        self._epoch: tuple[int, list[np.ndarray]] | None = None

    def rows_of_step(self, step: int, per_step: int) -> list[np.ndarray]:
        """Document numbers of each row of 1-based `step`. A step may span epochs, a row does not."""
        return [self._row(number) for number in range((step - 1) * per_step, step * per_step)]

    def _row(self, number: int) -> np.ndarray:
        while number >= self._firsts[-1]:
            self._firsts.append(self._firsts[-1] + len(self.epoch(len(self._firsts) - 1)))
        epoch = next(place for place in range(len(self._firsts)) if self._firsts[place + 1] > number)
        return self.epoch(epoch)[number - self._firsts[epoch]]

    def epoch(self, number: int) -> list[np.ndarray]:
        """Document numbers of each row of the 0-based epoch `number`."""
        if self._epoch is None or self._epoch[0] != number:
            documents, seed = self._mixture.epoch(number), [self._mixture.seed, number]
            self._epoch = number, pack_epoch(documents, self._lengths, self._row_tokens, seed)
        return self._epoch[1]
