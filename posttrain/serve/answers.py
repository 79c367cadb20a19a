"""Answers of models while they are being written: what `/v1` and the dashboard's chat ask for.

    [answer] = generation.model("smoke").chat(conversation, Ask(max_new_tokens=200))
    for written in answer:                # or `async for`, in a coroutine
        for piece in written.pieces:      # .channel is analysis, commentary or final; .text follows the last piece's
            print(piece.text, end="")
    answer.messages()                     # all of them, calls of tools included; CompletionError where it is not whole

Leave an answer early with `answer.cancel()`. Any thread may ask.
"""

import asyncio
import secrets
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from posttrain.chat.conversation import Conversation, Message
from posttrain.chat.reading import Piece, Plain, Reader, StopTexts
from posttrain.chat.render import Renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.errors import InputError
from posttrain.recipe.types import Sampling
from posttrain.rollout.episodes import seed_of
from posttrain.rollout.live import Delivered, Live, Request, Token, Worker
from posttrain.rollout.sampler import Sampled
from posttrain.serve.asking import DEFAULT_NEW_TOKENS, Ask, Busy, TooLong

MOST_WAITING = 1024
"""Answers of a model that are being written or wait for it; more are refused."""


@dataclass(frozen=True)
class Written:
    """What was written since the last time."""

    pieces: list[Piece]
    tokens: list[Token]


class Answer:
    """One completion; iterate over it once."""

    def __init__(self, render: Renderer, ask: Ask, reader: Reader, begun: Sequence[int], request: Request) -> None:
        """`begun` is the beginning of the completion that the prompt ends in; `request` is what the model is given."""
        self.prompt = request.new
        self.tokens: list[int] = []
        self.ended: Literal["stop", "length", ""] = ""
        self._render, self._begun, self._request = render, list(begun), request
        self._reader, self._stop = reader, StopTexts(ask.stop)
        self._reader.read(self._begun)
        self._arrived: deque[Delivered] = deque()
        self._wake: Callable[[], None] | None = None
        request.deliver = self._deliver

    def _deliver(self, told: Delivered) -> None:
        """Called by the thread that owns the models."""
        self._arrived.append(told)
        wake, self._wake = self._wake, None
        if wake is not None:
            try:
                wake()
            except RuntimeError:
                # The loop of who asked is closed.
                self.cancel()

    def cancel(self) -> None:
        """Nobody wants the rest."""
        self._request.cancelled = True

    def messages(self) -> list[Message]:
        """All that was written, as messages; raises CompletionError where they are not whole."""
        return self._render.parse([*self._begun, *self.tokens])

    @property
    def whole(self) -> bool:
        """Whether a stop token ended it, so that it can be read as messages."""
        return self.ended == "stop" and not self._stop.met

    def __iter__(self) -> Iterator[Written]:
        try:
            while not self.ended:
                arrived = threading.Event()
                self._wake = arrived.set
                if not self._arrived:
                    arrived.wait()
                yield self._take()
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Written]:
        loop = asyncio.get_running_loop()
        try:
            while not self.ended:
                arrived = asyncio.Event()
                self._wake = partial(_set_soon, loop, arrived)
                if not self._arrived:
                    await arrived.wait()
                yield self._take()
        finally:
            self.cancel()

    def _take(self) -> Written:
        """What has arrived; raises what the sampler failed with."""
        pieces: list[Piece] = []
        tokens: list[Token] = []
        while self._arrived and not self.ended:
            told = self._arrived.popleft()
            if isinstance(told, Exception):
                raise told
            if isinstance(told, Sampled):
                tokens += self._untold(told)
                pieces += self._read(told.tokens[len(self.tokens) :])
                pieces += [] if self.ended else self._stop.read(self._reader.end())
                pieces += self._stop.end()
                self.ended = self.ended or ("stop" if told.ended == "stop" else "length")
            else:
                tokens.append(told)
                pieces += self._read([told.number])
        return Written(pieces, tokens)

    def _untold(self, sampled: Sampled) -> list[Token]:
        rest = len(self.tokens)
        return [Token(*pair) for pair in zip(sampled.tokens[rest:], sampled.logprobs[rest:], strict=True)]

    def _read(self, numbers: Sequence[int]) -> list[Piece]:
        """Pieces of the next tokens; those after a stop text are forgotten."""
        if not self._stop.texts:
            self.tokens += numbers
            return self._reader.read(numbers)
        pieces: list[Piece] = []
        for number in numbers:
            self.tokens.append(number)
            pieces += self._stop.read(self._reader.read([number]))
            if self._stop.met:
                self.ended = "stop"
                break
        return pieces


