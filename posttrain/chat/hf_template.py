"""Any Hugging Face chat template: text by the template, targets by rendering prefixes.

What the model must write in answer to some messages is what stands, in the rendering of the whole, between the prompt
that the template makes of those messages and the next stop token. Where that is not well defined, rendering is refused
with the reason. Special tokens typed into a text stay text, which transformers does not do.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

from posttrain.chat import hf_template_parse as parsing
from posttrain.chat.conversation import Conversation, Message, turn_ends, turn_start
from posttrain.chat.jinja_program import JinjaProgram
from posttrain.chat.openai_messages import Spoken, openai_messages, openai_tools
from posttrain.chat.reading import Reader
from posttrain.chat.render import Rendered
from posttrain.chat.tokenizer import Tokenizer
from posttrain.errors import ChatFormatError, ModelError
from posttrain.recipe.types import TemplateFormat

GUARDS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Characters that no text may hold; one stands inside each special token that was typed into a text."""


@dataclass(frozen=True)
class Written:
    """A rendering as text, and from where to where each of the model's messages reaches, with its stop token."""

    text: str
    spans: list[tuple[int, int]]
    guard: str


class HfTemplate:
    """The renderer; see `Renderer` for what its methods promise."""

    def __init__(self, chat: TemplateFormat, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        templates = {"default": chat.template} if chat.template is not None else tokenizer.templates
        if "default" not in templates:
            found = f"; it has {', '.join(templates)}" if templates else ""
            raise ModelError(f"the model folder has no chat template{found}: give the format's `template` its text")
        variables = {**tokenizer.roles, **chat.variables}
        today = date.fromisoformat(chat.date)
        self._programs = {name: JinjaProgram(source, variables, today) for name, source in templates.items()}
        self._key = None if chat.reasoning == "dropped" else parsing.reasoning_key(self._programs["default"])
        specials = {content: tokenizer.special(content) for content in tokenizer.flagged_specials}
        self._stops = parsing.stops(self._write_plain, specials)
        spelled = sorted({*specials, *self._stops}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, spelled)))
        self._stop = re.compile("|".join(map(re.escape, self._stops)))

    @property
    def stop_tokens(self) -> frozenset[int]:
        return frozenset(self._tokenizer.special(stop) for stop in self._stops)

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.show(tokens)

    def render(self, conversation: Conversation) -> Rendered:
        return self._encode(self._written(conversation))

    def samples(self, conversation: Conversation) -> list[Rendered]:
        """One sample per user turn, but turns that the next one's rendering repeats letter for letter share one."""
        messages = conversation.messages
        kept: list[Written] = []
        for end in turn_ends(messages):
            written = self._written(conversation.model_copy(update={"messages": messages[:end]}))
            if kept and written.guard == kept[-1].guard and written.text.startswith(kept[-1].text):
                last = kept.pop()
                written = Written(written.text, [*last.spans, *written.spans], written.guard)
            kept.append(written)
        return [self._encode(written) for written in kept if written.spans]

    def prompt(self, conversation: Conversation) -> list[int]:
        messages = conversation.messages
        if messages and messages[-1].role not in ("user", "tool"):
            raise ChatFormatError(
                f"a prompt ends in a user or tool message, but message {len(messages) - 1} is {messages[-1].role}"
            )
        spoken, write, guard = self._prepared(conversation)
        return self._encode(Written(write(spoken, True), [], guard)).tokens

    def continuation(self, messages: Sequence[Message]) -> list[int]:
        """What the template writes between the stop token of some calls and its next prompt."""
        for place, message in enumerate(messages):
            if message.role != "tool":
                raise ChatFormatError(f"only tool results continue a turn, but message {place} is {message.role}")
        asked = Message(role="user", content=parsing.ASKED)
        made = [
            Message(role="assistant", channel="commentary", recipient=message.sender, content=parsing.ARGUMENTS_TEXT)
            for message in messages
        ]
        names = {str(message.sender).removeprefix("functions.") for message in messages}
        played = Conversation(
            messages=(asked, *made, *messages), tools=tuple(parsing.probe_tool(name) for name in sorted(names))
        )
        spoken, write, guard = self._prepared(played)
        before, whole = write(spoken[:1], True), write(spoken, True)
        stop = self._stop.search(whole, len(before)) if whole.startswith(before) else None
        if stop is None:
            raise ChatFormatError("the chat template's prompt after a tool result does not begin with the call")
        rest = whole[stop.end() :]
        if any(one.value.get("tool_call_id", "") in rest for one in spoken[2:]):
            raise ChatFormatError("the chat template writes the ids of calls, which a completion does not hold")
        return self._encode(Written(rest, [], guard)).tokens

    def parse(self, tokens: Sequence[int]) -> list[Message]:
        text = parsing.completion_text(tokens, self._tokenizer, self.stop_tokens, self._syntax)
        return parsing.parse(text, self._syntax)

    def reader(self) -> Reader:
        return parsing.TemplateReader(self._syntax, self._tokenizer, self.stop_tokens)

    def call_start(self, tool: str) -> list[int]:
        raise ChatFormatError(f"chat templates write calls as they like, so that none of {tool} can be begun for them")

    @cached_property
    def _syntax(self) -> parsing.Syntax:
        return parsing.learn(self._write_plain, self._key, self._stop)

    # ------------------------------------------------------------ text

    def _write_plain(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, prompting: bool
    ) -> str:
        return self._program(tools).write(messages, tools, prompting, {})

    def _program(self, tools: object) -> JinjaProgram:
        return self._programs.get("tool_use" if tools else "default", self._programs["default"])

    def _prepared(
        self, conversation: Conversation
    ) -> tuple[list[Spoken], Callable[[Sequence[Spoken], bool], str], str]:
        """The API's messages, the function that writes some of them, and the guard in their texts, if any."""
        if conversation.namespaces or conversation.builtin_tools:
            raise ChatFormatError("chat templates have no place for tools of other namespaces than `functions`")
        spoken = openai_messages(conversation, self._key)
        tools = openai_tools(conversation.tools)
        guard = self._guard([one.value for one in spoken], tools)
        if guard:
            spoken = [Spoken(self._guarded(one.value, guard), one.places) for one in spoken]
            tools = self._guarded(tools, guard)
        effort = conversation.reasoning_effort
        further = {} if effort is None else {"reasoning_effort": effort}
        program = self._program(tools)

        def write(some: Sequence[Spoken], prompting: bool) -> str:
            return program.write([one.value for one in some], tools, prompting, further)

        return spoken, write, guard

    def _guard(self, *values: Any) -> str:
        """A character that is in none of the texts; empty if none of them spells a special token."""
        texts = "\n".join(_texts(values))
        if not self._special.search(texts):
            return ""
        return next(guard for guard in GUARDS if guard not in texts)

    def _guarded(self, value: Any, guard: str) -> Any:
        if isinstance(value, str):
            return self._special.sub(lambda found: found[0][0] + guard + found[0][1:], value)
        if isinstance(value, dict):
            return {self._guarded(key, guard): self._guarded(inner, guard) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._guarded(inner, guard) for inner in value]
        return value

    def _written(self, conversation: Conversation) -> Written:
        """The conversation with the trained messages of its last turn, cut after the model's last stop token."""
        messages = conversation.messages
        spoken, write, guard = self._prepared(conversation)
        whole = write(spoken, False)
        last_turn = turn_start(messages)
        spans: list[tuple[int, int]] = []
        for number, one in enumerate(spoken):
            if one.value["role"] != "assistant" or one.places[0] < last_turn:
                continue
            begin, end = self._span(whole, write(spoken[:number], True), one)
            if _is_trained(messages, one):
                spans.append((begin, end))
            if number == len(spoken) - 1:
                whole = whole[:end]
        _require_all_texts(whole, spoken)
        _require_tools(whole, conversation)
        return Written(whole, spans, guard)

    def _span(self, whole: str, prompt: str, one: Spoken) -> tuple[int, int]:
        """Where an assistant's message begins and ends in the whole."""
        where = f"message {one.places[0]}"
        if not whole.startswith(prompt):
            raise ChatFormatError(
                f"{where}: what the chat template writes in front of it changes with what follows, so that it is not "
                "clear what the model must write"
            )
        stop = self._stop.search(whole, len(prompt))
        if stop is None:
            raise ChatFormatError(f"{where}: the chat template ends it in none of {', '.join(self._stops)}")
        said = whole[len(prompt) : stop.end()]
        for text in _own_texts(one.value, self._key):
            if not _holds(said, text):
                raise ChatFormatError(f"{where}: the chat template leaves out {_short(text)}, or writes it elsewhere")
        return len(prompt), stop.end()

    # ------------------------------------------------------------ tokens

    def _encode(self, written: Written) -> Rendered:
        text, guard = written.text, written.guard
        pieces = [(text, True)] if not guard else self._pieces(text, guard)
        ids, offsets = self._tokenizer.encode_pieces(pieces)
        clean = text.replace(guard, "") if guard else text
        targets = [False] * len(ids)
        for begin, end in written.spans:
            if guard:
                begin, end = (place - text.count(guard, 0, place) for place in (begin, end))
            for place in (begin, end):
                crossing = next((n for n, (start, stop) in enumerate(offsets) if start < place < stop), None)
                if crossing is not None:
                    raise ChatFormatError(
                        f"token {_short(clean[slice(*offsets[crossing])])} crosses from the prompt into the model's "
                        "message, so that no prompt has these tokens"
                    )
            inside = [begin <= start < end for start, _ in offsets]
            self._require_prompt(clean, ids, offsets, begin)
            targets = [target or new for target, new in zip(targets, inside, strict=True)]
        return Rendered(ids, targets)

    def _pieces(self, text: str, guard: str) -> list[tuple[str, bool]]:
        pieces: list[tuple[str, bool]] = []
        place = 0
        for found in self._special.finditer(text):
            pieces += [(text[place : found.start()].replace(guard, ""), False), (found[0], True)]
            place = found.end()
        return [*pieces, (text[place:].replace(guard, ""), False)]

    def _require_prompt(self, text: str, ids: list[int], offsets: list[tuple[int, int]], place: int) -> None:
        """The prompt in front of `place` must have, alone, the tokens that it has in the whole."""
        starts = [found.start() for found in self._special.finditer(text, 0, place)]
        since = starts[-1] if starts else 0
        alone = self._tokenizer.encode_with_specials(text[since:place])
        within = [number for number, (start, _) in zip(ids, offsets, strict=True) if since <= start < place]
        if alone != within:
            raise ChatFormatError(
                f"the prompt's end {_short(text[since:place])} has other tokens alone than in front of the answer, "
                "so that no prompt has these tokens"
            )


