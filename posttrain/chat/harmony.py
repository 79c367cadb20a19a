"""Harmony, the chat format of GPT-OSS: conversations to tokens and targets.

Token-exact with the official openai-harmony library but for the differences in `DIFFERENCES`.
Text is encoded piece by piece between special tokens, so nothing in it can become one.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from posttrain.chat import harmony_parse
from posttrain.chat.conversation import Conversation, Message, Tool
from posttrain.chat.harmony_parse import MARKERS, NAME
from posttrain.chat.render import Rendered
from posttrain.chat.tokenizer import Tokenizer
from posttrain.chat.typescript import namespace
from posttrain.errors import ChatFormatError
from posttrain.recipe.types import HarmonyFormat

DIFFERENCES = {
    "kept-analysis": "The last turn keeps its analysis though it ends in `final`: the library drops it, and training "
    "on its output would teach tool calls and answers without thinking.",
    "dropped-analysis": "Every earlier turn loses its analysis, whatever the last turn ends in: the library drops it "
    "only in front of the first `final` and only once the last assistant message is a `final`.",
    "strict-parse": "A completion must name a known channel, send calls to `commentary`, and end in the stop token of "
    "its last message: the library accepts unknown channels, none, and a missing end.",
}
"""Where the official library is left on purpose, and why. Closed: `tests/chat` checks each and nothing else differs."""

CHANNELS_LINE = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
CALLS_LINE = "Calls to these tools must go to the commentary channel: 'functions'."


class Harmony:
    """The renderer; see `Renderer` for what its methods promise."""

    def __init__(self, chat: HarmonyFormat, tokenizer: Tokenizer) -> None:
        self._chat = chat
        self._tokenizer = tokenizer
        self._markers = {name: tokenizer.special(f"<|{name}|>") for name in MARKERS}
        self._names = {number: name for name, number in self._markers.items()}
        self._short = lru_cache(maxsize=4096)(lambda text: tuple(tokenizer.encode(text)))
        self._headers: dict[tuple[str | None, ...], list[int]] = {}

    @property
    def stop_tokens(self) -> frozenset[int]:
        return frozenset((self._markers["return"], self._markers["call"]))

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.show(tokens)

    def parse(self, tokens: Sequence[int]) -> list[Message]:
        return harmony_parse.parse(tokens, self._names, self._tokenizer)

    def render(self, conversation: Conversation) -> Rendered:
        messages = conversation.messages
        last_turn = turn_start(messages)
        tokens = list(self._header(conversation))
        targets = [False] * len(tokens)
        for place, message in enumerate(messages):
            if place < last_turn and _is_analysis(message):
                continue
            head, body = self._message(place, message, ends_sample=place == len(messages) - 1)
            in_turn = place >= last_turn and message.role == "assistant"
            if in_turn and _is_final(message) and place < len(messages) - 1:
                raise ChatFormatError(
                    f"message {place} is final but message {place + 1} ({messages[place + 1].role}) follows it "
                    "in the last turn: a final message ends the turn"
                )
            trained = in_turn and message.train
            tokens += head + body
            targets += [trained and place > 0 and _goes_on(messages[place - 1])] * len(head) + [trained] * len(body)
        return Rendered(tokens, targets)

    def prompt(self, conversation: Conversation) -> list[int]:
        messages = conversation.messages
        if messages and messages[-1].role not in ("user", "tool"):
            raise ChatFormatError(
                f"a prompt ends in a user or tool message, but message {len(messages) - 1} is {messages[-1].role}"
            )
        return self.render(conversation).tokens + self._start_assistant()

    def continuation(self, messages: Sequence[Message]) -> list[int]:
        tokens: list[int] = []
        for place, message in enumerate(messages):
            if message.role != "tool":
                raise ChatFormatError(f"only tool results continue a turn, but message {place} is {message.role}")
            head, body = self._message(place, message, ends_sample=False)
            tokens += head + body
        return tokens + self._start_assistant()

    def _start_assistant(self) -> list[int]:
        return [self._markers["start"], *self._short("assistant")]

    def _message(self, place: int, message: Message, ends_sample: bool) -> tuple[list[int], list[int]]:
        """`<|start|>` with the author, which may be forced on the model, and all that follows it."""
        mark = self._markers
        where = f"message {place} ({message.role})"
        try:
            content = self._tokenizer.encode(message.content)
        except ChatFormatError as error:
            raise ChatFormatError(f"{where}: {error}") from None
        if message.role == "user":
            return [mark["start"], *self._short("user")], [mark["message"], *content, mark["end"]]
        if message.role == "tool":
            head = [*self._short(_name(message.sender, where, "sender")), *self._short(" to=assistant")]
            channel = [mark["channel"], *self._short("commentary")]
            return [mark["start"], *head], [*channel, mark["message"], *content, mark["end"]]
        if message.role != "assistant":
            raise ChatFormatError(f"{where}: its text belongs into the conversation's `instructions`")
        if message.channel is None:
            raise ChatFormatError(f"{where} has no channel: give it `analysis`, `commentary` or `final`")
        channel = [mark["channel"], *self._short(message.channel)]
        if message.recipient is None:
            end = "return" if ends_sample and message.channel == "final" else "end"
            return self._start_assistant(), [*channel, mark["message"], *content, mark[end]]
        if message.channel != "commentary":
            raise ChatFormatError(f"{where} calls {message.recipient} on {message.channel}: calls go to `commentary`")
        recipient = self._short(f" to={_name(message.recipient, where, 'recipient')}")
        json_type = [*self._short(" "), mark["constrain"], *self._short("json")]
        return self._start_assistant(), [*recipient, *channel, *json_type, mark["message"], *content, mark["call"]]

    def _header(self, conversation: Conversation) -> list[int]:
        """The system message and, if there are instructions or tools, the developer message."""
        # Spelling the tools out takes much longer than dumping them.
        key = (conversation.instructions, *(tool.model_dump_json() for tool in conversation.tools))
        if (cached := self._headers.get(key)) is not None:
            return cached
        mark = self._markers
        text = developer_text(conversation.instructions, conversation.tools)
        system = self._tokenizer.encode(system_text(self._chat, bool(conversation.tools)))
        tokens = [mark["start"], *self._short("system"), mark["message"], *system, mark["end"]]
        if text:
            developer = self._tokenizer.encode(text)
            tokens += [mark["start"], *self._short("developer"), mark["message"], *developer, mark["end"]]
        if len(self._headers) >= 1024:
            self._headers.clear()
        self._headers[key] = tokens
        return tokens


def turn_start(messages: Sequence[Message]) -> int:
    """The place after the last user message."""
    return max((place + 1 for place, message in enumerate(messages) if message.role == "user"), default=0)


def system_text(chat: HarmonyFormat, offers_tools: bool) -> str:
    top = f"{chat.identity}\nKnowledge cutoff: {chat.knowledge_cutoff}\nCurrent date: {chat.date}"
    channels = f"{CHANNELS_LINE}\n{CALLS_LINE}" if offers_tools else CHANNELS_LINE
    return f"{top}\n\nReasoning: {chat.reasoning_effort}\n\n{channels}"


def developer_text(instructions: str | None, tools: Sequence[Tool]) -> str:
    """Empty if there is nothing to say; an empty text of instructions still has its heading, as in the library."""
    sections = [] if instructions is None else ["# Instructions", instructions]
    for tool in tools:
        if not re.fullmatch(NAME, tool.name):
            raise ChatFormatError(f"tool name {tool.name!r}: only letters, digits, `_`, `-` and `.` can be called")
    if tools:
        sections += ["# Tools", namespace("functions", tools)]
    return "\n\n".join(sections)


def _name(value: str | None, where: str, what: str) -> str:
    if value is None or not re.fullmatch(NAME, value):
        raise ChatFormatError(f"{where} needs a {what} such as `functions.search`, not {value!r}")
    return value


def _is_analysis(message: Message) -> bool:
    return message.role == "assistant" and message.channel == "analysis" and message.recipient is None


def _is_final(message: Message) -> bool:
    return message.role == "assistant" and message.channel == "final" and message.recipient is None


def _goes_on(message: Message) -> bool:
    """Whether the model wrote `message` without stopping, so that it also emits the next `<|start|>assistant`."""
    return message.role == "assistant" and message.recipient is None and message.channel != "final"
