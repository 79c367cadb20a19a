"""Sampling for whoever asks while others are being answered: requests join a model's batch and leave it at any step.

One thread owns the models. It steps the batch of each model in turn; what is asked of it comes in between two steps.

Axes: B slot, T position of a prompt, V vocabulary.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from posttrain.engine.decode import DecodeProgram, decode_program
from posttrain.engine.forward import device_of, next_logits, precision_context
from posttrain.engine.slots import Prefill, empty_cache
from posttrain.errors import Stopped
from posttrain.recipe.types import Precision
from posttrain.rollout.in_process import Batch, Turn
from posttrain.rollout.sampler import Sampled

MOST_SLOTS = 32
FEW_SLOTS = 4
"""A decode program lays out its weights for about so many slots, and another one for more."""
POSITIONS_STEP = 128
"""Lengths of caches are multiples of it, so that few arrivals make a longer one necessary."""
PROMPT_CHUNK = 256
"""Positions of a prompt whose logits exist at once."""
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Token:
    number: int
    logprob: float
    """At the sampling temperature; at 1 where that is 0."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """Of the same distribution, as many as were asked for."""


Delivered = Token | Sampled | Exception
"""A token that was sampled; the end, with all of them; or why there is no end."""


@dataclass(eq=False)
class Request(Turn):
    """A prompt that waits for a slot or has one."""

    deliver: Callable[[Delivered], None] = lambda delivered: None
    """Called by the thread that owns the models; must not wait."""
    each_token: bool = True
    """Whether tokens are delivered as they are sampled."""
    likeliest: int = 0
    """Of each token's distribution, so many are delivered with it."""
    cancelled: bool = False
    """Set by anyone; the slot is free before the next step."""

    @property
    def positions(self) -> int:
        """What it may need of a cache."""
        return self.length + self.sampling.max_new_tokens


