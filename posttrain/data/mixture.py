"""Several sources as one order of samples: shuffled together, or in turns by weight.

Everything is whole-number arithmetic on counts, weights and a seed, so a position means the same on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import gcd, lcm

import numpy as np


@dataclass(frozen=True)
class Part:
    """One source's samples in a dataset."""

    samples: int
    weight: float | None
    """Its share against the other parts' weights; None in all of them lays them together as they are."""
    repeat: int
    """How often an epoch reads it; with weights, at most."""


@dataclass(frozen=True)
class Mixture:
    """The samples of `parts`, numbered through, in an order that `seed` decides epoch by epoch."""

    parts: tuple[Part, ...]
    seed: int

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Samples of each part in an epoch; it ends where the first part has no more to give."""
        return tuple(counts_until_empty(self._shares, self._whole) if self._by_turns else self._whole)

    def __len__(self) -> int:
        """Samples in an epoch."""
        return sum(self.counts)

    def epoch(self, number: int) -> np.ndarray:
        """Sample numbers of the 0-based epoch `number`, in order."""
        if not self._by_turns:
            order = np.random.default_rng([self.seed, number]).permutation(len(self))
            return order if self._plain else self._unrolled[order]
        whose = turns(self._shares, len(self))
        order = np.empty(len(self), dtype=np.int64)
        for place, count in enumerate(self.counts):
            if count:
                order[whose == place] = self._draw(place, number * count, count)
        return order

    @property
    def _by_turns(self) -> bool:
        return any(part.weight is not None for part in self.parts)

    @cached_property
    def _whole(self) -> list[int]:
        return [part.samples * part.repeat for part in self.parts]

    @cached_property
    def _shares(self) -> list[int]:
        """The weights as whole numbers; a part that has nothing takes no turns."""
        return whole_weights([part.weight or 0 if part.samples else 0 for part in self.parts])

    @cached_property
    def _firsts(self) -> list[int]:
        """Number of each part's first sample."""
        return [sum(part.samples for part in self.parts[:place]) for place in range(len(self.parts))]

    @property
    def _plain(self) -> bool:
        return all(part.repeat == 1 for part in self.parts)

    @cached_property
    def _unrolled(self) -> np.ndarray:
        """Every part's numbers as often as it is repeated."""
        spans = [
            np.tile(np.arange(first, first + part.samples), part.repeat)
            for first, part in zip(self._firsts, self.parts, strict=True)
        ]
        return np.concatenate(spans)

    def _draw(self, place: int, first: int, count: int) -> np.ndarray:
        """Draws `first` and on from one part: seeded passes over it, laid end to end over the epochs."""
        samples = self.parts[place].samples
        drawn, left = [], count
        while left:
            passed, start = divmod(first, samples)
            stop = min(samples, start + left)
            drawn.append(np.random.default_rng([self.seed, place, passed]).permutation(samples)[start:stop])
            first, left = first + stop - start, left - (stop - start)
        return self._firsts[place] + np.concatenate(drawn)


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratio of `weights`, which are taken for the decimals they are written as."""
    exact = [Fraction(repr(weight)) for weight in weights]
    scaled = [int(weight * lcm(*(one.denominator for one in exact))) for weight in exact]
    shared = gcd(*scaled)
    return [weight // shared for weight in scaled]


def turns(shares: Sequence[int], length: int) -> np.ndarray:
    """Whose turn it is at each of `length` places.

    Part i of share s has its k-th turn (from 0) at the time (2k + 1) / 2s, the earlier part first where times are
    equal: the method of Webster. After sum(shares) turns each part has had exactly its share, and it begins anew.
    """
    common, period = lcm(*filter(None, shares)), sum(shares)
    shown = min(length, period)
    number = np.int64 if common < 2**60 else object
    times, parts = [], []
    for place, share in enumerate(shares):
        if not share:
            continue
        most = min(share, shown)
        times.append((2 * np.arange(most).astype(number) + 1) * (common // share))
        parts.append(np.full(most, place))
    whose = np.concatenate(parts)
    # Stable, and the parts stand in their order: equal times go to the earlier one.
    first_period = whose[np.argsort(np.concatenate(times), kind="stable")][:shown]
    return np.resize(first_period, length)


def counts_until_empty(shares: Sequence[int], stock: Sequence[int]) -> list[int]:
    """How many turns each part has had in `turns` before the first turn of a part whose stock is used up."""
    common = lcm(*filter(None, shares))
    paces = {place: common // share for place, share in enumerate(shares) if share}
    end, ending = min(((2 * stock[place] + 1) * pace, place) for place, pace in paces.items())
    counts = [0] * len(shares)
    for place, pace in paces.items():
        # Turn k comes at (2k + 1) · pace; of turns at the very end, only those of earlier parts count.
        counts[place] = (end - pace) // (2 * pace) + 1 if place < ending else -((pace - end) // (2 * pace))
    return counts
