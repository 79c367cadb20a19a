"""What whoever writes tokens promises, be it this process or a server."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from posttrain.recipe.types import Sampling


@dataclass(frozen=True)
class Sampled:
    """One turn."""

    tokens: list[int]
    """The stop token included, where one was met."""
    logprobs: list[float]
    """Of the sampled tokens at the sampling temperature, before any top-k or top-p cut."""
    ended: Literal["stop", "length", "lost"]
    """`lost`: the sampler failed, again and again; there are no tokens."""
    reason: str = field(default="", compare=False)
    """Why it was lost."""


Reply = Callable[[int, Sampled], Sequence[int] | None]
"""(number of the prompt, its turn) → tokens that follow, after which the model writes again; None ends it.

Called once per turn, never two at a time.
"""


class Sampler(ABC):
    """Completions of token prompts. Each has a seed of its own: in which order they are worked on changes nothing."""

    @abstractmethod
    def play(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, reply: Reply) -> None:
        """Sample a turn of every prompt, and further ones as `reply` asks. Equal prompts should be neighbours."""

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Sampled]:
        """One turn per prompt, in order."""
        turns: dict[int, Sampled] = {}

        def note(number: int, sampled: Sampled) -> None:
            turns[number] = sampled

        self.play(prompts, seeds, sampling, note)
        return [turns[number] for number in range(len(prompts))]
