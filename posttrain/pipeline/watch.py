"""Beside an attempt: signs of life for `status`, and an eye on the disk before it is full."""

import contextlib
import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from posttrain.errors import MachineError
from posttrain.host import machine
from posttrain.phases.context import Progress
from posttrain.pipeline.screen import Screen
from posttrain.pipeline.stop import StopSignals
from posttrain.run.folder import RunFolder

EVERY_S = 5.0
LITTLE_BYTES = 64 * 2**20
"""Kept free for logs, metrics and results, whatever a phase needs beside it."""
WARN_TIMES = 3
"""A warning is due while so many times the next checkpoint would still fit."""


def since_boot() -> float:
    """Seconds on a clock that nobody sets; it goes on while the machine sleeps, and is the same in every process."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot() -> str:
    """Which start of the machine that clock counts from."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


@dataclass(frozen=True)
class Heartbeat:
    boot: str
    beat: float
    moved: float
    """When something was last done; both in seconds since the machine started."""
    doing: str


def read_heartbeat(run: RunFolder) -> Heartbeat | None:
    """The last one, or None: there is none, it cannot be read, or the machine was started anew since."""
    try:
        found = Heartbeat(**json.loads(run.heartbeat.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.boot == boot() else None


class Watch:
    """A thread while the context is open. `next_save_bytes` is what the phase at hand will write next."""

    def __init__(self, run: RunFolder, screen: Screen, stop: StopSignals) -> None:
        self.run, self.screen, self.stop = run, screen, stop
        self.next_save_bytes = 0
        self.moved = since_boot()
        self.doing = "starting"
        self.warned = False
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.ended.set()
        self.thread.join()

    def progress(self, label: str, total: float, unit: str, done: float) -> Progress:
        """The screen's progress, noted as a sign of life."""
        return _Seen(self, self.screen.progress(label, total, unit, done), label, total, unit, done)

    def note(self, doing: str) -> None:
        self.doing, self.moved = doing, since_boot()

    def _beat(self) -> None:
        while True:
            # A full disk is what the other half reports; without a heartbeat the run goes on.
            with contextlib.suppress(OSError):
                self._write()
                self._look_at_disk()
            if self.ended.wait(EVERY_S):
                return

    def _write(self) -> None:
        beat = Heartbeat(boot(), since_boot(), self.moved, self.doing)
        temporary = self.run.heartbeat.with_name(f".{self.run.heartbeat.name}.tmp-{os.getpid()}")
        temporary.write_text(json.dumps(asdict(beat)))
        os.replace(temporary, self.run.heartbeat)

    def _look_at_disk(self) -> None:
        """Warn once when it becomes narrow; stop while what is done can still be saved."""
        free, needed = machine.free_bytes(self.run.path), self.next_save_bytes
        if free < needed + LITTLE_BYTES:
            self.stop.ask(
                MachineError(
                    f"the disk is nearly full: {free / 1e6:,.0f} MB are free in {self.run.path.parent}, the next save "
                    f"takes {needed / 1e6:,.0f} MB. Free some, then type: posttrain resume {self.run.words}"
                )
            )
        elif free < WARN_TIMES * needed + LITTLE_BYTES and not self.warned:
            self.warned = True
            self.screen.say(
                f"WARNING: {free / 1e6:,.0f} MB of disk are left, each save takes {needed / 1e6:,.0f} MB; "
                f"--keep-checkpoints 1 keeps fewer of them"
            )


@dataclass
class _Seen:
    watch: Watch
    inner: Progress
    label: str
    total: float
    unit: str
    done: float

    def __enter__(self) -> Progress:
        self.inner.__enter__()
        self._note()
        return self

    def __exit__(self, *exc: object) -> None:
        self.inner.__exit__(*exc)

    def advance(self, amount: float = 1, **shown: float | str) -> None:
        self.done += amount
        self._note()
        self.inner.advance(amount, **shown)

    def _note(self) -> None:
        self.watch.note(f"{self.label}: {self.done:,.0f}/{self.total:,.0f} {self.unit}")
