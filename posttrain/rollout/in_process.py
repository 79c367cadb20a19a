"""The in-process sampler: packed prefill, then one token per slot and step; a slot that is done takes the next prompt.

A row's logits depend in the last bits on what else is in its batch. What is in it is a function of the prompts, the
seeds and the budget alone, so that the same call gives the same bits.

Axes: B slot, V vocabulary, R position of a turn.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from posttrain.engine.decode import DecodeProgram, decode_program
from posttrain.engine.forward import device_of, next_logits, precision_context
from posttrain.engine.packing import plan_micro_batches
from posttrain.engine.slots import Past, Prefill, SlotCache, empty_cache
from posttrain.recipe.types import Precision, Sampling
from posttrain.rollout.sampler import Reply, Sampled, Sampler

PREFILL_TOKENS = 8192
"""Prompts go through the model in rows of so many tokens, at most: longer ones fall out of the processor's caches."""
REFILL_SHARE = 8
"""Slots are refilled when one in so many is free: a prefill for one alone costs as much as for several."""


@dataclass(eq=False)
class Turn:
    """An episode while it waits for a slot or has one."""

    number: int
    random: np.random.Generator
    new: Sequence[int]
    """Tokens that are not in the cache yet."""
    sampling: Sampling
    stops: frozenset[int]
    past: Past | None = None
    uniform_R: np.ndarray = field(default_factory=lambda: np.empty(0))
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.new) + (self.past.length if self.past else 0)


