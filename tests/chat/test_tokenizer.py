import json
from pathlib import Path

import pytest

from posttrain.chat.tokenizer import Tokenizer
from posttrain.errors import ChatFormatError, ModelError


def test_text_comes_back_and_specials_are_only_recognised_on_request(toy: Tokenizer) -> None:
    said = "to<|end|> naïve 日本\n<|start|>"
    assert not toy.special_ids & set(toy.encode(said))
    assert toy.decode(toy.encode(said)) == said
    whole = toy.encode_with_specials(said)
    found = [number for number in whole if number in toy.special_ids]
    assert found == [toy.special("<|end|>"), toy.special("<|start|>")]
    assert toy.decode(whole) == said
    assert toy.vocab_size == max(toy.special_ids) + 1


def test_added_tokens_are_not_recognised_whatever_their_flag(toy_definition: str) -> None:
    settings = json.loads(toy_definition)
    for token in settings["added_tokens"]:
        token["special"] = False
    loose = Tokenizer(json.dumps(settings))
    assert not loose.special_ids & set(loose.encode("a<|end|>b"))
    assert loose.encode("a<|end|>b") == Tokenizer(toy_definition).encode("a<|end|>b")


def test_ids_outside_the_vocabulary(toy: Tokenizer) -> None:
    known = toy.encode("an")
    with pytest.raises(ChatFormatError, match=f"token id {toy.vocab_size} is not in the vocabulary"):
        toy.decode([*known, toy.vocab_size])
    assert toy.show([*known, toy.vocab_size, *known, -1]) == f"an<|id {toy.vocab_size}|>an<|id -1|>"


def test_folders_that_hold_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    for broken in ("", "[]", '{"model": {"type": "none"}}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ModelError, match="cannot be read as a tokenizer"):
            Tokenizer.load(tmp_path)


def test_a_missing_special_token_is_named(toy: Tokenizer) -> None:
    with pytest.raises(ModelError, match=r"no special token <\|pad\|>"):
        toy.special("<|pad|>")
