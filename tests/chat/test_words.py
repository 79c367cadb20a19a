"""The memory of words gives the library's tokens, for every split that it knows."""

import json
import random
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.chat.tokenizer import Tokenizer
from posttrain.chat.words import SPLITS, WordEncoder, word_encoder
from posttrain.run.folder import ASSETS
from tests.chat.conversations import PIECES

ASCII = [chr(code) for code in range(128)]
HARD = [*"  \n\n\r\t''//..", "'s", "'LL", "'Re", "aB", "Ab", "12345", " ", "\n\n", "x"]


def text(rng: random.Random, pieces: list[str]) -> str:
    return "".join(rng.choice(pieces) for _ in range(rng.randint(0, 14)))


def definition(split: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((ASSETS / "tiny_base" / "tokenizer.json").read_text())
    made["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = split
    return made


@pytest.mark.parametrize("split", SPLITS)
def test_tokens_are_the_librarys(split: str) -> None:
    settings = definition(split)
    library = tokenizers.Tokenizer.from_str(json.dumps({**settings, "added_tokens": []}))
    words = word_encoder(settings, library)
    assert words is not None
    rng = random.Random(0)
    for number in range(6000):
        written = text(rng, (ASCII, HARD, list(PIECES), [*HARD, *PIECES])[number % 4])
        assert words.encode(written) == library.encode(written, add_special_tokens=False).ids, repr(written)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_is_encoded_as_the_library_does(toy: Tokenizer, written: str) -> None:
    assert isinstance(toy._words, WordEncoder)
    if not any(0xD800 <= ord(letter) < 0xE000 for letter in written):
        assert toy.encode(written) == toy._plain.encode(written, add_special_tokens=False).ids


def test_on_the_real_vocabulary(o200k: Tokenizer) -> None:
    assert o200k._words is not None
    rng = random.Random(1)
    for number in range(4000):
        written = text(rng, [*HARD, *PIECES] if number % 2 else ASCII)
        assert o200k.encode(written) == o200k._plain.encode(written, add_special_tokens=False).ids, repr(written)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}},
        {"model": {"type": "Unigram", "vocab": []}},
    ],
)
def test_other_tokenizers_are_left_to_the_library(change: dict[str, Any]) -> None:
    library = tokenizers.Tokenizer.from_str(json.dumps(definition(SPLITS[0])))
    assert word_encoder(definition(SPLITS[0]), library) is not None
    assert word_encoder(definition(SPLITS[0]) | change, library) is None
    assert word_encoder(definition(r"\w+|\W+"), library) is None