@dataclass(frozen=True)
class InProcessSampler(Sampler):
    model: PreTrainedModel
    stop_tokens: frozenset[int]
    precision: Precision
    position_budget: int
    """Key-value positions that are held at once, at most, but for tools' replies; a longer sequence goes alone."""

    @torch.inference_mode()
    def play(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, reply: Reply) -> None:
        if not prompts:
            return
        with precision_context(self.precision, device_of(self.model)):
            longest = max(map(len, prompts))
            positions = longest + sampling.max_new_tokens
            slots = min(len(prompts), max(1, self.position_budget // positions))
            program = decode_program(self.model, slots) if self.precision == "float32" else None
            order = program.order if program else None
            cache = empty_cache(self.model, slots, positions, order, clock=longest)
            turns = deque(
                Turn(number, np.random.default_rng(seed), prompt, sampling, self.stop_tokens)
                for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
            )
            batch = Batch(self.model, program, cache, turns, reply)
            while batch.step():
                pass


@dataclass
class Batch:
    """The slots at work and what waits for one."""

    model: PreTrainedModel
    program: DecodeProgram | None
    cache: SlotCache
    waiting: deque[Turn]
    reply: Reply = lambda number, sampled: None
    refill_share: int = REFILL_SHARE
    prompt: tuple[tuple[int, ...], Past, torch.Tensor] | None = None
    """The last prompt, where some of its group still wait: tokens, cached, first logits."""

    def __post_init__(self) -> None:
        self.slots: list[Turn | None] = [None] * self.cache.slots
        self.logits_BV = torch.empty(0)
        """Of every slot's next token."""

    def step(self) -> bool:
        """A token for every slot, those that wait in free ones; False when nothing is left to do."""
        self._refill()
        if not any(self.slots):
            return False
        token_B, logprob_B = self._choose()
        for slot, (token, logprob) in enumerate(zip(token_B.tolist(), logprob_B.tolist(), strict=True)):
            self._note(slot, token, logprob)
        active = [slot for slot, turn in enumerate(self.slots) if turn]
        if not active:
            return True
        # Without more to fill them with, finished slots ride along until half are done: dropping copies the cache.
        if not self.waiting and len(active) <= len(self.slots) // 2:
            self.cache.keep(active)
            token_B = token_B[torch.tensor(active, device=token_B.device)]
            self.slots = [self.slots[slot] for slot in active]
        self.logits_BV = self._decode(token_B)
        return True

    def _choose(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B] and their log-probabilities [B]; slots that sample alike are asked together."""
        alike: dict[tuple[float, float, int | None], list[int]] = {}
        for slot, turn in enumerate(self.slots):
            if turn is not None:
                sampling = turn.sampling
                alike.setdefault((sampling.temperature, sampling.top_p, sampling.top_k), []).append(slot)
        if len(alike) == 1:
            [(first, *_)] = alike.values()
            return self._choose_alike(self.logits_BV, self.slots, first)
        token_B = torch.zeros(len(self.slots), dtype=torch.long, device=self.logits_BV.device)
        logprob_B = self.logits_BV.new_zeros(len(self.slots))
        for slots in alike.values():
            place = torch.tensor(slots, device=token_B.device)
            turns = [self.slots[slot] for slot in slots]
            token_B[place], logprob_B[place] = self._choose_alike(self.logits_BV[place], turns, 0)
        return token_B, logprob_B

    def _choose_alike(
        self, logits_BV: torch.Tensor, turns: Sequence[Turn | None], one: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        turn = turns[one]
        assert turn is not None
        uniforms = [turn.uniform_R[len(turn.tokens)] if turn else 0.5 for turn in turns]
        return choose(logits_BV, np.array(uniforms), turn.sampling)

    def _note(self, slot: int, token: int, logprob: float) -> None:
        """Take a slot's token; when it ends a turn, ask for the reply and free the slot."""
        turn = self.slots[slot]
        if turn is None:
            return
        turn.tokens.append(token)
        turn.logprobs.append(logprob)
        stopped = token in turn.stops
        if not stopped and len(turn.tokens) < turn.sampling.max_new_tokens:
            return
        self.slots[slot] = None
        more = self.reply(turn.number, Sampled(turn.tokens, turn.logprobs, "stop" if stopped else "length"))
        if more is not None:
            # The last token has been sampled but is in no cache yet.
            past = self.cache.take(slot, turn.length + len(turn.tokens) - 1)
            self.waiting.appendleft(Turn(turn.number, turn.random, [token, *more], turn.sampling, turn.stops, past))

    def _refill(self) -> None:
        """Give free slots to those that wait."""
        free = [slot for slot, turn in enumerate(self.slots) if turn is None]
        if not self.waiting or (len(free) < len(self.slots) and len(free) * self.refill_share < len(self.slots)):
            return
        turns = [self.waiting.popleft() for _ in free[: len(self.waiting)]]
        needed = max(turn.length + turn.sampling.max_new_tokens for turn in turns)
        if needed > self.cache.positions:
            self.cache.grow(needed)
        placed = self._prefill(turns)
        if not len(self.logits_BV):
            self.logits_BV = placed[0][1].new_zeros(len(self.slots), len(placed[0][1]))
        for slot, turn, (_, logits_V) in zip(free, turns, placed, strict=False):
            turn.uniform_R = turn.random.random(turn.sampling.max_new_tokens)
            self.slots[slot] = turn
            self.logits_BV[slot] = logits_V
        self.cache.place({slot: past for slot, (past, _) in zip(free, placed, strict=False)})

    def _prefill(self, turns: list[Turn]) -> list[tuple[Past, torch.Tensor]]:
        """What is cached after each turn's new tokens, and the logits [V] that follow; equal prompts are run once."""
        done: dict[int | tuple[int, ...], tuple[Past, torch.Tensor]] = {}
        if self.prompt is not None:
            done[self.prompt[0]] = self.prompt[1:]
        keys = [tuple(turn.new) if turn.past is None else turn.number for turn in turns]
        todo = {key: turn for key, turn in zip(keys, turns, strict=True) if key not in done}
        names = list(todo)
        for group in plan_micro_batches([len(todo[name].new) for name in names], PREFILL_TOKENS):
            for name, after in zip(
                [names[n] for n in group], self._forward([todo[names[n]] for n in group]), strict=True
            ):
                done[name] = after
        last = keys[-1]
        shared = isinstance(last, tuple) and any(turn.past is None and tuple(turn.new) == last for turn in self.waiting)
        self.prompt = (last, *done[last]) if isinstance(last, tuple) and shared else None
        return [done[key] for key in keys]

    def _forward(self, turns: list[Turn]) -> list[tuple[Past, torch.Tensor]]:
        """One packed row."""
        stops = np.cumsum([len(turn.new) for turn in turns]).tolist()
        spans = [(stop - len(turn.new), stop) for stop, turn in zip(stops, turns, strict=True)]
        starts = [turn.length - len(turn.new) for turn in turns]
        device = device_of(self.model)
        positions = [np.arange(start, turn.length) for start, turn in zip(starts, turns, strict=True)]
        prefill = Prefill(spans, [turn.past for turn in turns])
        model = self.model
        hidden_1TH = model.get_decoder()(
            input_ids=torch.tensor([[token for turn in turns for token in turn.new]], device=device),
            position_ids=torch.from_numpy(np.concatenate(positions))[None].to(device),
            use_cache=False,
            prefill=prefill,
        ).last_hidden_state
        logits_TV = next_logits(model, hidden_1TH[0, torch.tensor(stops, device=device) - 1])
        return [(prefill.after(number), logits_V) for number, logits_V in enumerate(logits_TV)]

    def _decode(self, token_B: torch.Tensor) -> torch.Tensor:
        if self.program is not None:
            return self.program.step(token_B, self.cache)
        model, cache = self.model, self.cache
        hidden_B1H = model.get_decoder()(
            input_ids=token_B[:, None], position_ids=cache.lengths_B[:, None], use_cache=False, cache=cache
        ).last_hidden_state
        cache.advance()
        return next_logits(model, hidden_B1H[:, 0])


def choose(logits_BV: torch.Tensor, uniform_B: np.ndarray, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens by inverse transform of one uniform each (greedy at temperature 0), with their log-probabilities."""
    if sampling.temperature == 0:
        logprob_BV = torch.log_softmax(logits_BV, dim=-1)
        # On a processor torch's search takes ten times as long as numpy's.
        on_cpu = logits_BV.device.type == "cpu"
        token_B = torch.from_numpy(logprob_BV.numpy().argmax(-1)) if on_cpu else logprob_BV.argmax(-1)
        return token_B, logprob_BV.gather(1, token_B[:, None])[:, 0]
    logprob_BV = torch.log_softmax(logits_BV / sampling.temperature, dim=-1)
    drawn_B1 = torch.from_numpy(uniform_B).to(logits_BV.device)[:, None]
    if sampling.top_p == 1 and sampling.top_k is None:
        cumulative_BV = logprob_BV.exp().cumsum(dim=-1, dtype=torch.float64)
        place_B1 = torch.searchsorted(cumulative_BV, drawn_B1 * cumulative_BV[:, -1:], right=True)
        token_B1 = place_B1.clamp_(max=logits_BV.shape[1] - 1)
    else:
        most = min(sampling.top_k or logits_BV.shape[1], logits_BV.shape[1])
        sorted_BV, order_BV = logprob_BV.sort(dim=-1, descending=True, stable=True)
        cumulative_BV = sorted_BV[:, :most].exp().cumsum(dim=-1, dtype=torch.float64)
        # Of the top k, the smallest set of tokens whose share reaches top_p; the uniform is rescaled to its mass.
        reach_B1 = cumulative_BV[:, -1:] * sampling.top_p
        kept_B1 = (cumulative_BV < reach_B1).sum(dim=-1, keepdim=True).clamp_(max=most - 1)
        mass_B1 = cumulative_BV.gather(1, kept_B1)
        place_B1 = torch.searchsorted(cumulative_BV, drawn_B1 * mass_B1, right=True)
        token_B1 = order_BV.gather(1, torch.minimum(place_B1, kept_B1))
    return token_B1[:, 0], logprob_BV.gather(1, token_B1)[:, 0]