class Live(Batch):
    """A model's batch, which grows with what arrives and shrinks with what is done.

    A sequence's tokens are those it has alone, up to the last bits of its logits: they depend on what else is in the
    batch, so that two tokens of all but equal probability may change places.
    """

    def __init__(self, model: PreTrainedModel, precision: Precision, position_budget: int) -> None:
        self.precision, self.position_budget = precision, position_budget
        self.arrived: deque[Request] = deque()
        self._inside: set[Request] = set()
        """Those that wait for a slot in the next step, or have one."""
        self._programs: dict[bool, DecodeProgram | None] = {}
        with precision_context(precision, device_of(model)):
            cache = empty_cache(model, 0, 1)
        super().__init__(model, None, cache, deque(), refill_share=MOST_SLOTS)

    @property
    def count(self) -> int:
        """Requests that are not done."""
        return len(self.arrived) + len(self._inside)

    @property
    def busy(self) -> bool:
        return self.count > 0

    @torch.inference_mode()
    def advance(self) -> None:
        """One token for everyone in the batch, after those that arrived have been let in."""
        with precision_context(self.precision, device_of(self.model)):
            self._drop_cancelled()
            self._let_in()
            self.step()

    def fail(self, error: Exception) -> None:
        """Tell everyone, and begin anew."""
        for turn in (*self.arrived, *self._inside):
            turn.deliver(error)
        self.arrived.clear()
        self._inside.clear()
        self.waiting.clear()
        self.slots, self.logits_BV, self.prompt = [], torch.empty(0), None

    def _drop_cancelled(self) -> None:
        self.arrived = deque(turn for turn in self.arrived if not turn.cancelled)
        self._inside = {turn for turn in self._inside if not turn.cancelled}
        self.slots = [turn if turn in self._inside else None for turn in self.slots]

    def _let_in(self) -> None:
        """Of those that arrived, in their order, as many as slots and positions allow."""
        if not self._inside:
            self.slots = []
        positions = _rounded(max((turn.positions for turn in self._inside), default=0))
        while self.arrived and len(self._inside) < MOST_SLOTS:
            longest = max(positions, _rounded(self.arrived[0].positions))
            if self._inside and (len(self._inside) + 1) * longest > self.position_budget:
                break
            positions = longest
            turn = self.arrived.popleft()
            self._inside.add(turn)
            self.waiting.append(turn)
        if not self.waiting:
            return
        count = len(self._inside)
        longest_now = max(turn.length + len(turn.tokens) for turn in self._inside)
        misfit = not positions <= self.cache.positions < 2 * positions
        # A cache that began with shorter sequences than one that comes would have to be read to its end.
        if count > len(self.slots) or misfit or longest_now > self.cache.clock:
            most = min(MOST_SLOTS, max(1, self.position_budget // positions))
            self._resize(min(most, 1 << (count - 1).bit_length()), positions, longest_now)
        self.cache.furthest = longest_now

    def _resize(self, slots: int, positions: int, clock: int) -> None:
        """Put the sequences at work into a cache of this size."""
        program, turns = self._program(slots), [turn for turn in self.slots if turn]
        pasts = [self.cache.take(slot, turn.length + len(turn.tokens)) for slot, turn in enumerate(self.slots) if turn]
        kept = torch.tensor([slot for slot, turn in enumerate(self.slots) if turn], device=self.logits_BV.device)
        self.cache = empty_cache(self.model, slots, positions, program.order if program else None, clock)
        self.cache.place(dict(enumerate(pasts)))
        if turns:
            logits_BV = self.logits_BV.new_zeros(slots, self.logits_BV.shape[1])
            logits_BV[: len(turns)] = self.logits_BV[kept]
            self.logits_BV = logits_BV
        else:
            self.logits_BV = torch.empty(0)
        self.slots = [*turns, *[None] * (slots - len(turns))]
        self.program = program

    def _program(self, slots: int) -> DecodeProgram | None:
        if self.precision != "float32":
            return None
        few = slots <= FEW_SLOTS
        if few not in self._programs:
            self._programs[few] = decode_program(self.model, FEW_SLOTS if few else MOST_SLOTS)
        return self._programs[few]

    def _note(self, slot: int, token: int, logprob: float) -> None:
        turn = self.slots[slot]
        if isinstance(turn, Request) and turn.each_token:
            temperature = turn.sampling.temperature or 1.0
            turn.deliver(Token(token, logprob, likeliest(self.logits_BV[slot] / temperature, turn.likeliest)))
        super()._note(slot, token, logprob)
        if isinstance(turn, Request) and self.slots[slot] is None:
            self._inside.discard(turn)
            turn.deliver(Sampled(turn.tokens, turn.logprobs, "stop" if token in turn.stops else "length"))

    @torch.inference_mode()
    def prompt_tokens(self, prompt: Sequence[int], count: int) -> list[Token]:
        """The prompt's tokens after the first, as what comes before foretells them at temperature 1."""
        device = device_of(self.model)
        with precision_context(self.precision, device):
            ids_T = torch.tensor(prompt, device=device)
            hidden_1TH = self.model.get_decoder()(
                input_ids=ids_T[None],
                position_ids=torch.arange(len(prompt), device=device)[None],
                use_cache=False,
                prefill=Prefill([(0, len(prompt))], [None]),
            ).last_hidden_state
            tokens = []
            for start in range(0, len(prompt) - 1, PROMPT_CHUNK):
                stop = min(start + PROMPT_CHUNK, len(prompt) - 1)
                logprob_TV = torch.log_softmax(next_logits(self.model, hidden_1TH[0, start:stop]), -1)
                logprob_T = logprob_TV.gather(1, ids_T[start + 1 : stop + 1, None])[:, 0].tolist()
                for place, logprob in enumerate(logprob_T):
                    tokens.append(Token(prompt[start + place + 1], logprob, likeliest(logprob_TV[place], count)))
        return tokens


def _rounded(positions: int) -> int:
    return -(-positions // POSITIONS_STEP) * POSITIONS_STEP


def likeliest(logits_V: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """So many tokens with the highest log-probabilities, highest first."""
    if count == 0:
        return ()
    logprob_k, token_k = torch.log_softmax(logits_V, -1).topk(min(count, len(logits_V)))
    return tuple(zip(token_k.tolist(), logprob_k.tolist(), strict=True))


class Worker:
    """The thread that owns the models."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._busy: list[Live] = []
        self._thread = threading.Thread(target=self._work, name="sampler", daemon=True)
        self._thread.start()

    def call(self, job: Callable[[], Result]) -> "Future[Result]":
        """Let the thread do this between two steps."""
        future: Future[Result] = Future()

        def do() -> None:
            try:
                future.set_result(job())
            except Exception as error:  # whatever it is, it is raised where the result is asked for
                future.set_exception(error)

        self._jobs.put(do)
        return future

    def submit(self, live: Live, requests: Sequence[Request]) -> None:
        """Sample these; all are in the queue before the next step, so that equal prompts are prefilled once."""

        def arrive() -> None:
            live.arrived.extend(requests)
            if live not in self._busy:
                self._busy.append(live)

        self._jobs.put(arrive)

    def close(self) -> None:
        """End the thread after what it does now; who waits is told."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while self._take_jobs():
            for live in list(self._busy):
                try:
                    live.advance()
                except Exception as error:  # such as no memory left: those who asked are told, the server lives on
                    live.fail(error)
                if not live.busy:
                    self._busy.remove(live)
        for live in self._busy:
            live.fail(Stopped("the server was stopped"))

    def _take_jobs(self) -> bool:
        """Do all there is to do, waiting for something if no batch is at work; False when it is time to end."""
        wait = not self._busy
        while True:
            try:
                job = self._jobs.get(block=wait)
            except Empty:
                return True
            if job is None:
                return False
            job()
            wait = wait and not self._busy
