"""Tokenizer: a model folder's `tokenizer.json`, with text and special tokens kept strictly apart."""

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from posttrain.chat.words import word_encoder
from posttrain.errors import ChatFormatError, ModelError


class Tokenizer:
    """Text to token ids and back.

    Two tokenizers are held: one without added tokens, so that `<|end|>` typed by a user stays text whatever flags the
    file gives its tokens, and the file's own.
    """

    def __init__(self, definition: str) -> None:
        """Raises ValueError if `definition`, the text of a `tokenizer.json`, is none."""
        settings = json.loads(definition)
        if not isinstance(settings, dict):
            raise ValueError("not a JSON object")
        try:
            self._whole = tokenizers.Tokenizer.from_str(definition)
            self._plain = tokenizers.Tokenizer.from_str(json.dumps({**settings, "added_tokens": []}))
        except Exception as error:
            # The library raises bare Exception for every fault of the file.
            raise ValueError(str(error)) from error
        self._words = word_encoder(settings, self._plain)
        added = self._whole.get_added_tokens_decoder()
        self._specials = {token.content: number for number, token in added.items()}
        self.special_ids: frozenset[int] = frozenset(added)
        """Every added token, whether or not the file flags it as special."""

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        path = Path(folder) / "tokenizer.json"
        try:
            return cls(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(f"{path} does not exist: a model folder must hold its tokenizer") from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read as a tokenizer: {error}") from error

    @property
    def vocab_size(self) -> int:
        """One more than the highest id; ids between may be unused."""
        return max(self._whole.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """`text` as ordinary tokens: special tokens spelled out in it are not recognised."""
        if self._words is not None:
            _check_unicode(text)
            return self._words.encode(text)
        return _encode(self._plain, text)

    def encode_with_specials(self, text: str) -> list[int]:
        return _encode(self._whole, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are spelled out and bytes that are no UTF-8 become U+FFFD; refuses ids outside the vocabulary.

        Raises ChatFormatError.
        """
        numbers = [int(number) for number in ids]
        for number in numbers:
            if not self._knows(number):
                raise ChatFormatError(f"token id {number} is not in the vocabulary")
        text: str = self._whole.decode(numbers, skip_special_tokens=False)
        return text

    def show(self, ids: Sequence[int]) -> str:
        """As `decode`, for display: an id outside the vocabulary is spelled `<|id 77|>`."""
        pieces: list[str] = []
        run: list[int] = []
        for number in map(int, ids):
            if self._knows(number):
                run.append(number)
            else:
                pieces += [self.decode(run), f"<|id {number}|>"]
                run = []
        return "".join([*pieces, self.decode(run)])

    def _knows(self, number: int) -> bool:
        # The library takes ids of 32 bits.
        return 0 <= number < 2**32 and self._whole.id_to_token(number) is not None

    def special(self, name: str) -> int:
        """The id of the added token `name`, such as `<|start|>`."""
        if name not in self._specials:
            raise ModelError(f"the tokenizer has no special token {name}; it has {', '.join(self._specials) or 'none'}")
        return self._specials[name]


def _check_unicode(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ChatFormatError(f"text is not Unicode at character {error.start}: {error.reason}") from None


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    _check_unicode(text)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