def _is_trained(messages: Sequence[Message], one: Spoken) -> bool:
    flags = {messages[place].train for place in one.places}
    if len(flags) > 1:
        raise ChatFormatError(
            f"messages {one.places[0]} to {one.places[-1]} are one message of the chat template: "
            "train on all of them or on none"
        )
    return flags == {True}


def _own_texts(value: Mapping[str, Any], key: str | None) -> list[str]:
    """What an assistant's message must hold."""
    reasoning = value.get(key, "") if key else ""
    names = [call["function"]["name"] for call in value.get("tool_calls", [])]
    return [text for text in (reasoning, value["content"], *names) if text]


def _require_all_texts(whole: str, spoken: Sequence[Spoken]) -> None:
    """Nothing but reasoning of earlier turns may be left out in silence."""
    for one in spoken:
        if not _holds(whole, one.value["content"]):
            name = f"message {one.places[0]}" if one.places else "the instructions"
            raise ChatFormatError(f"the chat template leaves out the text of {name}: {_short(one.value['content'])}")


def _require_tools(whole: str, conversation: Conversation) -> None:
    missing = [tool.name for tool in conversation.tools if not _holds(whole, tool.name)]
    if missing:
        raise ChatFormatError(f"the chat template has no place for tools: it leaves out {', '.join(missing)}")


def _holds(whole: str, text: str) -> bool:
    """Whether a text was written, as it is but for outer blanks, or as JSON."""
    return text.strip() in whole or json.dumps(text, ensure_ascii=False)[1:-1] in whole


def _texts(value: Any) -> list[str]:
    """Every text in a structure."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in (key, *_texts(inner))]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in _texts(inner)]
    return []


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
