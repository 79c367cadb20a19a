"""How a model is asked, and where; loads none."""

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.applications import Starlette

from posttrain.errors import InputError, MachineError

if TYPE_CHECKING:
    from posttrain.serve.generation import Generation

DEFAULT_NEW_TOKENS = 1024
"""Of an answer whose length nobody limits."""


class UnknownModel(InputError):
    """There is no model of this name."""


class TooLong(InputError):
    """More tokens than the model or the server has room for."""


class Busy(MachineError):
    """Too many answers are being written."""


@dataclass(frozen=True)
class Ask:
    """How an answer is to be sampled."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    max_new_tokens: int | None = None
    """None: as many as fit, and no more than `DEFAULT_NEW_TOKENS`."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are no part of it."""
    stop_tokens: frozenset[int] = frozenset()
    """Besides the chat format's."""
    ignore_eos: bool = False
    """Only `stop_tokens` stop it."""
    likeliest: int = 0
    """Of each token's distribution, so many are told."""
    each_token: bool = True
    """Whether it is told as it is written; else at once."""
    call: str | None = None
    """The function that must be called."""


_MAKING = threading.Lock()


def generation_of(app: Starlette) -> "Generation":
    """The server's models; what it takes to run them is imported when the first is asked for."""
    with _MAKING:
        if not hasattr(app.state, "generation"):
            from posttrain.serve.generation import Generation

            app.state.generation = Generation(app.state.settings.runs_dir, app.state.settings.models)
        made: Generation = app.state.generation
        return made
