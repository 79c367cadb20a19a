"""Harmony, the chat format of GPT-OSS: conversations to tokens and targets.

Token-exact with the official openai-harmony library but for the differences in `DIFFERENCES`.
Text is encoded piece by piece between special tokens, so nothing in it can become one.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from posttrain.chat import harmony_parse
from posttrain.chat.builtin_tools import BUILTIN_TOOLS
from posttrain.chat.conversation import (
    BuiltinTool,
    Channel,
    Conversation,
    Effort,
    Message,
    Namespace,
    Tool,
    is_builtin,
    turn_ends,
    turn_start,
)
from posttrain.chat.harmony_parse import MARKERS, NAME
from posttrain.chat.reading import Reader
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
    "strict-parse": "A completion must name a known channel, name whom it calls with `to=`, send calls to `commentary` "
    "(of built-in tools also to `analysis`), and end in the stop token of its last message: the library accepts "
    "unknown channels, none, any word as recipient, and a missing end.",
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
        self._headers: dict[tuple[object, ...], list[int]] = {}

    @property
    def stop_tokens(self) -> frozenset[int]:
        return frozenset((self._markers["return"], self._markers["call"]))

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.show(tokens)

    def parse(self, tokens: Sequence[int]) -> list[Message]:
        return harmony_parse.parse(tokens, self._names, self._tokenizer)

    def reader(self) -> Reader:
        return harmony_parse.HarmonyReader(self._names, self._tokenizer)

    def call_start(self, tool: str) -> list[int]:
        to = self._short(f" to={_name(f'functions.{tool}', 'tool_choice', 'name')}")
        channel = [self._markers["channel"], *self._short("commentary"), *self._short(" ")]
        return [*to, *channel, self._markers["constrain"], *self._short("json"), self._markers["message"]]

    def render(self, conversation: Conversation) -> Rendered:
        pieces = [self._message(place, message) for place, message in enumerate(conversation.messages)]
        return self._sample(conversation, pieces)

    def samples(self, conversation: Conversation) -> list[Rendered]:
        """One sample per user turn, which ends in it and has its analysis as target."""
        messages = conversation.messages
        pieces = [self._message(place, message) for place, message in enumerate(messages)]
        turns = [conversation.model_copy(update={"messages": messages[:end]}) for end in turn_ends(messages)]
        made = [self._sample(turn, pieces) for turn in turns]
        return [sample for sample in made if any(sample.targets)]

    def _sample(self, conversation: Conversation, pieces: Sequence[tuple[list[int], list[int]]]) -> Rendered:
        """The conversation with its last turn as target, out of its messages' tokens."""
        messages = conversation.messages
        last_turn = turn_start(messages)
        tokens = list(self._header(conversation))
        targets = [False] * len(tokens)
        for place, message in enumerate(messages):
            if place < last_turn and channel_of(message) == "analysis":
                continue
            head, body = pieces[place]
            in_turn = place >= last_turn and message.role == "assistant"
            ends_sample = place == len(messages) - 1
            if in_turn and _is_final(message) and not ends_sample:
                raise ChatFormatError(
                    f"message {place} is final but message {place + 1} ({messages[place + 1].role}) follows it "
                    "in the last turn: a final message ends the turn"
                )
            trained = in_turn and message.train
            tokens += head + body
            targets += [trained and place > 0 and _goes_on(messages[place - 1])] * len(head) + [trained] * len(body)
            if ends_sample and _is_final(message):
                tokens[-1] = self._markers["return"]
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
            head, body = self._message(place, message)
            tokens += head + body
        return tokens + self._start_assistant()

    def _start_assistant(self) -> list[int]:
        return [self._markers["start"], *self._short("assistant")]

    def _message(self, place: int, message: Message) -> tuple[list[int], list[int]]:
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
            channel = [mark["channel"], *self._short(_tool_channel(message, where))]
            return [mark["start"], *head], [*channel, mark["message"], *content, mark["end"]]
        if message.role != "assistant":
            raise ChatFormatError(f"{where}: its text belongs into the conversation's `instructions`")
        if message.channel is None:
            raise ChatFormatError(f"{where} has no channel: give it `analysis`, `commentary` or `final`")
        channel = [mark["channel"], *self._short(message.channel)]
        if message.recipient is None:
            return self._start_assistant(), [*channel, mark["message"], *content, mark["end"]]
        recipient = self._short(f" to={_name(message.recipient, where, 'recipient')}")
        body = [*recipient, *channel, *self._content_type(message, where), mark["message"], *content, mark["call"]]
        return self._start_assistant(), body

    def _content_type(self, message: Message, where: str) -> list[int]:
        builtin = is_builtin(message.recipient)
        if message.channel != "commentary" and not (builtin and message.channel == "analysis"):
            also = " or `analysis`" if builtin else ""
            raise ChatFormatError(
                f"{where} calls {message.recipient} on {message.channel}: calls go to `commentary`{also}"
            )
        if builtin:
            return list(self._short(" code"))
        return [*self._short(" "), self._markers["constrain"], *self._short("json")]

    def _header(self, conversation: Conversation) -> list[int]:
        """The system message and, if there are instructions or tools, the developer message."""
        effort = conversation.reasoning_effort or self._chat.reasoning_effort
        # Spelling the tools out takes much longer than dumping them.
        declared = [declaration.model_dump_json() for declaration in (*conversation.tools, *conversation.namespaces)]
        key = (effort, conversation.instructions, conversation.builtin_tools, *declared)
        if (cached := self._headers.get(key)) is not None:
            return cached
        mark = self._markers
        system = system_text(self._chat, bool(conversation.tools), effort, conversation.builtin_tools)
        tokens = [mark["start"], *self._short("system"), mark["message"], *self._tokenizer.encode(system), mark["end"]]
        if developer := developer_text(conversation.instructions, conversation.tools, conversation.namespaces):
            said = self._tokenizer.encode(developer)
            tokens += [mark["start"], *self._short("developer"), mark["message"], *said, mark["end"]]
        if len(self._headers) >= 1024:
            self._headers.clear()
        self._headers[key] = tokens
        return tokens


