"""Encoding by a memory of words: most pieces of a text were met before, and their tokens are looked up.

Only for byte-level BPE whose split of text into pieces is one of `SPLITS`, and only where the text is ASCII: there the
split is the same expression with its classes spelled out. Everything else goes to the library.
"""

import re
from collections.abc import Callable
from itertools import chain
from typing import Any

import tokenizers

_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OLDER = rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{count}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"

SPLITS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    _OLDER.replace("{count}", "{1,3}"),
    _OLDER.replace("{count}", ""),
)
"""Of GPT-OSS (o200k), Llama 3 and Qwen. In all of them no piece goes on from a line's end into a letter or digit."""

_ASCII = {
    _UPPER: "[A-Z]",
    _LOWER: "[a-z]",
    r"^\r\n\p{L}\p{N}": r"^\r\nA-Za-z0-9",
    r"^\s\p{L}\p{N}": r"^\sA-Za-z0-9",
    r"\p{L}": "[A-Za-z]",
    r"\p{N}": "[0-9]",
}
_LINE_START = re.compile(r"(?<=\n)(?=[A-Za-z0-9])")
_REMEMBERED = 2**17
"""Words, about 30 MB; the most frequent ones come early."""


def word_encoder(settings: dict[str, Any], library: tokenizers.Tokenizer) -> "WordEncoder | None":
    """For a tokenizer with `tokenizer.json`'s `settings` and no added tokens; None where it is of another kind."""
    match settings:
        case {
            "normalizer": None | {"type": "NFC"},
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                ],
            },
            "model": {"type": "BPE", "dropout": None},
        } if pattern in SPLITS and (behavior, invert) in (("Isolated", False), ("Removed", True)):
            for unicode_class, ascii_class in _ASCII.items():
                pattern = pattern.replace(unicode_class, ascii_class)
            return WordEncoder(re.compile(pattern, re.ASCII), library)
    return None


class WordEncoder:
    def __init__(self, split: re.Pattern[str], library: tokenizers.Tokenizer) -> None:
        self._pieces: Callable[[str], list[str]] = split.findall
        self._library = library
        self._remembered = _Words(library)

    def encode(self, text: str) -> list[int]:
        if text.isascii():
            return self._ascii(text)
        ids: list[int] = []
        for lines in _LINE_START.split(text):
            ids += self._ascii(lines) if lines.isascii() else self._library.encode(lines, add_special_tokens=False).ids
        return ids

    def _ascii(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self._remembered.__getitem__, self._pieces(text))))


class _Words(dict[str, tuple[int, ...]]):
    """Tokens by word, made when first asked for."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._model = library.model

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(token.id for token in self._model.tokenize(word.translate(_BYTES)))
        if len(self) < _REMEMBERED:
            self[word] = ids
        return ids


_BYTES = {byte: chr(256 + byte) for byte in range(33)} | {127: chr(256 + 33)}
"""ASCII characters that byte-level BPE writes as others, as in GPT-2: those that do not print."""
