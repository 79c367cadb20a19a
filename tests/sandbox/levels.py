"""The levels that the contract is run at; one that the machine lacks is skipped by name, with the reason."""

from functools import cache

import pytest

from posttrain.sandbox.confine import LADDER
from posttrain.sandbox.level import Probe, probe

EVERY = pytest.mark.parametrize("level", LADDER)


@cache
def _probed(level: str) -> Probe:
    return probe(level)


def need(level: str) -> str:
    found = _probed(level)
    if not found.works:
        pytest.skip(f"level {level} is not had here: {found.reason}")
    return level
