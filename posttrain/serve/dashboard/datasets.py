"""Registered datasets: what is in them, what they were made from, and which runs read them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from nicegui import ui

from posttrain.data.registry import Registry, Stored
from posttrain.data.shard import line_starts
from posttrain.report.read import listing, mapping, read_object
from posttrain.run.existing import run_names
from posttrain.run.folder import RunFolder
from posttrain.serve.dashboard.data import Item
from posttrain.serve.dashboard.frame import apart, button, frame, markup, page, refill, stepping, watched
from posttrain.serve.dashboard.site import ROOT, Site
from posttrain.serve.datasets import find_dataset

LOOK_EVERY_S = 5.0


@dataclass(frozen=True)
class Lineage:
    ancestors: tuple[Stored, ...]
    """The oldest first."""
    lost: str | None
    """The ancestor that is not in the registry."""
    children: tuple[str, ...]
    runs: tuple[str, ...]


def pages(site: Site) -> None:
    @page("/datasets")
    def datasets_page() -> None:
        with frame("Datasets", here="datasets"):
            watched("datasets", lambda: all_datasets(site), LOOK_EVERY_S)

    @page("/dataset/{key}")
    def dataset_page(key: str, row: int = 1) -> None:
        stored = find_dataset(site.settings.registry, key)
        rows = stored.manifest["counts"]["rows"]

        def step(by: int) -> None:
            number.set_value(min(max(1, int(number.value or 1) + by), rows))

        with frame(stored.key, here="datasets"):
            lineage = markup()
            with ui.element("div").classes("toolbar filters"):
                number = ui.number("Row", value=row, min=1, max=rows, precision=0).props("outlined dense")
                button("Previous", lambda: step(-1))
                button("Next", lambda: step(1))
            shown = markup("data_none")

            async def show() -> None:
                item = await apart(row_of, stored, int(number.value or 1))
                if item is not None:
                    refill(shown, "data_item", item=item)
                    ui.navigate.history.replace(f"{ROOT}/dataset/{key}?row={int(number.value or 1)}")

            async def begin() -> None:
                found = await apart(lineage_of, site, stored)
                if found is not None:
                    refill(lineage, "dataset", stored=stored, lineage=found)
                await show()

            number.on_value_change(show)
            stepping(step)
            ui.timer(0.0, begin, once=True)


@lru_cache(4096)
def _found(registry: Registry, key: str) -> Stored:
    """A version is never written twice, so what was read of it stays true."""
    return registry.find(key)


def all_datasets(site: Site) -> list[Stored]:
    registry = site.settings.registry
    return [_found(registry, key) for key in registry.all_keys()]


def lineage_of(site: Site, stored: Stored) -> Lineage:
    ancestors: list[Stored] = []
    lost, parent = None, stored.manifest.get("parent")
    keys = set(site.settings.registry.all_keys())
    while parent:
        if parent["key"] not in keys:
            lost = str(parent["key"])
            break
        ancestors.insert(0, _found(site.settings.registry, parent["key"]))
        parent = ancestors[0].manifest.get("parent")
    children = [one.key for one in all_datasets(site) if (one.manifest.get("parent") or {}).get("key") == stored.key]
    return Lineage(tuple(ancestors), lost, tuple(children), tuple(_runs_reading(site, stored.key)))


def _runs_reading(site: Site, key: str) -> Iterator[str]:
    """Runs whose recipe names the dataset as a source."""
    for name in run_names(site.settings.runs_dir):
        recipe = mapping(read_object(RunFolder(site.settings.runs_dir / name).recipe, {}).get("recipe"))
        datasets = [each for phase in listing(recipe.get("phases")) for each in listing(mapping(phase).get("datasets"))]
        sources = [source for each in datasets for source in listing(mapping(each).get("sources"))]
        if any(mapping(source).get("dataset") == key for source in sources):
            yield name


@lru_cache(16)
def _rows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The file's bytes, and where its lines begin."""
    text = np.memmap(path, np.uint8, "r")
    return text, line_starts(text)


def row_of(stored: Stored, number: int) -> Item:
    """A row, counted from 1; the last one where there are fewer."""
    text, starts = _rows(stored.rows)
    place = min(max(1, number), len(starts) - 1) - 1
    return Item((), json.loads(text[starts[place] : starts[place + 1]].tobytes()))