def channel_of(message: Message) -> Channel | None:
    """A message's channel; a built-in tool answers in the chain of thought unless it says otherwise."""
    if message.role == "tool" and message.channel is None:
        return "analysis" if is_builtin(message.sender) else "commentary"
    return message.channel


def system_text(
    chat: HarmonyFormat, offers_tools: bool, effort: Effort | None = None, builtin_tools: Sequence[BuiltinTool] = ()
) -> str:
    """`offers_tools` is whether there are tools of the namespace `functions`."""
    top = f"{chat.identity}\nKnowledge cutoff: {chat.knowledge_cutoff}\nCurrent date: {chat.date}"
    sections = [top, f"Reasoning: {effort or chat.reasoning_effort}"]
    if builtin_tools:
        sections += ["# Tools", *(_declared(BUILTIN_TOOLS[name]) for name in sorted(set(builtin_tools)))]
    sections.append(f"{CHANNELS_LINE}\n{CALLS_LINE}" if offers_tools else CHANNELS_LINE)
    return "\n\n".join(sections)


def developer_text(instructions: str | None, tools: Sequence[Tool], namespaces: Sequence[Namespace] = ()) -> str:
    """Empty if there is nothing to say; an empty text of instructions still has its heading, as in the library."""
    sections = [] if instructions is None else ["# Instructions", instructions]
    named = {space.name: space for space in namespaces}
    for name in named:
        if name == "functions" or is_builtin(name) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            taken = "functions, browser and python are taken"
            raise ChatFormatError(f"namespace {name!r}: give it letters, digits, `_` or `-`; {taken}")
    if len(named) != len(namespaces):
        raise ChatFormatError(f"two namespaces of {len(namespaces)} have the same name")
    if tools:
        named["functions"] = Namespace(name="functions", description=None, tools=tuple(tools))
    if named:
        sections += ["# Tools", *(_declared(named[name]) for name in sorted(named))]
    return "\n\n".join(sections)


def _declared(space: Namespace) -> str:
    for tool in space.tools:
        if not re.fullmatch(NAME, tool.name):
            raise ChatFormatError(f"tool name {tool.name!r}: only letters, digits, `_`, `-` and `.` can be called")
    return namespace(space.name, space.tools, space.description)


def _tool_channel(message: Message, where: str) -> Channel:
    channel = channel_of(message)
    if channel is None or channel == "final":
        raise ChatFormatError(f"{where} is on {channel}: tools answer on `commentary` or `analysis`")
    return channel


def _name(value: str | None, where: str, what: str) -> str:
    if value is None or not re.fullmatch(NAME, value):
        raise ChatFormatError(f"{where} needs a {what} such as `functions.search`, not {value!r}")
    return value


def _is_final(message: Message) -> bool:
    return message.role == "assistant" and message.channel == "final" and message.recipient is None


def _goes_on(message: Message) -> bool:
    """Whether the model wrote `message` without stopping, so that it also emits the next `<|start|>assistant`."""
    return message.role == "assistant" and message.recipient is None and message.channel != "final"
