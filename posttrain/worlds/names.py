"""Invented names, and the split each belongs to: by a hash of the name, so no list has to be kept."""

import random
import re
import zlib
from typing import Literal

Split = Literal["train", "heldout"]

ONSETS = "bdfgklmnprstvz"
OPEN = tuple(
    onset + vowel
    for onset in ONSETS
    for vowel in "aeiou"
    if onset + vowel not in {"be", "do", "no", "so", "to", "me", "re", "de", "ge", "te"}
)
CLOSED = (
    "bal", "bin", "dar", "dol", "fen", "fir", "gan", "gul", "kal", "kel", "kon", "lan", "lin", "lor", "mir", "mol",
    "nar", "nel", "pal", "pin", "rin", "rol", "sar", "sil", "tam", "tor", "van", "vel", "zan", "zor",
)  # fmt: skip
SYLLABLES = OPEN + CLOSED
"""Each is one token of the vocabulary; every one starts with a consonant, so a name splits in one way only."""

ORDINARY = frozenset(
    ["data", "dolor", "file", "final", "fine", "line", "live", "life", "late", "male", "mine", "name", "nine", "note",
     "pale", "pile", "pine", "role", "rose", "rule", "safe", "sale", "same", "save", "side", "size", "solar", "tale",
     "time", "tile", "tune", "vase", "value", "zero", "sofa", "total", "vote", "love", "none", "move", "fire", "five"]
)  # fmt: skip
"""Words that two or three syllables would also spell."""


_SYLLABLE = f"(?:{'|'.join(sorted(SYLLABLES, key=len, reverse=True))})"
NAME_LIKE = re.compile(rf"(?<![a-zA-Z]){_SYLLABLE}{{2,3}}(?![a-zA-Z])")
"""A whole word of two or three syllables."""


def split_of(name: str) -> Split:
    """One name in eight is held out."""
    return "heldout" if zlib.crc32(b"name:" + name.encode()) % 8 == 0 else "train"


def name(rng: random.Random, split: Split) -> str:
    """A name of two or three syllables that belongs to `split`."""
    while True:
        syllables = 2 if rng.random() < 0.7 else 3
        word = "".join([SYLLABLES[int(rng.random() * len(SYLLABLES))] for _ in range(syllables)])
        if word not in ORDINARY and split_of(word) == split:
            return word


def names(rng: random.Random, split: Split, count: int) -> list[str]:
    """`count` different names."""
    found: list[str] = []
    while len(found) < count:
        word = name(rng, split)
        if word not in found:
            found.append(word)
    return found
