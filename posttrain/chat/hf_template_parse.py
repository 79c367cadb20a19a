"""Completions back to messages, in a syntax learned from the chat template itself by rendering probes."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.chat.conversation import Message, Tool
from posttrain.chat.harmony_parse import NAME
from posttrain.chat.jinja_program import JinjaProgram
from posttrain.chat.openai_messages import openai_tools
from posttrain.chat.reading import Decoder, Piece, joined, without_begun
from posttrain.chat.tokenizer import Tokenizer
from posttrain.errors import ChatFormatError, CompletionError, ModelError

Write = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None, bool], str]
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
ASKED, ANSWER, REASON = "probequestion", "probeanswer", "probereason"
NAME_PROBED, ARGUMENTS = "probe_tool", {"probe_key": "probevalue"}
ARGUMENTS_TEXT = json.dumps(ARGUMENTS)


@dataclass(frozen=True)
class Around:
    """What stands in front of a part of a completion, and behind it."""

    before: str
    after: str


@dataclass(frozen=True)
class Calls:
    """Calls as JSON objects with a name and arguments, `between` two of them."""

    around: Around
    between: str
    name_key: str
    arguments_key: str


@dataclass(frozen=True)
class Syntax:
    """How a template's model writes; None for what the template has no way to write, or none that can be read."""

    answer: Around
    reasoning: Around | None
    calls: Calls | None

    def marks(self) -> list[str]:
        """Everything that the template itself writes of a message."""
        around = [
            self.answer,
            *([self.reasoning] if self.reasoning else []),
            *([self.calls.around] if self.calls else []),
        ]
        return [text for one in around for text in (one.before, one.after)] + [self.calls.between if self.calls else ""]


def probe_tool(name: str) -> Tool:
    parameters = {"type": "object", "properties": {"probe_key": {"type": "string"}}}
    return Tool(name=name, description="A probe.", parameters=parameters)


def reasoning_key(program: JinjaProgram) -> str:
    """The field in which a template looks for analysis."""
    for key in REASONING_KEYS:
        if re.search(rf"[.'\"]{key}\b", program.source):
            return key
    raise ModelError(
        f"the chat template reads none of {', '.join(REASONING_KEYS)}: set the format's reasoning to dropped"
    )


def _asked(**answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "", **answer}]


def _call(number: int) -> dict[str, Any]:
    return {
        "type": "function",
        "id": f"call{number:05d}",
        "function": {"name": NAME_PROBED, "arguments": dict(ARGUMENTS)},
    }


def _answered(write: Write, messages: Sequence[Mapping[str, Any]], with_tools: bool = False) -> str:
    """What a template writes of the assistant's message, after its prompt. Raises ChatFormatError."""
    tools = openai_tools([probe_tool(NAME_PROBED)]) if with_tools else None
    prompt, whole = write(messages[:1], tools, True), write(messages, tools, False)
    if not whole.startswith(prompt):
        raise ChatFormatError("the chat template's prompt is not how it begins the assistant's message")
    return whole[len(prompt) :]


def stops(write: Write, specials: Mapping[str, int]) -> tuple[str, ...]:
    """The special tokens that end an answer and, where it differs, a call. Raises ModelError."""
    if not specials:
        raise ModelError("the tokenizer has no special tokens, so that a chat template cannot end a message")
    special = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))))
    try:
        _, _, tail = _answered(write, _asked(content=ANSWER)).partition(ANSWER)
    except ChatFormatError as error:
        raise ModelError(f"the chat template cannot be used for training: {error}") from None
    found = special.search(tail)
    if found is None or tail[: found.start()].strip():
        raise ModelError(
            f"the chat template ends the assistant's message with {tail!r}, not with a special token: nothing would "
            "teach the model to stop"
        )
    try:
        _, _, tail = _answered(write, _asked(tool_calls=[_call(0)]), with_tools=True).partition("probevalue")
    except ChatFormatError:
        return (found[0],)
    ends = special.findall(tail)
    return (found[0],) if not ends or found[0] in ends else (found[0], ends[-1])


