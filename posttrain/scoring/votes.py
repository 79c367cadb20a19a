"""Several answers to one task: the one most often given, and the chance that one of k is right."""

from collections import Counter
from collections.abc import Sequence
from math import comb


def majority(answers: Sequence[str | None]) -> str | None:
    """The answer most often given; of equals the lowest, numbers by value. None has no vote and wins only alone."""
    votes = Counter(answer for answer in answers if answer is not None)
    return min(votes, key=lambda answer: (-votes[answer], *_order(answer)), default=None)


def _order(answer: str) -> tuple[bool, float, str]:
    try:
        return False, float(answer), answer
    except ValueError:
        return True, 0.0, answer


def pass_at(k: int, samples: int, passed: int) -> float:
    """Chance that of k samples, drawn without replacement from these, at least one passed (Chen et al. 2021, eq. 1)."""
    return 1 - comb(samples - passed, k) / comb(samples, k)
