"""The in-process sampler: prompts prefilled once in packed rows, then one token per slot and step.

A row's logits depend in the last bits on what else is in its batch, so the batches are a function of the prompts and
the token budget alone; randomness is one stream of uniforms per sequence, seeded by the caller.

Axes: B slot, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from posttrain.engine.attention import Prefill, SlotCache
from posttrain.engine.decode import DecodeProgram, decode_program
from posttrain.engine.forward import device_of, next_logits, precision_context
from posttrain.engine.packing import Item, pack, plan_micro_batches
from posttrain.recipe.types import Precision, Sampling

PREFILL_TOKENS = 8192
"""Prompts go through the model in rows of so many tokens, at most: longer ones fall out of the processor's caches."""


@dataclass(frozen=True)
class Sampled:
    tokens: list[int]
    """The stop token included, where one was met."""
    logprobs: list[float]
    """Of the sampled tokens at the sampling temperature, before any top-p cut."""
    ended: Literal["stop", "length"]


@dataclass(frozen=True)
class Sampler:
    model: PreTrainedModel
    stop_tokens: frozenset[int]
    precision: Precision
    position_budget: int
    """Key-value positions of one decode batch, at most; a longer sequence goes alone."""

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Sampled]:
        """One completion per prompt, in order. Equal prompts of a batch are prefilled once."""
        results: list[Sampled] = []
        for start, stop in self._batches(prompts, sampling.max_new_tokens):
            results += self._sample_batch(prompts[start:stop], seeds[start:stop], sampling)
        return results

    def _batches(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[tuple[int, int]]:
        start, longest = 0, 0
        for number, prompt in enumerate(prompts):
            longest = max(longest, len(prompt) + max_new_tokens)
            if number > start and longest * (number + 1 - start) > self.position_budget:
                yield start, number
                start, longest = number, len(prompt) + max_new_tokens
        if prompts:
            yield start, len(prompts)

    def _sample_batch(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[Sampled]:
        tokens: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        stopped = [False] * len(prompts)
        uniforms = [np.random.default_rng(seed).random(sampling.max_new_tokens) for seed in seeds]
        active = torch.arange(len(prompts))
        program = decode_program(self.model) if self.precision == "float32" else None
        with precision_context(self.precision, device_of(self.model)):
            cache, logits_BV = self._prefill(prompts, sampling.max_new_tokens)
            for position in range(sampling.max_new_tokens):
                drawn_B = torch.tensor([uniforms[number][position] for number in active.tolist()])
                token_B, logprob_B = choose(logits_BV, drawn_B, sampling)
                for number, token, logprob in zip(active.tolist(), token_B.tolist(), logprob_B.tolist(), strict=True):
                    if not stopped[number]:
                        tokens[number].append(token)
                        logprobs[number].append(logprob)
                        stopped[number] = token in self.stop_tokens
                going = [slot for slot, number in enumerate(active.tolist()) if not stopped[number]]
                if not going or position + 1 == sampling.max_new_tokens:
                    break
                # Finished slots ride along until half of the batch is done: dropping them copies the cache.
                if len(going) <= len(active) // 2:
                    kept = torch.tensor(going)
                    active, token_B = active[kept], token_B[kept]
                    cache.keep(kept)
                logits_BV = self._decode(token_B, cache, program)
        return [
            Sampled(ids, values, "stop" if done else "length")
            for ids, values, done in zip(tokens, logprobs, stopped, strict=True)
        ]

    def _prefill(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[SlotCache, torch.Tensor]:
        """Run each distinct prompt once; returns the filled cache and the first logits [B, V]."""
        slots: dict[tuple[int, ...], list[int]] = {}
        for slot, prompt in enumerate(prompts):
            slots.setdefault(tuple(prompt), []).append(slot)
        positions = max(map(len, prompts)) + max_new_tokens
        cache = SlotCache(self.model.config.num_hidden_layers, len(prompts), positions)
        cache.lengths_B = torch.tensor([len(prompt) for prompt in prompts])
        none = np.empty(0, np.int64)
        items = [Item(none, (np.array(ids),), (np.zeros(len(ids), bool),)) for ids in slots]
        by_slot: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
        for group in plan_micro_batches([item.size for item in items], PREFILL_TOKENS):
            batch = pack([items[number] for number in group], 0)
            segments = [(segment.start, segment.stop) for segment in batch.plan.segments]
            owners = [slots[tuple(items[number].tokens[0].tolist())] for number in group]
            rows = {slot: span for span, owned in zip(segments, owners, strict=True) for slot in owned}
            hidden_1TH = self.model.get_decoder()(
                input_ids=batch.input_ids_1T,
                position_ids=batch.position_ids_1T,
                use_cache=False,
                plan=batch.plan,
                prefill=Prefill(cache, rows),
            ).last_hidden_state
            for slot, (_, stop) in rows.items():
                by_slot[slot] = hidden_1TH[0, stop - 1]
        return cache, self._logits(torch.stack(by_slot))

    def _decode(self, token_B: torch.Tensor, cache: SlotCache, program: DecodeProgram | None) -> torch.Tensor:
        if program is not None:
            return program.step(token_B, cache)
        hidden_B1H = self.model.get_decoder()(
            input_ids=token_B[:, None], position_ids=cache.lengths_B[:, None], use_cache=False, cache=cache
        ).last_hidden_state
        cache.lengths_B = cache.lengths_B + 1
        return self._logits(hidden_B1H[:, 0])

    def _logits(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        return next_logits(self.model, hidden_BH)


def choose(logits_BV: torch.Tensor, uniform_B: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens by inverse transform of one uniform each (greedy at temperature 0), with their log-probabilities."""
    if sampling.temperature == 0:
        logprob_BV = torch.log_softmax(logits_BV, dim=-1)
        token_B = logits_BV.argmax(dim=-1)
    elif sampling.top_p == 1:
        logprob_BV = torch.log_softmax(logits_BV / sampling.temperature, dim=-1)
        cumulative_BV = logprob_BV.exp().double().cumsum(dim=-1)
        place_B1 = torch.searchsorted(cumulative_BV, uniform_B.double()[:, None] * cumulative_BV[:, -1:], right=True)
        token_B = place_B1.clamp(max=logits_BV.shape[1] - 1)[:, 0]
    else:
        logprob_BV = torch.log_softmax(logits_BV / sampling.temperature, dim=-1)
        sorted_BV, order_BV = logprob_BV.sort(dim=-1, descending=True, stable=True)
        cumulative_BV = sorted_BV.exp().double().cumsum(dim=-1)
        # Keep the smallest set of tokens whose probability reaches top_p, then rescale the uniform to that mass.
        kept_B1 = (cumulative_BV < sampling.top_p).sum(dim=-1, keepdim=True).clamp(max=cumulative_BV.shape[1] - 1)
        mass_B1 = cumulative_BV.gather(1, kept_B1)
        place_B1 = torch.searchsorted(cumulative_BV, uniform_B.double()[:, None] * mass_B1, right=True)
        token_B = order_BV.gather(1, torch.minimum(place_B1, kept_B1))[:, 0]
    return token_B, logprob_BV.gather(1, token_B[:, None])[:, 0]