def learn(write: Write, key: str | None, stop: re.Pattern[str]) -> Syntax:
    def said(answer: dict[str, Any], with_tools: bool = False) -> str:
        text = _answered(write, _asked(**answer), with_tools)
        found = stop.search(text)
        return text[: found.start()] if found else text

    before, _, after = said({"content": ANSWER}).partition(ANSWER)
    reasoning = None
    if key is not None:
        thought = said({"content": ANSWER, key: REASON})
        if REASON in thought:
            opening, _, rest = thought.partition(REASON)
            reasoning = Around(opening, rest.partition(ANSWER)[0])
    try:
        calls = _learn_calls(said({"tool_calls": [_call(0)]}, True), said({"tool_calls": [_call(0), _call(1)]}, True))
    except ChatFormatError:
        try:
            calls = _learn_calls(said({"tool_calls": [_call(0)]}, True), None)
        except ChatFormatError:
            calls = None
    return Syntax(Around(before, after), reasoning, calls)


def _learn_calls(one: str, two: str | None) -> Calls | None:
    """Reads a call, and two of them, that a template wrote."""
    found = _probe_object(one, 0)
    if found is None:
        return None
    begin, end, name_key, arguments_key = found
    between = ""
    if two is not None:
        first = _probe_object(two, 0)
        second = _probe_object(two, first[1]) if first else None
        if first is None or second is None:
            return None
        between = two[first[1] : second[0]]
    return Calls(Around(one[:begin], one[end:]), between, name_key, arguments_key)


def _probe_object(text: str, start: int) -> tuple[int, int, str, str] | None:
    """Where the first JSON object lies that holds the probe's name and arguments, and under which keys."""
    for found in re.compile(r"\{").finditer(text, start):
        try:
            value, end = json.JSONDecoder().raw_decode(text, found.start())
        except ValueError:
            continue
        name = next((key for key, inner in value.items() if inner == NAME_PROBED), None)
        arguments = next((key for key, inner in value.items() if _as_object(inner) == ARGUMENTS), None)
        if name is not None and arguments is not None:
            return found.start(), end, name, arguments
    return None


def _as_object(value: Any) -> Any:
    """Arguments as an object; some templates write them as JSON in a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


# ---------------------------------------------------------------- reading


def completion_text(tokens: Sequence[int], tokenizer: Tokenizer, stop_tokens: frozenset[int], syntax: Syntax) -> str:
    """The completion's text before its stop token, without special tokens but the syntax's. Raises CompletionError."""
    numbers = [int(number) for number in tokens]
    if not numbers:
        raise CompletionError("empty", "the completion is empty")
    stop = next((place for place, number in enumerate(numbers) if number in stop_tokens), None)
    if stop is None:
        raise CompletionError("cut off", "the completion is cut off before its stop token")
    if stop < len(numbers) - 1:
        raise CompletionError("after the end", f"the completion goes on after {tokenizer.show([numbers[stop]])}")
    own = "".join(syntax.marks())
    foreign = {number: name for name, number in tokenizer.flagged_specials.items() if name not in own}
    for number in numbers[:stop]:
        if number in foreign:
            raise CompletionError("special token", f"the completion has {foreign[number]} inside its text")
    try:
        return tokenizer.decode(numbers[:stop])
    except ChatFormatError as error:
        raise CompletionError("special token", str(error)) from None


def parse(text: str, syntax: Syntax) -> list[Message]:
    """Analysis, text and calls of one completion. Raises CompletionError."""
    messages: list[Message] = []
    thought, rest = _reasoning(text, syntax)
    if thought:
        messages.append(Message(role="assistant", channel="analysis", content=thought))
    calls: list[Message] = []
    if syntax.calls is not None:
        rest, calls = _calls(rest, syntax.calls)
    if calls:
        if rest.strip():
            messages.append(Message(role="assistant", channel="commentary", content=rest.strip()))
        return [*messages, *calls]
    return [*messages, Message(role="assistant", channel="final", content=rest)]


def _reasoning(text: str, syntax: Syntax) -> tuple[str, str]:
    """Reasoning, and what follows it."""
    before, after = syntax.answer.before, syntax.answer.after
    if before and text.startswith(before):
        return "", text.removeprefix(before).removesuffix(after)
    if syntax.reasoning is None:
        return "", text.removesuffix(after)
    opening, closing = syntax.reasoning.before.strip(), syntax.reasoning.after.strip()
    opened = not opening or text.lstrip().startswith(opening)
    if not closing or closing not in text:
        if opening and opened:
            raise CompletionError("reasoning", f"the reasoning is not closed by {closing}")
        return "", text.removesuffix(after)
    if not opened:
        raise CompletionError("reasoning", f"{closing} closes reasoning that {opening} did not open")
    thought, _, rest = text.lstrip().removeprefix(opening).partition(closing)
    # Blanks around the marks are the template's own, if they are there.
    return thought.strip("\n"), rest.lstrip("\n").removesuffix(after)


def _calls(text: str, calls: Calls) -> tuple[str, list[Message]]:
    """The text in front of the calls, and the calls; all of the text if there is none."""
    opener, closer, between = calls.around.before.strip(), calls.around.after.strip(), calls.between.strip()
    if opener:
        before, found, rest = text.partition(opener)
        if not found:
            return text, []
    else:
        before, rest = "", text
        if not _is_bare_call(text, calls):
            return text, []
    made: list[Message] = []
    while True:
        rest = rest.lstrip()
        call, end = _one_call(rest, calls)
        made.append(call)
        rest = rest[end:].lstrip()
        if rest.rstrip() == closer:
            return before, made
        if not between or not rest.startswith(between):
            raise CompletionError("call", f"after call {len(made)} comes {rest[:40]!r}, not {closer or between!r}")
        rest = rest[len(between) :]


def _is_bare_call(text: str, calls: Calls) -> bool:
    """Whether a completion is a call in a syntax without marks: an object that has the name's key."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text.strip())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and calls.name_key in value


