"""Text that two datasets share: rows with a run of so many words in common."""

import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b

from posttrain.data.statistics import JsonRow, text_of

WORD = re.compile(r"\w+")
NGRAM = 13


def shared_rows(rows: Iterable[JsonRow], others: Iterable[JsonRow], length: int = NGRAM) -> list[str]:
    """Ids of the rows that have a run of `length` words, without case and signs, in common with one of the others."""
    known = {gram for row in others for gram in _grams(row, length)}
    return [row["id"] for row in rows if any(gram in known for gram in _grams(row, length))]


def _grams(row: JsonRow, length: int) -> Iterator[bytes]:
    words = WORD.findall(text_of(row).lower())
    for start in range(len(words) - length + 1):
        yield blake2b(" ".join(words[start : start + length]).encode(), digest_size=8).digest()
