"""Gemma's turns: `<start_of_turn>`, the role, its text, `<end_of_turn>`; instructions go in front of the user's text.

As in Gemma's own template, texts lose their outer blanks. There is no place for tools.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from posttrain.chat.conversation import Conversation, Message
from posttrain.chat.reading import Piece, Plain, Reader, joined
from posttrain.chat.render import Rendered
from posttrain.chat.tokenizer import Tokenizer
from posttrain.errors import ChatFormatError, CompletionError
from posttrain.recipe.types import GemmaFormat

BEGIN, START, END, EOS = "<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"


@dataclass(frozen=True)
class Turn:
    role: str
    text: str
    """As it was said; outer blanks are removed when it is rendered."""
    train: bool
    opening: str = ""
    """The conversation's instructions, in front of the first text."""


class Gemma:
    """The renderer; see `Renderer` for what its methods promise."""

    def __init__(self, chat: GemmaFormat, tokenizer: Tokenizer) -> None:
        self._numbered = chat.reasoning == "numbered"
        self._tokenizer = tokenizer
        self._begin, self._start, self._end = (tokenizer.special(name) for name in (BEGIN, START, END))
        self._forced = [self._start, *tokenizer.encode_prose("model\n")]
        self._newline = tokenizer.encode_prose("\n")
        self._specials = frozenset(tokenizer.flagged_specials.values()) | {self._begin, self._start, self._end}
        self._eos = tokenizer.flagged_specials.get(EOS)

    @property
    def stop_tokens(self) -> frozenset[int]:
        return frozenset((self._end,) if self._eos is None else (self._end, self._eos))

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.show(tokens)

    def render(self, conversation: Conversation) -> Rendered:
        made = turns(conversation, self._numbered)
        return self._sample(made, trained_from=len(made) - 1)

    def samples(self, conversation: Conversation) -> list[Rendered]:
        """One sample for all turns: nothing is forgotten between them."""
        sample = self._sample(turns(conversation, self._numbered), trained_from=0)
        return [sample] if any(sample.targets) else []

    def prompt(self, conversation: Conversation) -> list[int]:
        made = turns(conversation, self._numbered)
        if not made or made[-1].role != "user":
            raise ChatFormatError("a prompt ends in a user message, but this conversation does not")
        return [*self._sample(made, trained_from=len(made)).tokens, *self._forced]

    def continuation(self, messages: Sequence[Message]) -> list[int]:
        raise ChatFormatError("Gemma's turns have no tool results that a turn could go on after")

    def call_start(self, tool: str) -> list[int]:
        raise ChatFormatError(f"Gemma's turns have no place for a call of {tool}")

    def reader(self) -> Reader:
        """Reasoning in numbered steps is told at once, at the end: until then it may be an answer."""
        return GemmaReader(self, self._tokenizer) if self._numbered else Plain(self._tokenizer, self.stop_tokens)

    def _sample(self, made: Sequence[Turn], trained_from: int) -> Rendered:
        """All turns; those of the model from place `trained_from` on are targets, up to their end of turn."""
        tokens, targets = [self._begin], [False]
        for place, turn in enumerate(made):
            by_model = turn.role == "model"
            head = self._forced if by_model else [self._start]
            text = turn.text.strip() if by_model else f"user\n{turn.opening}{turn.text.strip()}"
            try:
                body = [*self._tokenizer.encode_prose(text), self._end]
            except ChatFormatError as error:
                raise ChatFormatError(f"turn {place} ({turn.role}): {error}") from None
            # A sample ends where the model stops; the line feed belongs to the next turn's prompt.
            after = [] if by_model and place == len(made) - 1 else self._newline
            tokens += [*head, *body, *after]
            trained = by_model and turn.train and place >= trained_from
            targets += [False] * len(head) + [trained] * len(body) + [False] * len(after)
        return Rendered(tokens, targets)

    def parse(self, tokens: Sequence[int]) -> list[Message]:
        numbers = [int(number) for number in tokens]
        if not numbers:
            raise CompletionError("empty", "the completion is empty")
        stop = next((place for place, number in enumerate(numbers) if number in self.stop_tokens), None)
        if stop is None:
            raise CompletionError("cut off", f"the completion is cut off before {END}")
        if stop < len(numbers) - 1:
            raise CompletionError("after the end", f"the completion goes on after {self.text([numbers[stop]])}")
        if numbers[stop] != self._end:
            raise CompletionError("wrong end", f"the completion ends in {EOS}, not {END}")
        foreign = next((number for number in numbers[:stop] if number in self._specials), None)
        if foreign is not None:
            raise CompletionError("special token", f"the completion has {self.text([foreign])} inside its text")
        try:
            text = self._tokenizer.decode(numbers[:stop])
        except ChatFormatError as error:
            raise CompletionError("special token", str(error)) from None
        steps, answer = read_numbered(text) if self._numbered else ([], text)
        return [*map(_analysis, steps), Message(role="assistant", channel="final", content=answer)]


class GemmaReader:
    """Holds everything back; see `Reader` for what its methods promise."""

    def __init__(self, gemma: Gemma, tokenizer: Tokenizer) -> None:
        self._gemma, self._tokenizer = gemma, tokenizer
        self._tokens: list[int] = []

    def read(self, tokens: Sequence[int]) -> list[Piece]:
        self._tokens += tokens
        return []

    def end(self) -> list[Piece]:
        try:
            messages = self._gemma.parse(self._tokens)
        except CompletionError:
            plain = Plain(self._tokenizer, self._gemma.stop_tokens)
            return joined([*plain.read(self._tokens), *plain.end()])
        steps = "\n".join(message.content for message in messages[:-1])
        return joined([Piece("analysis", steps), Piece("final", messages[-1].content)])