def _one_call(text: str, calls: Calls) -> tuple[Message, int]:
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise CompletionError("call", f"a call is not JSON: {error}") from None
    if not isinstance(value, dict) or not {calls.name_key, calls.arguments_key} <= value.keys():
        needed = f"`{calls.name_key}` and `{calls.arguments_key}`"
        raise CompletionError("call", f"a call is no object with {needed}: {text[:end][:80]}")
    name, arguments = value[calls.name_key], _as_object(value[calls.arguments_key])
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise CompletionError("call", f"a call names {name!r}, which no tool can be called")
    if not isinstance(arguments, dict):
        raise CompletionError("call", f"a call of {name} has arguments that are no object")
    content = json.dumps(arguments, separators=(",", ":"), ensure_ascii=False)
    return Message(role="assistant", channel="commentary", recipient=f"functions.{name}", content=content), end


# ---------------------------------------------------------------- reading while it is written


class TemplateReader:
    """The completion while it is being written; see `Reader` for what its methods promise.

    Without a mark that opens reasoning, all is reasoning until it is closed.
    """

    def __init__(self, syntax: Syntax, tokenizer: Tokenizer, stop_tokens: frozenset[int]) -> None:
        self._syntax, self._stops = syntax, stop_tokens
        self._decoder = Decoder(tokenizer)
        self._text = ""
        self._told = {"analysis": 0, "final": 0}

    def read(self, tokens: Sequence[int]) -> list[Piece]:
        self._text += "".join(self._decoder.add(token) for token in tokens if token not in self._stops)
        return self._tell(done=False)

    def end(self) -> list[Piece]:
        self._text += self._decoder.end()
        return self._tell(done=True)

    def _tell(self, done: bool) -> list[Piece]:
        thought, answer = self._split(done)
        pieces = [Piece("analysis", thought[self._told["analysis"] :]), Piece("final", answer[self._told["final"] :])]
        self._told = {"analysis": len(thought), "final": len(answer)}
        return joined(pieces)

    def _split(self, done: bool) -> tuple[str, str]:
        """Reasoning and answer as far as they are sure, without the template's own marks."""
        before, text = self._syntax.answer.before, self._text
        if before:
            if text.startswith(before):
                return "", self._answer(text.removeprefix(before), done)
            if before.startswith(text) and not done:
                return "", ""
        if self._syntax.reasoning is None:
            return "", self._answer(text, done)
        opening, closing = self._syntax.reasoning.before.strip(), self._syntax.reasoning.after.strip()
        begun = text.lstrip()
        if not begun.startswith(opening):
            return ("", "") if opening.startswith(begun) and not done else ("", self._answer(text, done))
        if not closing:
            return "", self._answer(text, done)
        thought, closed, rest = begun.removeprefix(opening).partition(closing)
        thought = thought.lstrip("\n")
        if closed:
            return thought.rstrip("\n"), self._answer(rest.lstrip("\n"), done)
        return (thought if done else without_begun(thought, closing).rstrip("\n")), ""

    def _answer(self, text: str, done: bool) -> str:
        calls, after = self._syntax.calls, self._syntax.answer.after
        if calls is not None:
            opener = calls.around.before.strip()
            if opener and opener in text:
                return text.partition(opener)[0].rstrip()
            if not opener and text.lstrip().startswith("{"):
                return "" if not done or _is_bare_call(text, calls) else text
            # Blanks in front of a call are no part of the text.
            text = text if done else without_begun(text, opener).rstrip()
        return text.removesuffix(after) if done else without_begun(text, after)
