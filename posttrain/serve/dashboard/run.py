"""One run as it goes: phases on a line of time, curves, gates, what is left, and start and stop."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nicegui import ui

from posttrain.report import curves, summary
from posttrain.report.read import TRAINING_KINDS, GateRecord, PhaseRecord, Row, RunRecord, number, read_run
from posttrain.run.folder import RunFolder
from posttrain.serve import control
from posttrain.serve.dashboard.frame import apart, button, every, frame, markup, page, refill
from posttrain.serve.dashboard.remaining import Clock, Remaining, progress_of
from posttrain.serve.dashboard.site import Site, recipe_of

LOOK_EVERY_S, LOOK_AT_LONG_EVERY_S = 1.0, 5.0
LONG = 2_000
"""Steps from which on a picture of them changes slowly."""
LOG_BYTES = 6_000
PACE_STEPS = 20
BEGINS = ("phase_started", "phase_resumed")


@dataclass(frozen=True)
class PhaseRow:
    phase: PhaseRecord
    bar: curves.Bar | None
    key_metric: str
    gates: str
    progress: float | None
    """Share of a phase that runs."""


@dataclass(frozen=True)
class View:
    state: control.RunState
    record: RunRecord
    rows: tuple[PhaseRow, ...]
    gates: tuple[GateRecord, ...]
    remaining: Remaining | None
    trained: tuple[str, ...]
    """Phases that have steps."""
    log: str


def pages(site: Site) -> None:
    clock = Clock()

    @page("/run/{name}")
    def run_page(name: str) -> None:
        site.run(name)
        with frame(name, name):
            _Overview(site, clock, name)


class _Overview:
    def __init__(self, site: Site, clock: Clock, name: str) -> None:
        self.site, self.clock, self.name = site, clock, name
        self.drawn_at = 0.0
        self.failed: list[str] = []
        with ui.element("div").classes("headline"):
            self.state = markup()
            with ui.element("div").classes("toolbar"):
                self.resume = button("Resume", self._resume, "primary")
                self.accept = button("Accept its gates and resume", self._accept, "grave")
                self.stop = button("Stop", self._stop)
                self.stop_now = button("Stop at once", self._stop_now, "grave")
        for one in (self.resume, self.accept, self.stop, self.stop_now):
            one.set_visibility(False)
        self.phases = markup("run_phases", rows=None)
        with ui.element("section").classes("block") as self.training:
            with ui.element("div").classes("toolbar"):
                ui.html("Training", tag="h2")
                self.phase = ui.select([], label="Phase", on_change=self._draw_now).props("outlined dense")
            self.panels = ui.element("div").classes("panels-live")
        self.training.set_visibility(False)
        self.pictures: dict[str, ui.html] = {}
        self.gates = markup()
        self.log = markup()
        every(LOOK_EVERY_S, self.look)

    async def look(self) -> None:
        view = await apart(look_at, self.site, self.clock, self.name)
        if view is None:
            return
        running = view.state.state == "running"
        refill(self.state, "run_state", view=view)
        refill(self.phases, "run_phases", rows=view.rows)
        refill(self.gates, "run_gates", gates=view.gates)
        refill(self.log, "run_log", log=view.log)
        self.resume.set_visibility(not running and view.state.state != "finished")
        self.failed = [f"{gate.phase}:{gate.name}" for gate in view.gates if gate.hard and gate.verdict == "failed"]
        self.accept.set_visibility(not running and bool(self.failed))
        self.stop.set_visibility(running)
        self.stop_now.set_visibility(running)
        self._offer(view)
        await self._draw()

    def _offer(self, view: View) -> None:
        """The phases with steps; a new one is shown unless an older one was chosen."""
        if not view.trained or list(view.trained) == self.phase.options:
            return
        newest = self.phase.value is None or self.phase.value == self.phase.options[-1]
        self.training.set_visibility(True)
        self.phase.set_options(list(view.trained), value=view.trained[-1] if newest else self.phase.value)

    async def _draw_now(self) -> None:
        self.drawn_at = 0.0
        await self._draw()

    async def _draw(self) -> None:
        phase = self.phase.value
        if phase is None or time.monotonic() < self.drawn_at:
            return
        drawn = await apart(panels_of, self.site, self.name, phase)
        if drawn is None or phase != self.phase.value:
            return
        panels, num_steps, at_end = drawn
        pause = 0.0 if not at_end else LOOK_AT_LONG_EVERY_S if num_steps > LONG else LOOK_EVERY_S / 2
        self.drawn_at = time.monotonic() + pause
        if panels.keys() != self.pictures.keys():
            self.panels.clear()
            with self.panels:
                self.pictures = {metric: markup(tag="figure") for metric in panels}
        for metric, panel in panels.items():
            refill(self.pictures[metric], "panel", panel=panel)

    async def _resume(self) -> None:
        if await apart(control.resume, self.site.settings, self.name):
            ui.notify(f"{self.name} goes on")
            await self.look()

    async def _accept(self) -> None:
        if await _sure(f"Go on although {', '.join(self.failed)} failed? The run records it.", "Accept"):
            await apart(control.resume, self.site.settings, self.name, None, tuple(self.failed))

    async def _stop(self) -> None:
        if await apart(control.stop, self.site.settings, self.name):
            ui.notify("It finishes the step at hand, saves and ends")

    async def _stop_now(self) -> None:
        if await _sure(f"Stop {self.name} at once? What was done since the last save is lost.", "Stop at once"):
            await apart(control.stop, self.site.settings, self.name, True)


async def _sure(question: str, yes: str) -> bool:
    """What somebody answers to it."""
    with ui.dialog() as dialog, ui.card().classes("dialog"):
        ui.label(question)
        with ui.element("div").classes("toolbar end"):
            button("Cancel", lambda: dialog.submit(False))
            button(yes, lambda: dialog.submit(True), "grave")
    answer = await dialog
    dialog.delete()
    return bool(answer)


def look_at(site: Site, clock: Clock, name: str) -> View:
    """Everything but the curves, from files that stay small however long the run is."""
    run = site.run(name)
    state = control.state_of(run)
    record = read_run(run, answers=False, metrics=False)
    phases = tuple(_with_last_steps(site, run, phase, record.events) for phase in record.phases)
    record = replace(record, phases=phases)
    bars = curves.timeline(record.phases)
    rows = []
    for phase, bar in zip(record.phases, bars, strict=True):
        progress = progress_of(run, phase.name) if phase.status == "running" else None
        share = progress.done / progress.total if progress and progress.total else None
        rows.append(PhaseRow(phase, bar, summary.key_metric(phase), summary.gate_verdicts(phase), share))
    remaining = None
    if state.state == "running":
        remaining = clock.remaining(run, recipe_of(run), record, _pace(record.phases))
    trained = tuple(p.name for p in record.phases if p.kind in TRAINING_KINDS and p.metrics)
    gates = tuple(gate for phase in record.phases for gate in phase.gates)
    return View(state, record, tuple(rows), gates, remaining, trained, _log_tail(run))


def _with_last_steps(site: Site, run: RunFolder, phase: PhaseRecord, events: Sequence[Row]) -> PhaseRecord:
    """With as many steps as its numbers are taken from; one that runs has lasted until now."""
    metrics: tuple[dict[str, object], ...] = ()
    if phase.kind in TRAINING_KINDS:
        with site.lock:
            columns = site.steps(run.phase(phase.name).metrics)
            columns.read_on()
            metrics = columns.last(PACE_STEPS)
    seconds = phase.seconds
    if phase.status == "running":
        begun = [event for event in events if event.get("phase") == phase.name and event.get("event") in BEGINS]
        since = number(begun[-1].get("time"))
        seconds = None if since is None else max(time.time() - since, 0.0)
    return replace(phase, metrics=metrics, seconds=seconds)


def _pace(phases: Sequence[PhaseRecord]) -> float | None:
    """Median seconds of the last steps of the phase that runs."""
    for phase in phases:
        if phase.status == "running":
            seconds = sorted(s for row in phase.metrics if (s := number(row.get("seconds"))) is not None)
            return seconds[len(seconds) // 2] if seconds else None
    return None


def panels_of(site: Site, name: str, phase: str) -> tuple[dict[str, curves.Panel], int, bool]:
    """The phase's pictures by metric, the number of its steps, and whether all were read."""
    run = site.run(name)
    record = read_run(run, answers=False, metrics=False).phase(phase)
    with site.lock:
        columns = site.steps(run.phase(phase).metrics)
        columns.read_on()
        drawn = curves.panels(columns.points, record.gates if record else (), len(columns))
        return drawn, len(columns), columns.at_end


def _log_tail(run: RunFolder) -> str:
    """The end of the last attempt's log, from a whole line on."""
    logs = sorted(run.logs.glob("attempt-*.log"))
    if not logs:
        return ""
    with open(logs[-1], "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - LOG_BYTES))
        text = file.read().decode(errors="replace")
    return text if size <= LOG_BYTES else text.partition("\n")[2]
