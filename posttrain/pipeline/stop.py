"""Signals that ask a run to stop: the first lets the step finish and saves, the second stops at once."""

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from posttrain.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Installed while the context is open."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.count = 0

    def requested(self) -> bool:
        return self.count > 0

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        name = signal.Signals(number).name
        if self.count == 1:
            self.say(f"{name}: finishing the step and saving; a second signal stops at once")
        elif self.count == 2:
            raise Stopped(f"stopped at once by a second {name}; work since the last save is lost")
        else:
            os._exit(Stopped.exit_code)

    def __enter__(self) -> "StopSignals":
        self.before: dict[signal.Signals, Any] = {one: signal.signal(one, self._arrived) for one in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for one, handler in self.before.items():
            signal.signal(one, handler)