def _set_soon(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    loop.call_soon_threadsafe(event.set)


@dataclass
class Model:
    """A model that can be asked."""

    worker: Worker
    live: Live
    render: Renderer
    tokenizer: Tokenizer
    context: int
    """Tokens of prompt and answer together, at most."""
    vocabulary: int
    ends: frozenset[int]
    """Tokens that end a text, by the model's own generation settings."""

    def chat(self, conversation: Conversation, ask: Ask, count: int = 1) -> list[Answer]:
        """So many answers to a conversation; raises ChatFormatError, TooLong, Busy."""
        begun = [] if ask.call is None else self.render.call_start(ask.call)
        prompt = [*self.render.prompt(conversation), *begun]
        return self._ask([prompt], ask, count, self.render.reader, begun)

    def complete(
        self, prompts: Sequence[Sequence[int]], ask: Ask, count: int = 1, specials: bool = False
    ) -> list[Answer]:
        """So many continuations of each; `specials` spells out special tokens. Raises InputError, TooLong, Busy."""
        if not ask.ignore_eos:
            ask = replace(ask, stop_tokens=ask.stop_tokens | self.ends)
        hidden = self._stops(ask) | (frozenset() if specials else self.tokenizer.special_ids)
        return self._ask(prompts, ask, count, lambda: Plain(self.tokenizer, hidden), [])

    def tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's tokens: special ones are recognised in a text, and none is added. Raises InputError."""
        if isinstance(prompt, str):
            return self.tokenizer.encode_with_specials(prompt)
        for number in prompt:
            if not 0 <= number < self.vocabulary:
                raise InputError(f"token id {number} is not in the vocabulary of {self.vocabulary:,}")
        return list(prompt)

    def prompt_tokens(self, prompt: Sequence[int], likeliest: int) -> list[Token]:
        """The prompt's tokens after the first, with their log-probabilities at temperature 1."""
        self._require_room(prompt, None)
        return self.worker.call(lambda: self.live.prompt_tokens(prompt, likeliest)).result()

    def _ask(
        self,
        prompts: Sequence[Sequence[int]],
        ask: Ask,
        count: int,
        reader: Callable[[], Reader],
        begun: Sequence[int],
    ) -> list[Answer]:
        if self.live.count + len(prompts) * count > MOST_WAITING:
            raise Busy(f"{self.live.count:,} answers are being written, {MOST_WAITING:,} at most; try again later")
        seed = secrets.randbits(63) if ask.seed is None else ask.seed
        requests = [
            self._request(prompt, ask, seed if number == place == 0 else seed_of(seed, place, number))
            for place, prompt in enumerate(prompts)
            for number in range(count)
        ]
        answers = [Answer(self.render, ask, reader(), begun, request) for request in requests]
        self.worker.submit(self.live, requests)
        return answers

    def _request(self, prompt: Sequence[int], ask: Ask, seed: int) -> Request:
        room = self._require_room(prompt, ask.max_new_tokens)
        return Request(
            number=0,
            random=np.random.default_rng(seed),
            new=prompt,
            sampling=Sampling(
                temperature=ask.temperature,
                top_p=ask.top_p,
                top_k=ask.top_k,
                max_new_tokens=ask.max_new_tokens or min(room, DEFAULT_NEW_TOKENS),
                max_turns=1,
            ),
            stops=self._stops(ask),
            each_token=ask.each_token or bool(ask.stop) or ask.likeliest > 0,
            likeliest=ask.likeliest,
        )

    def _stops(self, ask: Ask) -> frozenset[int]:
        return ask.stop_tokens if ask.ignore_eos else ask.stop_tokens | self.render.stop_tokens

    def _require_room(self, prompt: Sequence[int], max_new_tokens: int | None) -> int:
        """Tokens that an answer may have."""
        if not prompt:
            raise InputError("the prompt is empty: there is nothing to continue")
        room = self.context - len(prompt)
        if room < (max_new_tokens or 1):
            wanted = "" if max_new_tokens is None else f" and {max_new_tokens:,} are asked for"
            raise TooLong(f"there is room for {self.context:,} tokens, but {len(prompt):,} are in the prompt{wanted}")
        return room
