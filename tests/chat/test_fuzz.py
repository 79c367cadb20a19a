"""Broken completions of every format: each one parses or fails with a reason, and none crashes."""

import pickle
import random
from collections import Counter
from typing import get_args

from posttrain.chat.conversation import Conversation, Message
from posttrain.chat.gemma import Gemma
from posttrain.chat.harmony import Harmony
from posttrain.chat.render import Renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.errors import CompletionError, CompletionReason
from tests.chat.conftest import sentencepiece_definition
from tests.chat.conversations import conversation
from tests.chat.test_gemma import NUMBERED, SPECIALS, UNFLAGGED, made
from tests.chat.test_hf_template import family, generated

BROKEN = 5000
"""Completions of each format that must fail; there are three."""


def completions(renderer: Renderer, conversations: list[Conversation]) -> list[list[int]]:
    """What the model wrote in each conversation's last turn, generation by generation."""
    found: list[list[int]] = []
    for ours in conversations:
        rendered = renderer.render(ours)
        run: list[int] = []
        for token, target in zip(rendered.tokens, rendered.targets, strict=True):
            if target:
                run.append(token)
            if run and token in renderer.stop_tokens:
                found.append(run)
                run = []
    return found


def broken(rng: random.Random, whole: list[list[int]], tokenizer: Tokenizer) -> list[int]:
    """A completion with one to four things done to it."""
    tokens = list(rng.choice(whole))
    specials = sorted(tokenizer.special_ids)
    for _ in range(rng.randint(1, 4)):
        place = rng.randint(0, len(tokens))
        match rng.randrange(10):
            case 0:
                tokens = tokens[:place]
            case 1:
                del tokens[place : place + rng.randint(1, 3)]
            case 2:
                tokens.insert(place, rng.choice(specials))
            case 3:
                tokens.insert(place, rng.choice((rng.randrange(tokenizer.vocab_size + 20), -1, 2**40)))
            case 4:
                tokens[place:place] = tokens[rng.randint(0, place) : place]
            case 5:
                other = rng.choice(whole)
                tokens = tokens[:place] + other[rng.randint(0, len(other)) :]
            case 6:
                tokens += rng.choice(whole)
            case 7:
                tokens[-1:] = [rng.choice(specials)]
            case 8 if ends := [place for place, token in enumerate(tokens, 1) if token in tokenizer.special_ids]:
                tokens = tokens[: rng.choice(ends)]
            case _ if len(tokens) > 1:
                first, second = rng.sample(range(len(tokens)), 2)
                tokens[first], tokens[second] = tokens[second], tokens[first]
    return tokens


def outcomes(renderer: Renderer, tokenizer: Tokenizer, conversations: list[Conversation]) -> Counter[str]:
    """Reasons and their numbers, of so many completions that `BROKEN` fail; `parsed` counts the others."""
    rng = random.Random(11)
    whole = completions(renderer, conversations)
    assert all(renderer.parse(tokens) for tokens in whole)
    counts: Counter[str] = Counter()
    while counts.total() - counts["parsed"] < BROKEN:
        tokens = broken(rng, whole, tokenizer)
        try:
            messages = renderer.parse(tokens)
        except CompletionError as error:
            assert str(error)
            counts[error.reason] += 1
        else:
            assert messages
            assert all(isinstance(message, Message) and message.role == "assistant" for message in messages)
            counts["parsed"] += 1
    assert set(counts) <= {"parsed", *get_args(CompletionReason)}
    print(type(renderer).__name__, dict(counts))
    return counts


def test_harmony(harmony: Harmony, toy: Tokenizer) -> None:
    counts = outcomes(harmony, toy, [conversation(seed) for seed in range(100)])
    reasons = {"header", "channel", "special token", "cut off", "wrong end", "after the end", "no answer", "empty"}
    assert reasons <= set(counts)


def test_gemma() -> None:
    tokenizer = Tokenizer(sentencepiece_definition(SPECIALS, UNFLAGGED))
    counts = outcomes(Gemma(NUMBERED, tokenizer), tokenizer, [made(seed) for seed in range(100)])
    reasons = {"reasoning", "special token", "cut off", "wrong end", "after the end", "empty"}
    assert reasons <= set(counts)


def test_a_template_with_tools_and_reasoning() -> None:
    renderer = family("qwen_tools", reasoning="template")
    tokenizer = renderer._tokenizer
    counts = outcomes(renderer, tokenizer, [generated("qwen_tools", seed) for seed in range(100)])
    reasons = {"reasoning", "call", "special token", "cut off", "after the end", "empty"}
    assert reasons <= set(counts)


def test_a_reason_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(CompletionError("cut off", "it ends early")))
    assert (type(error), error.reason, str(error)) == (CompletionError, "cut off", "it ends early")
