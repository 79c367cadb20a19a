"""A BPE vocabulary (`tokenizer.json`), byte-level or SentencePiece's, as GGUF metadata."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from posttrain.errors import ModelError

MARKS = {
    "gpt-4o": (r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\p{N}{1,3}"),
    "llama-bpe": ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|", r"[^\r\n\p{L}\p{N}]?\p{L}+|", r"|\p{N}{1,3}|"),
    "qwen2": ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|", r"[^\r\n\p{L}\p{N}]?\p{L}+|", r"|\p{N}|"),
}
"""Parts that together tell a published split pattern from the others, by llama.cpp's name for it."""
SPACE = "\u2581"
"""What stands for a space in SentencePiece's vocabularies."""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    pre_tokenizer: str | None
    """llama.cpp's name for the regex that splits text before BPE; None for SentencePiece's, which has none."""
    space_prefix: bool
    """Whether a space is put in front of a text."""
    begins_with_bos: bool


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary with ids without a token filled up to the model's `size`."""
    file = folder / "tokenizer.json"
    try:
        tokenizer = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ModelError(f"{file}: the model is {model['type']}; a GGUF file can be written from BPE")
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    pieces = bool(model.get("byte_fallback"))
    entries = [(text, index, _kind(text, model, pieces)) for text, index in model["vocab"].items()]
    for added in tokenizer.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        entries.append((added["content"], added["id"], kind))
    for text, index, kind in entries:
        if index >= size:
            raise ModelError(f"{file}: token {text!r} has id {index}, but the model has {size} embeddings")
        tokens[index], types[index] = text, kind
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    name = None if pieces else _pre_tokenizer(file, tokenizer.get("pre_tokenizer") or {})
    return Vocabulary(tokens, types, merges, name, _prefixes_space(tokenizer), _begins_with_bos(file, tokens))


def read_tokens(folder: Path) -> dict[int, str]:
    """Token texts by id; empty where the folder has no tokenizer."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return {}
    tokenizer = json.loads(file.read_text())
    tokens = {index: text for text, index in tokenizer["model"]["vocab"].items()}
    return tokens | {added["id"]: added["content"] for added in tokenizer.get("added_tokens", [])}


def _kind(text: str, model: dict[str, Any], pieces: bool) -> TokenType:
    if pieces and BYTE.fullmatch(text):
        return TokenType.BYTE
    return TokenType.UNKNOWN if pieces and text == model.get("unk_token") else TokenType.NORMAL


def _prefixes_space(tokenizer: dict[str, Any]) -> bool:
    normalizer = tokenizer.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("type") == "Prepend" and step.get("prepend") == SPACE for step in steps)


def _begins_with_bos(file: Path, tokens: list[str]) -> bool:
    """Whether encoding puts a token in front of every text."""
    tokenizer = Tokenizer.from_file(str(file))
    with_specials, bare = (tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
    return len(with_specials) > len(bare) and with_specials[: len(bare)] != bare


def _pre_tokenizer(file: Path, settings: dict[str, Any]) -> str:
    steps = settings.get("pretokenizers", [settings])
    patterns = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    if byte_level and not patterns and byte_level[0].get("use_regex", True):
        return "gpt-2"
    for name, marks in MARKS.items():
        if byte_level and len(patterns) == 1 and all(mark in patterns[0] for mark in marks):
            return name
    raise ModelError(
        f"{file}: llama.cpp has no known name for this pre-tokenizer (known are gpt-2, {', '.join(MARKS)}): "
        f"{json.dumps(settings)[:200]}"
    )


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, config: dict[str, Any], folder: Path) -> None:
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.pre_tokenizer is None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(vocabulary))
        writer.add_add_space_prefix(vocabulary.space_prefix)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
        writer.add_token_merges(vocabulary.merges)
    ids = special_ids(config, folder)
    if "bos" in ids:
        writer.add_bos_token_id(ids["bos"])
    if "eos" in ids:
        writer.add_eos_token_id(ids["eos"])
    if "pad" in ids:
        writer.add_pad_token_id(ids["pad"])
    writer.add_add_bos_token(vocabulary.begins_with_bos)
    template = folder / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text())


def _scores(vocabulary: Vocabulary) -> list[float]:
    """SentencePiece merges the pair whose piece scores highest: the earlier a merge stands, the higher its piece."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(vocabulary.merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(ranks.get(token, len(vocabulary.merges))) for token in vocabulary.tokens]


def special_ids(config: dict[str, Any], folder: Path) -> dict[str, int]:
    """bos, eos and pad from the generation config, else from the model's; the first where there are several."""
    file = folder / "generation_config.json"
    generation = json.loads(file.read_text()) if file.exists() else {}
    found = {}
    for kind in ("bos", "eos", "pad"):
        value = generation.get(f"{kind}_token_id", config.get(f"{kind}_token_id"))
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            found[kind] = value
    return found
