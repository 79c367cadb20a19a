"""The phase's input state, kept beside the one in training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class Reference:
    """Copies of the trainable tensors as they were; everything else of the model is frozen and therefore shared.

    "Adapter off" would be another model where the phase continues an adapter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._pairs = [(parameter, parameter.detach().clone()) for parameter in parameters.values()]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model is the reference."""
        trained = [parameter.data for parameter, _ in self._pairs]
        for parameter, before in self._pairs:
            parameter.data = before
        try:
            yield
        finally:
            for (parameter, _), data in zip(self._pairs, trained, strict=True):
                parameter.data = data


def kl_estimate(policy_S: torch.Tensor, reference_S: torch.Tensor) -> float:
    """KTO's divergence of a batch: the mean log-ratio over mismatched completions, never below 0."""
    return max(0.0, float((policy_S - reference_S).mean()))
