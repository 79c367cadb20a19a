"""The tiny base's vocabulary: byte-level BPE in which an invented name has the same tokens wherever it stands."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from posttrain.chat.template import harmony_template
from posttrain.errors import RecipeError
from posttrain.recipe.types import FreshBase, HarmonyFormat, Recipe
from posttrain.run.folder import write_atomic, write_json_atomic
from posttrain.worlds.names import SYLLABLES
from posttrain.worlds.registry import rows
from posttrain.worlds.tools import VERBS

O200K = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""The split of o200k, which llama.cpp knows as `gpt-4o`."""

HARMONY_SPECIALS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)

Pair = tuple[str, str]


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(O200K), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _syllable_merges() -> list[Pair]:
    """Consonant + vowel first, then the closing consonant: with no vowel in front, one way to split every name."""
    opened = sorted({syllable[:2] for syllable in SYLLABLES})
    closed = sorted(syllable for syllable in SYLLABLES if len(syllable) == 3)
    return [(s[0], s[1]) for s in opened] + [(s[:2], s[2]) for s in closed]


def _apply(word: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    merged: list[str] = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            merged.append(word[i] + word[i + 1])
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return tuple(merged)


def _allowed(a: str, b: str, pieces: set[str]) -> int:
    """0: this merge could change the tokens of a name or of a number. 1: only where nothing better is left. 2: yes."""
    if any(c.isdigit() for c in a + b):
        return 0
    # A tool's verb, too, has the same tokens after a space, a dot or a line's start.
    if a.startswith("Ġ") and any(verb.startswith((a + b)[1:]) for verb in VERBS):
        return 0
    if b in pieces and (a in pieces or not a.isalpha() or a.startswith("Ġ")):
        return 0
    if a in pieces and not b.isalpha():
        return 0
    word = (a.removeprefix("Ġ") + b).isalpha()
    return 2 if word or not any(c.isalpha() and c not in "ĠĊ" for c in a + b) else 1


def _learn_merges(counts: Counter[str], total: int) -> list[Pair]:
    """Syllables first, then the most frequent pairs, never one that could change the tokens of a name."""
    merges = _syllable_merges()
    pieces = {a + b for a, b in merges}
    words: list[tuple[tuple[str, ...], int]] = []
    for text, count in sorted(counts.items()):
        word = tuple(text)
        for pair in merges:
            word = _apply(word, pair) if pair[0] in word else word
        if any(_allowed(a, b, pieces) for a, b in itertools.pairwise(word)):
            words.append((word, count))
    pairs: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for place, (word, count) in enumerate(words):
        for pair in itertools.pairwise(word):
            pairs[pair] += count
            places[pair].add(place)
    rank = {pair: _allowed(*pair, pieces) for pair in pairs}
    while len(merges) < total:
        usable = [(rank[pair], count, pair) for pair, count in pairs.items() if rank[pair] and count]
        if not usable:
            raise RecipeError(f"base.vocab_size: the text allows {len(merges)} merges, not {total}; choose fewer")
        best = min(usable, key=lambda entry: (-entry[0], -entry[1], entry[2]))[2]
        merges.append(best)
        for place in places[best]:
            word, count = words[place]
            merged = _apply(word, best)
            for pair in itertools.pairwise(word):
                pairs[pair] -= count
            for pair in itertools.pairwise(merged):
                pairs[pair] += count
                places[pair].add(place)
                rank.setdefault(pair, _allowed(*pair, pieces))
            words[place] = (merged, count)
    return merges


def _count_words(texts: Iterable[str]) -> Counter[str]:
    split = _pre_tokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        for special in HARMONY_SPECIALS:
            text = text.replace(special, "\n")
        counts.update(word for word, _ in split.pre_tokenize_str(text))
    return counts


def train_vocabulary(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens: bytes, syllables, learned pieces, and Harmony's specials last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = vocab_size - len(alphabet) - len(HARMONY_SPECIALS)
    if room < len(_syllable_merges()):
        least = vocab_size - room + len(_syllable_merges())
        raise RecipeError(f"base.vocab_size: {vocab_size} is too small, at least {least} are needed")
    merges = _learn_merges(_count_words(texts), room)
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    for a, b in merges:
        vocabulary.setdefault(a + b, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in HARMONY_SPECIALS])
    return tokenizer


# ---------------------------------------------------------------- the fresh base

HARMONY_WORDS = """
# Valid channels: analysis, commentary, final. Channel must be included for every message.
Calls to these tools must go to the commentary channel: 'functions'.
Knowledge cutoff: 2024-06
Current date: 2025-06-28

Reasoning: low
 medium high
# Instructions

# Tools

## functions

namespace functions {

type  = (_: {
path: string,
old: string,
new: string,
count: number,
city?: string,
}) => any;

type  = () => any;

} // namespace functions
developer system user assistant commentary to=functions.f json
developer
system
user
assistant
commentary
analysis
final
json
"""
HARMONY_WEIGHT = 1000
"""Every rendered row holds these words, so they get tokens before rarer ones do."""
SAMPLE = (
    ("language", "text", 6000),
    ("tools", "conversations", 1000),
    ("agent", "conversations", 1000),
    ("preferences", "pairs", 300),
)
SAMPLE_SEED = 0


def vocabulary_texts() -> Iterator[str]:
    """What the vocabulary is learned from: training rows of every world, and the words of Harmony's headers."""
    for _ in range(HARMONY_WEIGHT):
        yield HARMONY_WORDS
    for world, content, count in SAMPLE:
        for row in rows(world, content, "train", count, SAMPLE_SEED):
            if content == "text":
                yield row["text"]
                continue
            conversation = row["conversation"] if content == "conversations" else row["prompt"]
            for tool in conversation["tools"]:
                yield f"// {tool['description']}\ntype {tool['name']} = (_: {{\n"
            for message in (*conversation["messages"], *row.get("rejected", ())):
                yield message["content"]


def model_config(base: FreshBase, tokenizer: Tokenizer) -> dict[str, Any]:
    kinds = ("sliding_attention", "full_attention")
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|startoftext|>"),
        "dtype": "float32",
        "eos_token_id": tokenizer.token_to_id("<|return|>"),
        "head_dim": base.head_dim,
        "hidden_act": "silu",
        "hidden_size": base.hidden_size,
        "initializer_range": base.initializer_range,
        "intermediate_size": base.expert_size,
        "layer_types": [kinds[layer % 2] for layer in range(base.num_layers)],
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": base.num_heads,
        "num_experts_per_tok": base.experts_per_token,
        "num_hidden_layers": base.num_layers,
        "num_key_value_heads": base.num_kv_heads,
        "num_local_experts": base.num_experts,
        "output_router_logits": False,
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            # llama.cpp rounds the correction range; with truncate it computes the same positions
            "truncate": True,
            "original_max_position_embeddings": 4096,
        },
        "router_aux_loss_coef": 0.9,
        "sliding_window": base.sliding_window,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": base.vocab_size,
    }


def make_fresh_base(recipe: Recipe, folder: Path) -> None:
    """Write configuration, tokenizer and chat template of the recipe's fresh base; training draws its weights."""
    base = recipe.base
    if not isinstance(base, FreshBase):
        raise RecipeError(f"base.kind: {base.kind!r} is no fresh base")
    if not isinstance(recipe.chat, HarmonyFormat):
        raise RecipeError(f"chat.kind: a fresh base is a GPT-OSS, which speaks harmony, not {recipe.chat.kind!r}")
    tokenizer = train_vocabulary(vocabulary_texts(), base.vocab_size)
    specials = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    config = model_config(base, tokenizer)
    write_json_atomic(folder / "config.json", config)
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    write_json_atomic(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": config["max_position_embeddings"],
            **specials,
        },
    )
    write_json_atomic(folder / "special_tokens_map.json", specials)
    write_atomic(folder / "chat_template.jinja", harmony_template(recipe.chat).encode())
    stops = [tokenizer.token_to_id(name) for name in ("<|return|>", "<|endoftext|>", "<|call|>")]
    ids = {key: config[key] for key in ("bos_token_id", "pad_token_id")}
    write_json_atomic(folder / "generation_config.json", {**ids, "eos_token_id": stops, "do_sample": False})
