"""Which rows a step reads: a pure function of seed and step."""

import numpy as np


def rows_of_step(seed: int, step: int, per_step: int, num_rows: int) -> list[int]:
    """Row numbers of 1-based `step`. Epochs are seeded permutations laid end to end; a step may span two."""
    first = (step - 1) * per_step
    rows = []
    for position in range(first, first + per_step):
        epoch, place = divmod(position, num_rows)
        rows.append(int(_permutation(seed, epoch, num_rows)[place]))
    return rows


_cached: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    key = (seed, epoch, num_rows)
    if key not in _cached:
        _cached.clear()
        _cached[key] = np.random.default_rng([seed, epoch]).permutation(num_rows)
    return _cached[key]
