"""A byte-level BPE vocabulary (`tokenizer.json`) as GGUF metadata."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from posttrain.errors import ModelError

O200K_MARKS = (r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\p{N}{1,3}")
"""Parts that together tell o200k's split pattern from the other published ones."""


@dataclass(frozen=True)
class Vocabulary:
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    pre_tokenizer: str
    """llama.cpp's name for the regex that splits text before BPE."""


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary with ids without a token filled up to the model's `size`."""
    file = folder / "tokenizer.json"
    try:
        tokenizer = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ModelError(f"{file}: the model is {model['type']}; a GGUF file can be written from byte-level BPE")
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    entries = [(text, index, TokenType.NORMAL) for text, index in model["vocab"].items()]
    for added in tokenizer.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        entries.append((added["content"], added["id"], kind))
    for text, index, kind in entries:
        if index >= size:
            raise ModelError(f"{file}: token {text!r} has id {index}, but the model has {size} embeddings")
        tokens[index], types[index] = text, kind
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(tokens, types, merges, _pre_tokenizer(file, tokenizer.get("pre_tokenizer") or {}))


def _pre_tokenizer(file: Path, settings: dict[str, Any]) -> str:
    steps = settings.get("pretokenizers", [settings])
    patterns = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    if byte_level and not patterns and byte_level[0].get("use_regex", True):
        return "gpt-2"
    if byte_level and len(patterns) == 1 and all(mark in patterns[0] for mark in O200K_MARKS):
        return "gpt-4o"
    raise ModelError(f"{file}: llama.cpp has no known name for this pre-tokenizer: {json.dumps(settings)[:200]}")


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, config: dict[str, Any], folder: Path) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    ids = special_ids(config, folder)
    if "bos" in ids:
        writer.add_bos_token_id(ids["bos"])
    if "eos" in ids:
        writer.add_eos_token_id(ids["eos"])
    if "pad" in ids:
        writer.add_pad_token_id(ids["pad"])
    writer.add_add_bos_token(False)
    template = folder / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text())


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
