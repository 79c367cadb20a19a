"""Harmony, the chat format of GPT-OSS: sampled tokens back to messages."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from posttrain.chat.conversation import Channel, Message, is_builtin
from posttrain.chat.reading import Decoder, Piece, joined
from posttrain.chat.tokenizer import Tokenizer
from posttrain.errors import ChatFormatError, CompletionError

MARKERS = ("start", "end", "message", "channel", "constrain", "return", "call")
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
CHANNELS: tuple[Channel, ...] = get_args(Channel)


@dataclass(frozen=True)
class Header:
    channel: Channel
    recipient: str | None


def parse(tokens: Sequence[int], markers: Mapping[int, str], tokenizer: Tokenizer) -> list[Message]:
    """The messages sampled after a forced `<|start|>assistant`, the stop token included.

    `markers` names the format's special tokens. Raises CompletionError for anything but whole messages of which only
    the last stops: a final with return, or a call with call.
    """
    messages: list[Message] = []
    for header_tokens, content_tokens, end in _split(tokens, markers):
        where = f"message {len(messages)} of the completion"
        if messages and not _is_open(messages[-1]):
            raise CompletionError("after the end", f"{where} follows a message that ends the generation")
        header = _header(header_tokens, markers, tokenizer, where, author_forced=not messages)
        foreign = next((number for number in content_tokens if number in tokenizer.special_ids), None)
        if foreign is not None:
            raise CompletionError("special token", f"{where} has {tokenizer.decode([foreign])} inside its text")
        expected = "call" if header.recipient else "return" if header.channel == "final" else "end"
        if end != expected:
            raise CompletionError("wrong end", f"{where} ends in <|{end}|>, not <|{expected}|>")
        content = _decoded(content_tokens, tokenizer)
        messages.append(Message(role="assistant", channel=header.channel, recipient=header.recipient, content=content))
    if not messages:
        raise CompletionError("empty", "the completion is empty")
    if _is_open(messages[-1]):
        reason = f"the completion stops after {messages[-1].channel}, with neither a final nor a call"
        raise CompletionError("no answer", reason)
    return messages


def _is_open(message: Message) -> bool:
    return message.recipient is None and message.channel != "final"


def _split(tokens: Sequence[int], markers: Mapping[int, str]) -> Iterator[tuple[list[int], list[int], str]]:
    """Header and text of each message, with the name of the token that ended it."""
    header: list[int] = []
    content: list[int] | None = None
    for number in map(int, tokens):
        name = markers.get(number)
        if content is None and name == "message":
            content = []
        elif name in ("end", "return", "call"):
            if content is None:
                raise CompletionError("header", f"<|{name}|> inside a header: the message has no <|message|>")
            yield header, content, name
            header, content = [], None
        elif content is None:
            header.append(number)
        else:
            content.append(number)
    if header or content is not None:
        raise CompletionError("cut off", "the completion is cut off in the middle of a message")


def _decoded(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    try:
        return tokenizer.decode(tokens)
    except ChatFormatError as error:
        raise CompletionError("special token", str(error)) from None


def _words(tokens: Sequence[int], markers: Mapping[int, str], tokenizer: Tokenizer) -> list[str]:
    """A header's words; special tokens stand alone, spelled `<|name|>`, which no run of text can yield."""
    words: list[str] = []
    run: list[int] = []
    for number in (*tokens, None):
        if number is not None and number not in tokenizer.special_ids:
            run.append(number)
            continue
        text = _decoded(run, tokenizer)
        if "<" in text:
            raise CompletionError("header", f"the header has {text!r} in it")
        words += text.split()
        run = []
        if number is not None:
            words.append(f"<|{markers[number]}|>" if number in markers else _decoded([number], tokenizer))
    return words


def _header(
    tokens: Sequence[int], markers: Mapping[int, str], tokenizer: Tokenizer, where: str, author_forced: bool
) -> Header:
    """Reads `[to=name] <|channel|>name [to=name] [[<|constrain|>]json|code]`, the recipient on either side."""
    words = _words(tokens, markers, tokenizer)
    if not author_forced:
        if words[:2] != ["<|start|>", "assistant"]:
            begins = " ".join(words[:2])
            raise CompletionError("header", f"{where} begins with {begins!r}, not '<|start|>assistant'")
        words = words[2:]
    channel: Channel | None = None
    recipient: str | None = None
    content_type: str | None = None
    while words:
        word = words.pop(0)
        if word == "<|channel|>" and channel is None:
            named = words.pop(0) if words else ""
            channel = next((known for known in CHANNELS if known == named), None)
            if channel is None:
                raise CompletionError("channel", f"{where} is on channel {named!r}; valid are {', '.join(CHANNELS)}")
        elif word.startswith("to=") and not (recipient or content_type) and re.fullmatch(NAME, word[3:]):
            recipient = word[3:]
        elif word == "<|constrain|>" and words[:1] == ["json"] and content_type is None:
            content_type = words.pop(0)
        elif word in ("json", "code") and content_type is None:
            content_type = word
        else:
            raise CompletionError("header", f"{where} has {word!r} in its header")
    if channel is None:
        raise CompletionError("channel", f"{where} has no channel")
    builtin = is_builtin(recipient)
    if recipient and channel != "commentary" and not (builtin and channel == "analysis"):
        also = " or analysis" if builtin else ""
        raise CompletionError("channel", f"{where} calls {recipient} on {channel}: calls go to commentary{also}")
    if content_type and not recipient:
        kind = {"json": "JSON", "code": "code"}[content_type]
        raise CompletionError("header", f"{where} is declared as {kind} but calls no tool")
    if content_type == "code" and not builtin:
        raise CompletionError("header", f"{where} has 'code' in its header: {recipient} takes JSON")
    return Header(channel, recipient)


class HarmonyReader:
    """The completion while it is being written; see `Reader` for what its methods promise."""

    def __init__(self, markers: Mapping[int, str], tokenizer: Tokenizer) -> None:
        self._markers, self._tokenizer = markers, tokenizer
        self._header: list[int] = []
        self._decoder: Decoder | None = None
        """Of the message's content, once its header is over."""
        self._channel: Channel | None = None
        """Where the content goes; None is a call."""
        self._messages = 0

    def read(self, tokens: Sequence[int]) -> list[Piece]:
        return joined([piece for token in tokens for piece in self._read(int(token))])

    def end(self) -> list[Piece]:
        if self._decoder is None:
            return joined([Piece("final", self._tokenizer.show(self._header))])
        return joined([Piece(self._channel, self._decoder.end())]) if self._channel else []

    def _read(self, token: int) -> Iterator[Piece]:
        name = self._markers.get(token)
        if self._decoder is None:
            self._header.append(token)
            if name == "message":
                yield from self._begin()
        elif name in ("end", "return", "call"):
            yield from self.end()
            self._header, self._decoder = [], None
            self._messages += 1
        elif self._channel is not None:
            yield Piece(self._channel, self._decoder.add(token))

    def _begin(self) -> Iterator[Piece]:
        self._decoder = Decoder(self._tokenizer)
        try:
            header = _header(self._header[:-1], self._markers, self._tokenizer, "", author_forced=not self._messages)
        except ChatFormatError:
            self._channel = "final"
            yield Piece("final", self._tokenizer.show(self._header))
        else:
            self._channel = None if header.recipient else header.channel
