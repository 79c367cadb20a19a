"""Signals that ask a run to stop: the first lets the step finish and saves, the second stops at once."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from posttrain.errors import PosttrainError, Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""SIGHUP: the terminal or the screen session has gone."""


class StopSignals:
    """Installed while the context is open."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.count = 0
        self.error: PosttrainError | None = None
        """What ends the attempt in the place of `Stopped`, where no signal but something else asked for it."""
        self.open = 0
        """Interruptible sections that are open."""

    def requested(self) -> bool:
        return self.count > 0

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within, the first signal, or one that came before, raises `Stopped` at once.

        For rollouts, evaluations and the like: they may take an hour, nothing of them is written until they are done,
        and the same seeds make the same ones again.
        """
        self.open += 1
        try:
            self._break_off()
            yield
            # Python drops what a handler raises inside a destructor or a callback from C.
            self._break_off()
        finally:
            self.open -= 1

    def _break_off(self) -> None:
        if self.count and self.open:
            raise Stopped("stopped in the middle of what is made again as it was")

    def ask(self, error: PosttrainError) -> None:
        """Stop as a signal would, at the end of the step: may be called from any thread."""
        self.error = self.error or error
        self.count = max(self.count, 1)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        name = signal.Signals(number).name
        if self.count == 1:
            doing = "breaking off what is made again" if self.open else "finishing the step"
            self.say(f"{name}: {doing} and saving; a second signal stops at once")
            self._break_off()
        elif self.count == 2:
            raise Stopped(f"stopped at once by a second {name}; work since the last save is lost")
        else:
            os._exit(Stopped.exit_code)

    def __enter__(self) -> "StopSignals":
        # What nohup has switched off stays off.
        heard = [one for one in SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
        self.before: dict[signal.Signals, Any] = {one: signal.signal(one, self._arrived) for one in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for one, handler in self.before.items():
            signal.signal(one, handler)
