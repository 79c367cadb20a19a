"""What a run trains on, as tokens, with the targets in colour."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from nicegui import ui

from posttrain.chat.render import Renderer
from posttrain.data.shard import Shard
from posttrain.recipe.types import PreparePhase, Recipe
from posttrain.run.folder import RunFolder
from posttrain.serve.dashboard.frame import apart, button, frame, markup, page, refill, stepping
from posttrain.serve.dashboard.site import ROOT, Site, recipe_of, renderer_of

MOST_TOKENS = 6_000
"""Shown of one sequence."""


@dataclass(frozen=True)
class Stretch:
    text: str
    is_target: bool


@dataclass(frozen=True)
class Sequence:
    title: str
    stretches: tuple[Stretch, ...]
    tokens: int
    targets: int
    left_out: int


@dataclass(frozen=True)
class Item:
    """A sequence, a pair, or a task."""

    sequences: tuple[Sequence, ...]
    row: dict[str, Any] | None
    """Of a task or pair: its row."""


def pages(site: Site) -> None:
    @page("/run/{name}/data")
    def data_page(name: str, dataset: str | None = None, item: int = 1) -> None:
        run = site.run(name)
        with frame(f"{name}: data", name, "/data"):
            folders = prepared(run, recipe_of(run))
            if not folders:
                ui.label("No data yet: it comes with the prepare phase.").classes("note")
                return
            _Viewer(run, folders, dataset if dataset in folders else next(iter(folders)), item)


def prepared(run: RunFolder, recipe: Recipe) -> dict[str, Path]:
    """Folders of the datasets that are there, by name."""
    found = {}
    for phase in recipe.phases:
        for dataset in phase.datasets if isinstance(phase, PreparePhase) else ():
            folder = run.phase(phase.name).data / dataset.name
            if (folder / "dataset.json").is_file():
                found[dataset.name] = folder
    return found


class _Viewer:
    def __init__(self, run: RunFolder, folders: dict[str, Path], dataset: str, item: int) -> None:
        self.run, self.folders = run, folders
        with ui.element("div").classes("toolbar filters"):
            self.dataset = ui.select(list(folders), value=dataset, label="Dataset", on_change=lambda: self._go_to(1))
            self.item = ui.number("Item", value=item, min=1, precision=0, on_change=self.show)
            for one in (self.dataset, self.item):
                one.props("outlined dense")
            button("Previous", lambda: self._step(-1))
            button("Next", lambda: self._step(1))
        self.facts = markup()
        self.shown = markup("data_none")
        stepping(self._step)
        ui.timer(0.0, self.show, once=True)

    async def _step(self, count: int) -> None:
        await self._go_to(max(1, int(self.item.value or 1) + count))

    async def _go_to(self, item: int) -> None:
        if self.item.value == item:
            await self.show()
        self.item.set_value(item)

    async def show(self) -> None:
        name = self.dataset.value
        found = await apart(item_of, self.run, self.folders[name], int(self.item.value or 1))
        if found is None:
            return
        number, count, item, description = found
        self.item.max = count
        self.item.set_value(number)
        refill(self.facts, "data_facts", description=description, number=number, count=count)
        refill(self.shown, "data_item", item=item)
        ui.navigate.history.replace(f"{ROOT}/run/{self.run.path.name}/data?dataset={name}&item={number}")


@lru_cache(8)
def _shard(folder: Path, written: int) -> Shard:
    """`written`: the time of its description, so that one that was prepared again is opened again."""
    return Shard(folder)


def item_of(run: RunFolder, folder: Path, number: int) -> tuple[int, int, Item, dict[str, Any]]:
    """The item counted from 1, or the last one; with its number, how many there are, and the dataset's facts."""
    shard = _shard(folder, (folder / "dataset.json").stat().st_mtime_ns)
    count = shard.num_rows if shard.content in ("tasks", "pairs") else len(shard)
    number = min(max(1, number), count)
    place = number - 1
    if shard.content == "tasks":
        return number, count, Item((), shard.row(place)), shard.description
    render = renderer_of(run, recipe_of(run))
    if shard.content == "pairs":
        sides = tuple(
            _sequence(render, shard, 2 * place + side, title) for side, title in enumerate(("chosen", "rejected"))
        )
        return number, count, Item(sides, None), shard.description
    return number, count, Item((_sequence(render, shard, place, ""),), None), shard.description


def _sequence(render: Renderer, shard: Shard, number: int, title: str) -> Sequence:
    tokens, targets = shard.tokens(number).tolist(), shard.targets(number).tolist()
    shown = zip(tokens[:MOST_TOKENS], targets[:MOST_TOKENS], strict=True)
    runs = ((bool(target), [token for token, _ in pairs]) for target, pairs in groupby(shown, lambda pair: pair[1]))
    stretches = tuple(Stretch(render.text(numbers), target) for target, numbers in runs)
    return Sequence(title, stretches, len(tokens), sum(map(bool, targets)), max(0, len(tokens) - MOST_TOKENS))
