"""A small vocabulary over the worlds' text, made once."""

from pathlib import Path

import pytest

from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.vocabulary import HARMONY_WORDS, train_vocabulary
from posttrain.recipe.types import HarmonyFormat
from posttrain.worlds.registry import rows

CHAT = HarmonyFormat(
    kind="harmony",
    date="2026-01-01",
    knowledge_cutoff="2024-06",
    reasoning_effort="low",
    identity="You are a helpful assistant.",
)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [HARMONY_WORDS] * 20 + [row["text"] for row in rows("language", "text", "train", 800, 0)]


@pytest.fixture(scope="session")
def tokenizer_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_vocabulary(texts, 640).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture
def chat() -> HarmonyFormat:
    return CHAT
