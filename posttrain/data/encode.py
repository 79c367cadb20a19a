"""Rows to tokens and targets, a block of rows at a time: what the rendering processes do."""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from posttrain.chat.conversation import Conversation, Message
from posttrain.chat.render import Rendered, Renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.rows import SHAPES, ConversationRow, Fault, PairRow, Row, TaskRow, TextRow
from posttrain.errors import ChatFormatError
from posttrain.recipe.types import Dataset

END_OF_TEXT = "<|endoftext|>"
Sequences = list[tuple[Sequence[int], Sequence[bool]]]


@dataclass(frozen=True)
class Unread:
    """Rows of one source that stand together, as JSON lines, each with its place."""

    source: int
    rows: int
    """Malformed ones among them."""
    places: list[str]
    lines: list[bytes]
    passed_over: Counter[str]
    """What was read and is no row of the dataset, by reason."""
    faults: list[tuple[str, Fault]]
    """The malformed rows, which have no line."""


@dataclass
class Block:
    """What has been made of some rows; the bytes go into the files as they are."""

    rows: list[bytes] = field(default_factory=list)
    tokens: array = field(default_factory=lambda: array("i"))
    targets: bytearray = field(default_factory=bytearray)
    lengths: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    """64-bit digests of the kept rows' ids."""
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[str, Fault]] = field(default_factory=list)


class TooLong(Exception):
    pass


class WithoutTarget(Exception):
    pass


def id_digest(row_id: str) -> int:
    return int.from_bytes(blake2b(row_id.encode(), digest_size=8).digest(), "little")


class Encoder:
    """Renders the rows of one dataset."""

    def __init__(self, dataset: Dataset, render: Renderer, tokenizer: Tokenizer) -> None:
        self._shape = SHAPES[dataset.content]
        self._max_tokens = dataset.max_tokens
        self._cuts = dataset.too_long == "cut_at_turn"
        self._render = render
        self._tokenizer = tokenizer

    def __call__(self, unread: Unread) -> Block:
        block = Block(counts=Counter(unread.passed_over))
        for place, line in zip(unread.places, unread.lines, strict=True):
            row = self._shape.model_validate_json(line)
            try:
                self._encode(row, line, block)
            except TooLong:
                block.counts["dropped_too_long"] += 1
            except WithoutTarget:
                block.faults.append((place, Fault("row", "nothing in it is a target to train on")))
            except ChatFormatError as error:
                block.faults.append((place, Fault("row", f"id {row.id!r} cannot be rendered: {error}")))
        return block

    def _encode(self, row: Row, line: bytes, block: Block) -> None:
        sequences, cut = self._sequences(row)
        if any(len(tokens) > self._max_tokens for tokens, _ in sequences):
            raise TooLong
        if not isinstance(row, TaskRow):
            if not sequences or not all(any(targets) for _, targets in sequences):
                raise TooLong if cut else WithoutTarget
            for tokens, targets in sequences:
                block.tokens.extend(tokens)
                block.targets.extend(targets)
                block.lengths.append(len(tokens))
                block.counts["target_tokens"] += sum(targets)
        if isinstance(row, PairRow):
            block.prefixes.append(len(self._render.prompt(row.prompt)))
        block.counts["cut_at_turn"] += cut
        block.rows.append(line)
        block.ids.append(id_digest(row.id))

    def _sequences(self, row: Row) -> tuple[Sequences, bool]:
        """The token sequences that a row is trained on or, for a task, its prompt; and whether the row was cut."""
        match row:
            case TextRow():
                tokens = [*self._tokenizer.encode_with_specials(row.text), self._tokenizer.special(END_OF_TEXT)]
                # Nothing stands before the first token that could predict it.
                return [(tokens, [False] + [True] * (len(tokens) - 1))], False
            case ConversationRow():
                rendered, cut = self._samples(row.conversation)
                return [(one.tokens, one.targets) for one in rendered], cut
            case PairRow():
                return [self._completion(row.prompt, messages) for messages in (row.chosen, row.rejected)], False
            case TaskRow():
                tokens = self._render.prompt(row.prompt)
                return [(tokens, [False] * len(tokens))], False
        raise AssertionError(type(row))

    def _samples(self, conversation: Conversation) -> tuple[list[Rendered], bool]:
        """The conversation's samples, without its last turns where these do not fit and the recipe cuts."""
        cut = False
        while True:
            samples = self._render.samples(conversation)
            shorter = without_last_turn(conversation)
            fits = all(len(sample.tokens) <= self._max_tokens for sample in samples)
            if fits or not self._cuts or shorter is None:
                return samples, cut
            conversation, cut = shorter, True

    def _completion(self, prompt: Conversation, messages: tuple[Message, ...]) -> tuple[list[int], list[bool]]:
        """Prompt and completion, with targets in the completion only: turns before it are context."""
        start = self._render.prompt(prompt)
        whole = self._render.render(prompt.model_copy(update={"messages": (*prompt.messages, *messages)}))
        if whole.tokens[: len(start)] != start:
            raise ChatFormatError("the completion does not continue its prompt")
        targets = [False] * len(start) + whole.targets[len(start) :]
        return whole.tokens, targets


def without_last_turn(conversation: Conversation) -> Conversation | None:
    """The conversation up to its last user message; None where no turn would be left."""
    starts = [place for place, message in enumerate(conversation.messages) if message.role == "user"]
    if len(starts) < 2:
        return None
    return conversation.model_copy(update={"messages": conversation.messages[: starts[-1]]})
