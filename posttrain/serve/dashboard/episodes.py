"""Episodes of RL and answers of evaluations: choose, open, and lay steps or models beside each other."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from nicegui import ui

from posttrain.report.episodes import Choice, EpisodeIndex, Head, Order, Outcome, score_parts
from posttrain.report.read import read_run
from posttrain.rollout.episodes import Ended
from posttrain.run.folder import RunFolder
from posttrain.serve.dashboard.frame import apart, button, every, frame, markup, page, refill, stepping
from posttrain.serve.dashboard.site import ROOT, Site

PAGE_ROWS = 20
LOOK_EVERY_S = 2.0
MOST_BESIDE = 200


@dataclass(frozen=True)
class Listed:
    numbers: tuple[int, ...]
    """Of the page."""
    heads: tuple[Head, ...]
    chosen: int
    known: int
    at_end: bool


def pages(site: Site) -> None:
    @page("/run/{name}/episodes")
    def episodes_page(name: str, phase: str | None = None, episode: int | None = None) -> None:
        run = site.run(name)
        with frame(f"{name}: episodes", name, "/episodes"):
            phases = phases_with_episodes(run)
            if not phases:
                ui.label("No episodes or answers yet: they come with evaluations and with GRPO.").classes("note")
                return
            rolled = [one for one, path in phases.items() if path.name == run.phase(one).samples.name]
            first = phase if phase in phases else (rolled or list(phases))[-1]
            _Episodes(site, run, phases, first, episode)


def phases_with_episodes(run: RunFolder) -> dict[str, Path]:
    """Files of episodes or answers by phase."""
    record = read_run(run, answers=False, metrics=False)
    files = {
        p.name: run.phase(p.name).samples if p.kind == "grpo" else run.phase(p.name).answers for p in record.phases
    }
    return {name: path for name, path in files.items() if path.is_file()}


class _Episodes:
    def __init__(self, site: Site, run: RunFolder, phases: dict[str, Path], phase: str, opened: int | None) -> None:
        self.site, self.run, self.phases, self.opened = site, run, phases, opened
        self.choice, self.page, self.beside = Choice(), 0, ""
        self.listed = Listed((), (), 0, 0, False)
        with ui.element("div").classes("toolbar filters"):
            self.phase = ui.select(list(phases), value=phase, label="Phase", on_change=self._other_phase)
            self._select("Order", list(get_args(Order)), "newest", "order")
            self._select("Outcome", list(get_args(Outcome)), "any", "outcome")
            self._select("Ended", {"": "any", **{one: one for one in get_args(Ended)}}, "", "ended")
            self._number("From step", "first_step", int)
            self._number("To step", "last_step", int)
            self._number("Score from", "least", float)
            self._number("Score to", "most", float)
            task = ui.input("Task", on_change=lambda event: self._choose(task=str(event.value or "")))
            for one in (self.phase, task):
                one.props("outlined dense")
        with ui.element("div").classes("split"):
            with ui.element("section").classes("choose"):
                self.table = ui.element("div").classes("scroll")
                with ui.element("div").classes("toolbar"):
                    self.back = button("Previous", lambda: self._turn(-1))
                    self.on = button("Next", lambda: self._turn(1))
                    self.told = ui.label().classes("note")
            with ui.element("section").classes("opened"):
                with ui.element("div").classes("toolbar"):
                    self.other = ui.select({"": "nothing"}, value="", label="Beside it", on_change=self._lay_beside)
                    self.other.props("outlined dense").classes("grow")
                self.sides = markup("episodes_none")
        stepping(self._step)
        every(LOOK_EVERY_S, self.look)

    def _select(self, label: str, options: Any, value: str, field: str) -> None:
        made = ui.select(options, value=value, label=label)
        made.props("outlined dense").on_value_change(lambda event: self._choose(**{field: event.value or None}))

    def _number(self, label: str, field: str, kind: type) -> None:
        made = ui.number(label).props("outlined dense debounce=300")
        made.on_value_change(lambda event: self._choose(**{field: None if event.value is None else kind(event.value)}))

    async def _choose(self, **changed: Any) -> None:
        self.choice, self.page = replace(self.choice, **changed), 0
        await self.look()

    @property
    def last_page(self) -> int:
        return max(0, (self.listed.chosen - 1) // PAGE_ROWS)

    async def _turn(self, pages: int) -> None:
        self.page = min(max(0, self.page + pages), self.last_page)
        await self.look()

    async def _other_phase(self) -> None:
        self.page, self.opened, self.beside = 0, None, ""
        await self.look()

    async def _lay_beside(self, event: Any) -> None:
        if event.value != self.beside:
            self.beside = event.value or ""
            await self._show()

    async def _step(self, by: int) -> None:
        if self.opened in self.listed.numbers:
            place = self.listed.numbers.index(self.opened) + by
            if 0 <= place < len(self.listed.numbers):
                await self._open(self.listed.numbers[place])

    async def look(self) -> None:
        listed = await apart(list_episodes, self.site, self.phases[self.phase.value], self.choice, self.page)
        if listed is None or listed == self.listed:
            return
        self.listed = listed
        if self.opened is None and listed.numbers:
            self.opened = listed.numbers[0]
        self._fill_table()
        await self._show()

    def _fill_table(self) -> None:
        listed = self.listed
        unread = "" if listed.at_end else ", reading on …"
        pages = f"page {self.page + 1:,} of {self.last_page + 1:,}"
        self.told.set_text(f"{listed.chosen:,} of {listed.known:,}{unread}; {pages}")
        for turn, is_over in ((self.back, self.page == 0), (self.on, self.page >= self.last_page)):
            turn.props("disabled") if is_over else turn.props(remove="disabled")
        self.table.clear()
        self.rows: dict[int, ui.element] = {}
        with self.table, ui.element("table").classes("list picks"), ui.element("tbody"):
            for number, head in zip(listed.numbers, listed.heads, strict=True):
                row = ui.element("tr").classes("open" if number == self.opened else "")
                self.rows[number] = row
                with row, ui.element("td"):
                    pick = ui.element("button").props("type=button").classes("pick")
                    pick.on("click", lambda number=number: self._open(number))
                    with pick:
                        markup("episodes_pick", "span", head=head)

    async def _open(self, number: int) -> None:
        for one, row in self.rows.items():
            row.classes(add="open") if one == number else row.classes(remove="open")
        self.opened, self.beside = number, ""
        await self._show()

    async def _show(self) -> None:
        if self.opened is None:
            return
        phase = self.phase.value
        found = await apart(open_episode, self.site, self.phases, phase, self.opened, self.beside)
        if found is None:
            return
        sides, others = found
        self.other.set_options({"": "nothing", **others}, value=self.beside)
        refill(self.sides, "episodes_sides", sides=sides)
        ui.navigate.history.replace(f"{ROOT}/run/{self.run.path.name}/episodes?phase={phase}&episode={self.opened}")


def list_episodes(site: Site, path: Path, choice: Choice, page: int) -> Listed:
    with site.lock:
        index = site.episodes(path)
        index.read_on()
        numbers = index.chosen(choice)
        shown = tuple(numbers[page * PAGE_ROWS : (page + 1) * PAGE_ROWS])
        return Listed(shown, tuple(index.heads[n] for n in shown), len(numbers), len(index), index.at_end)


@dataclass(frozen=True)
class Side:
    title: str
    row: dict[str, Any]
    score: float | None
    parts: dict[str, float]


def open_episode(
    site: Site, phases: dict[str, Path], phase: str, number: int, beside: str
) -> tuple[list[Side], dict[str, str]] | None:
    """The episode and the one beside it; and what else there is of the same task, by `phase/number`."""
    with site.lock:
        index = site.episodes(phases[phase])
        if not 0 <= number < len(index):
            return None
        task = index.heads[number].task
        others = _others(site, phases, phase, number, task)
        wanted = [(phase, number)]
        if beside in others:
            place, _, other = beside.rpartition("/")
            wanted.append((place, int(other)))
        sides = []
        for place, one in wanted:
            among = site.episodes(phases[place])
            (row,) = among.rows([one])
            sides.append(Side(place, row, among.heads[one].score, score_parts(row)))
    return sides, others


def _others(site: Site, phases: dict[str, Path], phase: str, number: int, task: str) -> dict[str, str]:
    """Of the same phase the other episodes of the task, of an evaluation the other models' answers to it."""
    index = site.episodes(phases[phase])
    among = {phase: index}
    if index.heads[number].step is None:
        for name, path in phases.items():
            if path.name == phases[phase].name and name != phase:
                among[name] = site.episodes(path)
                among[name].read_on()
    found = {}
    for name, other in among.items():
        for one in other.of_task.get(task, [])[-MOST_BESIDE:]:
            if (name, one) != (phase, number):
                found[f"{name}/{one}"] = _told(name, other, one)
    return found


def _told(phase: str, index: EpisodeIndex, number: int) -> str:
    head = index.heads[number]
    score = "unscorable" if head.score is None else f"{head.score:.3f}"
    return f"{phase} {score}" if head.step is None else f"step {head.step}, number {number}: {score}"
