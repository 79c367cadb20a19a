"""Renderers: a conversation becomes tokens and loss targets together, and sampled tokens become messages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from posttrain.chat.conversation import Conversation, Message
from posttrain.chat.reading import Reader
from posttrain.chat.tokenizer import Tokenizer
from posttrain.recipe.types import ChatFormat, GemmaFormat, HarmonyFormat, TemplateFormat


@dataclass(frozen=True)
class Rendered:
    tokens: list[int]
    targets: list[bool]
    """True where the token is one the model emits and is trained on; not shifted."""


class Renderer(Protocol):
    """One chat format over one tokenizer.

    For a conversation c whose last turn the model wrote piece by piece,
    prompt + sampled tokens + continuation of the results + sampled tokens + … are the tokens of `render`.
    """

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a generation."""
        ...

    def render(self, conversation: Conversation) -> Rendered:
        """The whole conversation; only what the model emits in its last turn is a target."""
        ...

    def samples(self, conversation: Conversation) -> list[Rendered]:
        """What to train on: everything the model emits in messages with `train` is a target of exactly one sample.

        A format that forgets earlier reasoning has one sample per user turn. Empty if there is no target.
        """
        ...

    def prompt(self, conversation: Conversation) -> list[int]:
        """Tokens after which the model writes its next message."""
        ...

    def continuation(self, messages: Sequence[Message]) -> list[int]:
        """Tokens that follow a generation which stopped on a call: the tools' results and the next prompt."""
        ...

    def parse(self, tokens: Sequence[int]) -> list[Message]:
        """The messages of one generation, its stop token included. Raises CompletionError with the reason."""
        ...

    def reader(self) -> Reader:
        """Reads one generation while it is being written."""
        ...

    def call_start(self, tool: str) -> list[int]:
        """What follows `prompt` where the model must call this function; its arguments come next.

        Raises ChatFormatError for a format whose calls have no fixed beginning.
        """
        ...

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as text with special tokens spelled out."""
        ...


def renderer(chat: ChatFormat, tokenizer: Tokenizer) -> Renderer:
    # Imported here because formats build on the types above.
    from posttrain.chat.gemma import Gemma
    from posttrain.chat.harmony import Harmony
    from posttrain.chat.hf_template import HfTemplate

    match chat:
        case HarmonyFormat():
            return Harmony(chat, tokenizer)
        case GemmaFormat():
            return Gemma(chat, tokenizer)
        case TemplateFormat():
            return HfTemplate(chat, tokenizer)
