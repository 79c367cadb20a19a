"""The vocabulary: exact size, no text it cannot write, and names that never change their tokens."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library

from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.vocabulary import HARMONY_SPECIALS, make_fresh_base, train_vocabulary
from posttrain.errors import RecipeError
from posttrain.recipe.types import NOTHING_SUGGESTED, FreshBase, HarmonyFormat, Recipe
from posttrain.worlds.names import SYLLABLES, name
from posttrain.worlds.tools import VERBS

CONTEXTS = (
    ("", ""),
    (" ", " "),
    ('"', '"'),
    ('{"', '":'),
    ("'", "'"),
    ("_", "("),
    ("\n", "\n"),
    ("-", "-52"),
    (".", ".py"),
    ("(", ", "),
    ("<|message|>", "<|end|>"),
    ("to=functions.", "<|channel|>"),
)


def contains(whole: list[int], part: list[int]) -> bool:
    return any(whole[at : at + len(part)] == part for at in range(len(whole) - len(part) + 1))


def test_a_name_has_the_same_tokens_wherever_it_stands(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(1000):
        word = name(rng, rng.choice(("train", "heldout")))
        alone = tokenizer.encode(word)
        assert len(alone) in (2, 3)
        assert all(tokenizer.decode([token]) in SYLLABLES for token in alone)
        for before, after in CONTEXTS:
            assert contains(tokenizer.encode_with_specials(before + word + after), alone), (before, word, after)


def test_a_verb_has_the_same_tokens_after_a_space(tokenizer: Tokenizer) -> None:
    for verb in VERBS:
        assert contains(tokenizer.encode(f"type {verb}_kelmo"), tokenizer.encode(verb))


def test_digits_stay_alone(tokenizer: Tokenizer) -> None:
    for text in ("4821", "kelmo-52", "a * 13 + 7", '{"count":30}'):
        digits = [c for c in text if c.isdigit()]
        assert [t for t in map(tokenizer.decode, ([i] for i in tokenizer.encode(text))) if t.isdigit()] == digits


def test_size_is_exact_and_specials_are_last(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 640
    assert [tokenizer.special(special) for special in HARMONY_SPECIALS] == list(range(631, 640))


@pytest.mark.parametrize("text", ["", "naïve 日本 🙂", "a\t\tb  \r\n\n c", "\x00\x7f", "DON'T 12345 'll"])
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_same_texts_make_the_same_file(texts: list[str]) -> None:
    assert train_vocabulary(texts[:200], 400).to_str() == train_vocabulary(texts[:200], 400).to_str()


def test_too_small_and_too_large_sizes_are_refused(texts: list[str]) -> None:
    with pytest.raises(RecipeError, match="vocab_size: 300 is too small"):
        train_vocabulary(texts[:50], 300)
    with pytest.raises(RecipeError, match="choose fewer"):
        train_vocabulary(["if x then y"], 1024)


def test_a_fresh_base_folder_is_complete_and_repeatable(tmp_path: Path, chat: HarmonyFormat) -> None:
    base = FreshBase(
        kind="fresh",
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        num_experts=4,
        experts_per_token=2,
        expert_size=48,
        vocab_size=900,
        sliding_window=16,
        initializer_range=0.02,
    )
    recipe = Recipe(name="fresh", flags={}, seed=0, base=base, chat=chat, phases=(), suggested=NOTHING_SUGGESTED)
    make_fresh_base(recipe, tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert (config["vocab_size"], config["intermediate_size"], config["num_local_experts"]) == (900, 48, 4)
    library = Library.from_file(str(tmp_path / "one" / "tokenizer.json"))
    assert library.get_vocab_size() == 900
    assert config["eos_token_id"] == library.token_to_id("<|return|>")
    assert {file.name for file in (tmp_path / "one").iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
    }


def test_stock_transformers_reads_the_configuration(tmp_path: Path, texts: list[str]) -> None:
    from transformers import GptOssConfig

    from posttrain.data.vocabulary import model_config

    base = FreshBase(
        kind="fresh",
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        num_experts=4,
        experts_per_token=2,
        expert_size=48,
        vocab_size=400,
        sliding_window=16,
        initializer_range=0.02,
    )
    written = model_config(base, train_vocabulary(texts[:200], 400))
    read = GptOssConfig(**written)
    for key, value in written.items():
        if key not in ("architectures", "dtype"):
            assert getattr(read, key) == value, key
