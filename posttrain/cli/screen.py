"""Shows a run in the terminal: lines, progress bars with rate and time left, and the same as plain lines in the log."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from posttrain.phases.context import Progress
from posttrain.run.attempt_log import AttemptLog

QUIET_S = 2.0
"""Progress that ends sooner than this is not worth a line."""
FIRST_LINE_S, LINE_EVERY_S = 5.0, 15.0
"""When a plain line of progress is due, from the start and from the line before."""


class TerminalScreen:
    """One per command; implements `pipeline.screen.Screen`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.log: AttemptLog | None = None
        self.bars: Any = None
        self.open_bars = 0
        self.is_terminal = self.stream.isatty()

    def say(self, text: str) -> None:
        if self.bars is not None:
            self.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)
        self.note(text)

    def note(self, text: str) -> None:
        """To the log only."""
        if self.log is not None:
            self.log.write(text)

    def attach(self, log: AttemptLog | None) -> None:
        self.log = log
        if log is not None:
            self.kept = sys.stdout, sys.stderr
            sys.stdout = sys.stderr = StrayOutput(self.say)
        else:
            sys.stdout, sys.stderr = self.kept

    def progress(self, label: str, total: float, unit: str, done: float) -> Progress:
        lines = PlainProgress(label, total, unit, done, self.note if self.is_terminal else self.say, self.say)
        return BarProgress(self, lines) if self.is_terminal else lines

    def open_bar(self, label: str, total: float, unit: str, done: float) -> Any:
        if self.bars is None:
            self.bars = _make_bars(self.stream)
            self.bars.start()
        self.open_bars += 1
        return self.bars.add_task(label, total=total, completed=done, unit=unit, shown="")

    def close_bar(self, task: Any) -> None:
        self.bars.remove_task(task)
        self.open_bars -= 1
        if self.open_bars == 0:
            self.bars.stop()
            self.bars = None


def _make_bars(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text("" if task.speed is None else f"{quantity(task.speed)} {task.fields['unit']}/s")

    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
        console=Console(file=stream),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


class StrayOutput(io.TextIOBase):
    """Takes the place of stdout and stderr while an attempt runs, so that what libraries print is logged too."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.pending = ""

    def write(self, text: str) -> int:
        *lines, self.pending = (self.pending + text).split("\n")
        for line in lines:
            # A library's own progress bar redraws itself after a carriage return: the last drawing counts.
            if line.rstrip("\r"):
                self.say(line.rstrip("\r").rpartition("\r")[2])
        return len(text)

    def isatty(self) -> bool:
        return False


class PlainProgress:
    """Progress as occasional lines."""

    def __init__(
        self,
        label: str,
        total: float,
        unit: str,
        done: float,
        on_the_way: Callable[[str], None],
        at_the_end: Callable[[str], None],
    ) -> None:
        self.label, self.total, self.unit, self.done, self.begun_with = label, total, unit, done, done
        self.on_the_way, self.at_the_end = on_the_way, at_the_end
        self.shown: dict[str, float | str] = {}

    def __enter__(self) -> Progress:
        self.started = time.perf_counter()
        self.next_line = self.started + FIRST_LINE_S
        return self

    def advance(self, amount: float = 1, **shown: float | str) -> None:
        self.done += amount
        self.shown |= shown
        now = time.perf_counter()
        if now >= self.next_line and self.done < self.total:
            self.next_line = now + LINE_EVERY_S
            rate = self.rate(now)
            left = f", {duration((self.total - self.done) / rate)} left" if rate > 0 else ""
            self.on_the_way(f"{self._so_far(now)}{left}{self._extra()}")

    def __exit__(self, *exc: object) -> None:
        now = time.perf_counter()
        if now - self.started >= QUIET_S:
            self.at_the_end(f"{self._so_far(now)}, {duration(now - self.started)}{self._extra()}")

    def rate(self, now: float) -> float:
        return (self.done - self.begun_with) / max(now - self.started, 1e-9)

    def _so_far(self, now: float) -> str:
        counts = f"{self.done:,.0f}/{self.total:,.0f}"
        return f"{self.label}: {counts} {self.unit}, {quantity(self.rate(now))} {self.unit}/s"

    def _extra(self) -> str:
        return "".join(f", {name} {shown(value)}" for name, value in self.shown.items())


class BarProgress:
    """A bar in the terminal; the lines go to the log, and the last one to both."""

    def __init__(self, screen: TerminalScreen, lines: PlainProgress) -> None:
        self.screen, self.lines = screen, lines

    def __enter__(self) -> Progress:
        lines = self.lines
        lines.__enter__()
        self.task = self.screen.open_bar(lines.label, lines.total, lines.unit, lines.done)
        return self

    def advance(self, amount: float = 1, **extra: float | str) -> None:
        self.lines.advance(amount, **extra)
        text = "  ".join(f"{name} {shown(value)}" for name, value in self.lines.shown.items())
        self.screen.bars.update(self.task, advance=amount, shown=text)

    def __exit__(self, *exc: object) -> None:
        self.screen.close_bar(self.task)
        self.lines.__exit__(*exc)


def shown(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def quantity(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


@contextlib.contextmanager
def table_console(stream: TextIO | None = None) -> Iterator[Any]:
    """A rich console for tables, wide enough when the output is no terminal."""
    from rich.console import Console

    target = stream or sys.stdout
    yield Console(file=target, width=None if target.isatty() else 140)
