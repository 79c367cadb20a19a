"""A completion's text while it is being written, by channel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from posttrain.chat.conversation import Channel
from posttrain.chat.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
"""How bytes end that may yet become a character."""
LONGEST_CHARACTER = 4
"""Tokens, at most: UTF-8 has so many bytes."""


@dataclass(frozen=True)
class Piece:
    channel: Channel
    text: str


class Reader(Protocol):
    """Tells a completion's text as its tokens come; calls are left to `Renderer.parse`.

    What was told is never taken back. A completion that `parse` refuses is told as it is, as far as it goes.
    """

    def read(self, tokens: Sequence[int]) -> list[Piece]:
        """What these tokens, the completion's next, make sure of."""
        ...

    def end(self) -> list[Piece]:
        """What was held back; no token follows."""
        ...


class Decoder:
    """Text of tokens one after another, which together have the text of all: characters may need several."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        """Those whose text has not been told, behind some whose text has."""
        self._told_tokens, self._told_length = 0, 0

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self._tokenizer.show(self._tokens)
        untold = len(self._tokens) - self._told_tokens
        return "" if text.endswith(UNFINISHED) and untold < LONGEST_CHARACTER else self._tell(text)

    def end(self) -> str:
        return self._tell(self._tokenizer.show(self._tokens))

    def _tell(self, text: str) -> str:
        new = text[self._told_length :]
        # What a token's text is may depend on the one before it, as a blank in front of a word does.
        self._tokens = self._tokens[self._told_tokens :]
        self._told_tokens, self._told_length = len(self._tokens), len(self._tokenizer.show(self._tokens))
        return new


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours on one channel as one, without empty ones."""
    made: list[Piece] = []
    for piece in pieces:
        if not piece.text:
            continue
        if made and made[-1].channel == piece.channel:
            piece = Piece(piece.channel, made.pop().text + piece.text)
        made.append(piece)
    return made


class Plain:
    """Everything up to a stop token is the answer."""

    def __init__(self, tokenizer: Tokenizer, stop_tokens: frozenset[int]) -> None:
        self._decoder, self._stops = Decoder(tokenizer), stop_tokens

    def read(self, tokens: Sequence[int]) -> list[Piece]:
        text = "".join(self._decoder.add(token) for token in tokens if token not in self._stops)
        return joined([Piece("final", text)])

    def end(self) -> list[Piece]:
        return joined([Piece("final", self._decoder.end())])