def _analysis(step: str) -> Message:
    return Message(role="assistant", channel="analysis", content=step)


def turns(conversation: Conversation, numbered: bool) -> list[Turn]:
    """User and model in turn, with their texts; ChatFormatError for what the format has no place for."""
    if conversation.tools or conversation.namespaces or conversation.builtin_tools:
        raise ChatFormatError(
            "Gemma's turns have no place for tools: leave them out, or use a chat template with tools"
        )
    made: list[Turn] = []
    for place, message in enumerate(conversation.messages):
        if message.role not in ("user", "assistant") or message.recipient is not None:
            what = f"calls {message.recipient}" if message.recipient else f"is of role {message.role}"
            raise ChatFormatError(f"message {place} {what}: Gemma's turns are of user and model only")
    for place, run in _runs(conversation.messages):
        if run[0].role == "assistant":
            made.append(_model_turn(place, run, numbered))
            continue
        if len(run) > 1:
            raise ChatFormatError(f"messages {place} and {place + 1} are both of the user: Gemma's turns alternate")
        opening = f"{conversation.instructions}\n\n" if place == 0 and conversation.instructions else ""
        made.append(Turn("user", run[0].content, train=False, opening=opening))
    if made and made[0].role != "user":
        raise ChatFormatError("message 0 is the assistant's: Gemma's first turn is the user's")
    return made


def _runs(messages: Sequence[Message]) -> Iterator[tuple[int, list[Message]]]:
    """Messages of one author in a row, with the first one's place."""
    run: list[Message] = []
    for place, message in enumerate(messages):
        run.append(message)
        if place == len(messages) - 1 or messages[place + 1].role != message.role:
            yield place + 1 - len(run), run
            run = []


def _model_turn(place: int, run: Sequence[Message], numbered: bool) -> Turn:
    *steps, answer = run
    where = f"message {place + len(run) - 1} (assistant)"
    if answer.channel != "final":
        raise ChatFormatError(f"{where} is on channel {answer.channel}: a turn of the model ends in a final message")
    if any(step.channel != "analysis" for step in steps):
        raise ChatFormatError(f"the turn that ends in {where} says more than analysis and one final message")
    if not numbered:
        return Turn("model", answer.content, answer.train)
    if any(step.train != answer.train for step in steps):
        raise ChatFormatError(f"the turn that ends in {where} is one text here: train on all of it or on none")
    reasons = _steps([step.content for step in steps])
    text = numbered_text(reasons, answer.content)
    if read_numbered(text) != (reasons, answer.content):
        raise ChatFormatError(f"the turn that ends in {where} has a step with a line that looks like the next step")
    return Turn("model", text, answer.train)


def _steps(analysis: list[str]) -> list[str]:
    """One step per analysis message; or those of a single one that is numbered already, as traces are read."""
    if len(analysis) == 1 and analysis[0].startswith("1. "):
        return read_numbered(f"Reasoning:\n{analysis[0]}\nAnswer:")[0]
    return analysis


def numbered_text(steps: Sequence[str], answer: str) -> str:
    """The model's turn as the trace store writes it."""
    lines = [f"{number}. {step}" for number, step in enumerate(steps, 1)]
    return "\n".join([*(["Reasoning:"] if steps else []), *lines, f"Answer: {answer}"])


def read_numbered(text: str) -> tuple[list[str], str]:
    """Steps and answer of such a turn; raises CompletionError."""
    steps: list[str] = []
    rest = text
    if text.startswith("Reasoning:\n"):
        rest = text.removeprefix("Reasoning:")
        while not rest.startswith("\nAnswer:"):
            mark = f"\n{len(steps) + 1}. "
            if not rest.startswith(mark):
                raise CompletionError("reasoning", f"step {len(steps) + 1} of the reasoning is missing")
            following = re.compile(rf"\n(?:{len(steps) + 2}\. |Answer:)").search(rest, len(mark))
            if following is None:
                raise CompletionError("reasoning", f"after step {len(steps) + 1} comes neither a step nor `Answer:`")
            steps.append(rest[len(mark) : following.start()])
            rest = rest[following.start() :]
        rest = rest[1:]
    if not rest.startswith("Answer:"):
        raise CompletionError("reasoning", "the completion begins with neither `Reasoning:` nor `Answer:`")
    return steps, rest.removeprefix("Answer:").removeprefix(" ")


def tunix_sft_text(conversation: Conversation) -> str:
    """The `prompts` text of the trace store's `tunix_sft` export: numbered turns, joined by line feeds."""
    made = turns(conversation, numbered=True)
    for turn in made:
        if any(mark in turn.opening + turn.text for mark in (START, END)):
            raise ChatFormatError(f"a {turn.role} text holds {START} or {END}, which this export cannot keep apart")
    return "\n".join(f"{START}{turn.role}\n{turn.opening}{turn.text}{END}" for turn in made)


def read_tunix_sft(text: str) -> Conversation:
    """The conversation of such a text. Raises ChatFormatError."""
    piece = rf"{START}(user|model)\n((?:(?!{START}|{END}).)*){END}"
    if not re.fullmatch(rf"{piece}(?:\n{piece})*", text, re.DOTALL):
        raise ChatFormatError(f"not turns of user and model between {START} and {END}, joined by line feeds")
    messages: list[Message] = []
    for role, said in re.findall(piece, text, re.DOTALL):
        if role == "user":
            messages.append(Message(role="user", content=said))
            continue
        steps, answer = read_numbered(said)
        messages += [*map(_analysis, steps), Message(role="assistant", channel="final", content=answer)]
    return Conversation(messages=tuple(messages))
