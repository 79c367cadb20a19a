"""Which samples a step reads: a pure function of mixture and step."""

import numpy as np

from posttrain.data.mixture import Mixture


class Samples:
    """The samples of every epoch, laid end to end."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._epoch: tuple[int, np.ndarray] | None = None

    def of_step(self, step: int, per_step: int, among: frozenset[int] | None = None) -> list[int]:
        """Sample numbers of 1-based `step`, which may span epochs; `among` leaves all others out of every epoch."""
        first = (step - 1) * per_step
        if among is None:
            places = (divmod(position, len(self._mixture)) for position in range(first, first + per_step))
            return [int(self._order(epoch)[place]) for epoch, place in places]
        numbers: list[int] = []
        epoch = 0
        while len(numbers) < first + per_step:
            numbers += [number for number in self._order(epoch).tolist() if number in among]
            epoch += 1
        return numbers[first : first + per_step]

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self._mixture)

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._mixture.epoch(epoch)
        return self._epoch[1]
