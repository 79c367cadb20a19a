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


def without_begun(text: str, mark: str) -> str:
    """The text without what may be the beginning of `mark` at its end."""
    for length in range(min(len(mark), len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return text[:-length]
    return text


class Plain:
    """Everything is the answer, but for the tokens that are hidden."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]) -> None:
        self._decoder, self._hidden = Decoder(tokenizer), hidden

    def read(self, tokens: Sequence[int]) -> list[Piece]:
        return joined([Piece("final", self._decoder.add(token)) for token in tokens if token not in self._hidden])

    def end(self) -> list[Piece]:
        return joined([Piece("final", self._decoder.end())])


class StopTexts:
    """The answer up to the first of these texts, which may come in several pieces."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self._held = ""
        self.met = False

    def read(self, pieces: Sequence[Piece]) -> list[Piece]:
        return joined([self._cut(piece) for piece in pieces])

    def end(self) -> list[Piece]:
        held, self._held = self._held, ""
        return joined([Piece("final", "" if self.met else held)])

    def _cut(self, piece: Piece) -> Piece:
        if piece.channel != "final":
            return piece
        text = self._held + piece.text
        found = [place for place in (text.find(stop) for stop in self.texts) if place >= 0]
        if self.met or found:
            told, self._held = "" if self.met else text[: min(found)], ""
            self.met = True
        else:
            told = min((without_begun(text, stop) for stop in self.texts), key=len, default=text)
            self._held = text[len(told) :]
        return Piece("final", told)
