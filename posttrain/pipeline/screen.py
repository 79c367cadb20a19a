"""What the pipeline needs of whatever shows a run to a person."""

from typing import Protocol

from posttrain.phases.context import Progress
from posttrain.run.attempt_log import AttemptLog


class Screen(Protocol):
    def say(self, text: str) -> None:
        """Lines for the terminal, and for the log when one is attached."""

    def progress(self, label: str, total: float, unit: str, done: float) -> Progress: ...

    def attach(self, log: AttemptLog | None) -> None:
        """From now on everything shown, stray output of libraries included, goes to this log too."""
