"""Boltzmann rewards: a softmax over an action's values."""

import math
from collections.abc import Sequence


def boltzmann(values: Sequence[float], tau: float) -> list[float]:
    """exp((v - max v) / tau), normalised to 1; small `tau` leaves the best action nearly everything."""
    best = max(values)
    weights = [math.exp((value - best) / tau) for value in values]
    total = sum(weights)
    return [weight / total for weight in weights]
