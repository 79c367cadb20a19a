"""Tokenizer: a model folder's `tokenizer.json`, with text and special tokens kept strictly apart."""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from posttrain.chat.words import word_encoder
from posttrain.errors import ChatFormatError, ModelError
from posttrain.run.folder import digest_json


class Tokenizer:
    """Text to token ids and back.

    Two tokenizers are held: one without added tokens, so that `<|end|>` typed by a user stays text whatever flags the
    file gives its tokens, and the file's own.
    """

    def __init__(
        self, definition: str, templates: dict[str, str] | None = None, roles: dict[str, str] | None = None
    ) -> None:
        """Raises ValueError if `definition`, the text of a `tokenizer.json`, is none."""
        self.templates = templates or {}
        """The folder's chat templates by name; the one for every use is `default`."""
        self.roles = roles or {}
        """Special tokens by what they are for, such as `bos_token`."""
        self._definition = definition
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
        self.flagged_specials = {token.content: number for number, token in added.items() if token.special}
        """The added tokens that the file flags as special."""

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        path = Path(folder) / "tokenizer.json"
        try:
            return cls(path.read_text(encoding="utf-8"), _templates(path.parent), _roles(path.parent))
        except FileNotFoundError:
            raise ModelError(f"{path} does not exist: a model folder must hold its tokenizer") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} cannot be read as a tokenizer: {error}") from error

    @cached_property
    def digest(self) -> str:
        """Of everything that a rendering may depend on: vocabulary, chat templates, and which token is for what."""
        return digest_json([self._definition, self.templates, self.roles])

    @cached_property
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

    @cached_property
    def _text(self) -> tokenizers.Tokenizer:
        settings = json.loads(self._definition)
        unflagged = [token for token in settings["added_tokens"] if not token["special"]]
        return tokenizers.Tokenizer.from_str(json.dumps({**settings, "added_tokens": unflagged}))

    def encode_prose(self, text: str) -> list[int]:
        """As `encode`, but with the added tokens that are not flagged as special, as Gemma's runs of newlines."""
        return _encode(self._text, text)

    def encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens, and where each begins and ends in the pieces' joined text.

        A piece is text and whether special tokens are recognised in it; if not, it is encoded as `encode_prose` does.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        length = 0
        for text, with_specials in pieces:
            encoded = _encoding(self._whole if with_specials else self._text, text)
            ids += encoded.ids
            spans += [(length + start, length + end) for start, end in encoded.offsets]
            length += len(text)
        return ids, spans

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
    ids: list[int] = _encoding(tokenizer, text).ids
    return ids


def _encoding(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    _check_unicode(text)
    return tokenizer.encode(text, add_special_tokens=False)


def _templates(folder: Path) -> dict[str, str]:
    """The chat templates of a model folder: files of their own, or in the tokenizer's configuration."""
    configured = _configuration(folder).get("chat_template")
    found: dict[str, str] = {}
    if isinstance(configured, str):
        found["default"] = configured
    elif isinstance(configured, list):
        found |= {entry["name"]: entry["template"] for entry in configured}
    files = [*sorted((folder / "additional_chat_templates").glob("*.jinja")), folder / "chat_template.jinja"]
    for file in files:
        if file.is_file():
            found["default" if file.stem == "chat_template" else file.stem] = file.read_text(encoding="utf-8")
    return found


def _roles(folder: Path) -> dict[str, str]:
    """Special tokens as the tokenizer's configuration names them, each a text or an object with its content."""
    named = {key: value for key, value in _configuration(folder).items() if key.endswith("_token")}
    contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: content for key, content in contents.items() if isinstance(content, str)}


def _configuration(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        configuration = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(configuration, dict):
        raise ModelError(f"{path} is not a JSON object")
    return configuration
