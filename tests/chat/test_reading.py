"""Completions read token by token: what is told is what `parse` finds in the whole, and it is told early."""

import random

import pytest

from posttrain.chat.conversation import Conversation, Message, call
from posttrain.chat.gemma import Gemma
from posttrain.chat.harmony import Harmony
from posttrain.chat.reading import Decoder, Piece, StopTexts
from posttrain.chat.render import Renderer
from posttrain.chat.tokenizer import Tokenizer
from tests.chat.conftest import CHAT, byte_level_definition
from tests.chat.test_gemma import DROPPED, NUMBERED, SPECIALS, UNFLAGGED, sentencepiece_definition
from tests.chat.test_hf_template import TOOL, family, final, think, user

WORDS = ("the", "go", "naïve", "日本語", "🙂", "{", "<", "</", "<th", "\n", "x = 1;", "to=", "  two", "Answer", "1. ")


def renderers() -> dict[str, Renderer]:
    gemma = Tokenizer(sentencepiece_definition(SPECIALS, UNFLAGGED))
    markers = ("start", "end", "message", "channel", "constrain", "return", "call")
    harmony = Tokenizer(byte_level_definition(tuple(f"<|{name}|>" for name in markers)))
    return {
        "harmony": Harmony(CHAT, harmony),
        "gemma": Gemma(DROPPED, gemma),
        "gemma numbered": Gemma(NUMBERED, gemma),
        "chatml": family("chatml"),
        "llama3": family("llama3"),
        "qwen": family("qwen_tools"),
        "qwen thinking": family("qwen_tools", reasoning="template"),
    }


RENDERERS = renderers()
THINKING, CALLING = ("harmony", "gemma numbered", "qwen thinking"), ("harmony", "llama3", "qwen", "qwen thinking")


def said(rng: random.Random, name: str) -> list[Message]:
    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 12))).strip() or "so"

    messages = [think(text().replace("\n", " "))] if name in THINKING and rng.random() < 0.7 else []
    if name in CALLING and rng.random() < 0.5:
        return [*messages, call("f", {"n": rng.randint(0, 9)})]
    return [*messages, final(text())]


def told(renderer: Renderer, tokens: list[int], rng: random.Random | None = None) -> tuple[dict[str, str], int]:
    """Text by channel, and how many times something was told before the end."""
    reader, texts, times = renderer.reader(), {"analysis": "", "final": ""}, 0
    at = 0
    while at < len(tokens):
        step = rng.randint(1, 5) if rng else 1
        pieces = reader.read(tokens[at : at + step])
        times += bool(pieces)
        at += step
        for piece in pieces:
            texts[piece.channel] += piece.text
    for piece in reader.end():
        texts[piece.channel] += piece.text
    return texts, times


@pytest.mark.parametrize("name", RENDERERS)
def test_what_is_told_is_what_the_whole_says(name: str) -> None:
    renderer, rng, early = RENDERERS[name], random.Random(name), 0
    for _ in range(150):
        answer = said(rng, name)
        asked = Conversation(messages=(user("Go"),), tools=(TOOL,) if name in CALLING else ())
        prompt = renderer.prompt(asked)
        whole = renderer.render(asked.model_copy(update={"messages": (*asked.messages, *answer)})).tokens
        assert whole[: len(prompt)] == prompt
        completion = whole[len(prompt) :]
        expected = {"analysis": "", "final": ""}
        for message in renderer.parse(completion):
            if message.recipient is None:
                expected["analysis" if message.channel == "analysis" else "final"] += message.content
        texts, times = told(renderer, completion)
        assert {channel: text.strip() for channel, text in texts.items()} == {
            channel: text.strip() for channel, text in expected.items()
        }
        assert told(renderer, completion, rng)[0] == texts
        early += times
    assert early > 300 or name == "gemma numbered"


@pytest.mark.parametrize("name", RENDERERS)
def test_what_is_no_message_is_told_as_it_is(name: str) -> None:
    """Any tokens at all: nothing is lost that is no mark of the format's, and nothing fails."""
    renderer, rng = RENDERERS[name], random.Random(name)
    for _ in range(200):
        tokens = [rng.randrange(0, 300) for _ in range(rng.randint(0, 30))]
        assert told(renderer, tokens)[0] == told(renderer, tokens, rng)[0]


def test_a_malformed_header_is_part_of_the_answer() -> None:
    harmony = RENDERERS["harmony"]
    start = harmony.prompt(Conversation(messages=(user("x"),)))
    body = harmony.render(Conversation(messages=(user("x"), final("Yes.")))).tokens[len(start) :]
    assert told(harmony, body)[0] == {"analysis": "", "final": "Yes."}
    # Without the channel's mark.
    assert told(harmony, body[1:])[0]["final"] == "final<|message|>Yes."
    assert told(harmony, body[1:-3])[0]["final"] == "final<|message|>Ye"
    assert told(harmony, body[:1])[0]["final"] == "<|channel|>"


def test_a_character_of_several_tokens_is_told_when_it_is_whole() -> None:
    tokenizer = Tokenizer(byte_level_definition(()))
    for text in ("naïve 🙂🙂 日本", "🙂", "a\ufffdb"):
        decoder = Decoder(tokenizer)
        pieces = [decoder.add(token) for token in tokenizer.encode(text)]
        assert "".join(pieces) + decoder.end() == text
    decoder = Decoder(tokenizer)
    half = tokenizer.encode("🙂")[:-1]
    assert [decoder.add(token) for token in half] == [""] * len(half)
    assert decoder.end() == tokenizer.decode(half)


@pytest.mark.parametrize("stops", [("END",), ("END", "EN"), ("D", "never"), ("xEND",)])
def test_stop_texts_are_found_across_pieces(stops: tuple[str, ...]) -> None:
    text = "one EN two xEND three END"
    places = [text.find(stop) for stop in stops if stop in text]
    for width in range(1, len(text)):
        stop, told = StopTexts(stops), ""
        for at in range(0, len(text), width):
            told += "".join(piece.text for piece in stop.read([Piece("final", text[at : at + width])]))
            if stop.met:
                break
        assert told + "".join(piece.text for piece in stop.end()) == text[: min(places)] and stop.met
    missing = StopTexts(("twice", "ENDED"))
    pieces = [*missing.read([Piece("final", text), Piece("analysis", "ENDED")]), *missing.end()]
    assert "".join(piece.text for piece in pieces if piece.channel == "final") == text and not missing.met
