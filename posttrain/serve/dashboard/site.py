"""What the pages share: where things are, and what was read of large files so far."""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastapi import FastAPI
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from posttrain.chat.render import Renderer, renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.pipeline.base import CACHE
from posttrain.recipe.types import Recipe
from posttrain.report import curves, words
from posttrain.report.episodes import EpisodeIndex
from posttrain.report.page import last_request, transcript
from posttrain.report.read import read_object
from posttrain.report.steps import StepColumns
from posttrain.run import recipe_file
from posttrain.run.existing import run_names
from posttrain.run.folder import RunFolder
from posttrain.run.lock import holder
from posttrain.serve import control
from posttrain.serve.dashboard import messages
from posttrain.serve.settings import Settings

ROOT = "/dashboard"
"""Where the pages lie on the server, without its name: a tunnel may give it another one."""
Value = TypeVar("Value")
FOLDER = Path(__file__).parent


class Recent(Generic[Value]):
    """The last few things that were made, by key."""

    def __init__(self, make: Callable[[Path], Value], most: int) -> None:
        self.make, self.most = make, most
        self._kept: OrderedDict[Path, Value] = OrderedDict()

    def __call__(self, key: Path) -> Value:
        if key not in self._kept:
            self._kept[key] = self.make(key)
        self._kept.move_to_end(key)
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)
        return self._kept[key]


@dataclass
class Site:
    app: FastAPI
    settings: Settings
    steps: Recent[StepColumns] = field(default_factory=lambda: Recent(StepColumns, 64))
    episodes: Recent[EpisodeIndex] = field(default_factory=lambda: Recent(EpisodeIndex, 16))
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held while an index is read on or asked: pages look from threads."""
    _states: dict[str, tuple[Any, control.RunState]] = field(default_factory=dict)

    def run(self, name: str) -> RunFolder:
        return control.run_of(self.settings, name)

    def run_states(self) -> list[control.RunState]:
        """Of all runs, newest first; what did not change since the last look is not read again."""
        found = []
        for name in run_names(self.settings.runs_dir):
            run = RunFolder(self.settings.runs_dir / name)
            held = holder(run) is not None
            stamp = (held, _stamp(run.events), _stamp(run.manifest))
            if held or self._states.get(name, (None,))[0] != stamp:
                self._states[name] = (stamp, control.state_of(run))
            found.append(self._states[name][1])
        return sorted(found, key=lambda state: state.created or time.time(), reverse=True)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def renderer_of(run: RunFolder, recipe: Recipe) -> Renderer:
    """Of the run's chat format, over the tokenizer of its base."""
    place = str(read_object(run.path / CACHE, {}).get("place") or getattr(recipe.base, "path", "base"))
    return _renderer(recipe, run.model_folder(place))


@cache
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def _renderer(recipe: Recipe, folder: Path) -> Renderer:
    return renderer(recipe.chat, _tokenizer(folder))


def recipe_of(run: RunFolder) -> Recipe:
    return recipe_file.load(run.recipe)


def readable(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


@cache
def _fragments() -> Environment:
    """Everything that comes from a file or a model is escaped here, and nowhere else made into markup."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"words": words, "curves": curves, "root": ROOT, "messages_of": messages.split}
    environment.filters |= {
        "visible": messages.visible,
        "transcript": transcript,
        "last_request": last_request,
        "readable": readable,
    }
    return environment


def fragment(name: str, **given: Any) -> Markup:
    """The template `name.html.j2` of this folder, filled in."""
    text = _fragments().get_template(f"{name}.html.j2").render(**given)
    # A model can write half a surrogate pair; no message to a browser can hold one.
    return Markup(text.encode("utf-8", "replace").decode())
