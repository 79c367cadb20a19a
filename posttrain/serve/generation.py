"""Models by name, and which of them are in memory.

`generation.model(name)` may wait for one to be loaded: in a coroutine call it through a thread, such as
`starlette.concurrency.run_in_threadpool`. How a model is asked: `posttrain.serve.answers`.
"""

import gc
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from posttrain.chat.render import renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.engine import adapters
from posttrain.errors import InputError, MachineError, ModelError
from posttrain.phases.chosen_model import ChosenModel, of_run
from posttrain.pipeline.base import resolve_base
from posttrain.rollout.live import Live, Worker
from posttrain.run import recipe_file
from posttrain.run.folder import NAME, RunFolder
from posttrain.serve.answers import Model
from posttrain.serve.asking import UnknownModel
from posttrain.serve.settings import ServedModels

Key = tuple[Any, ...]
"""What a model in memory was made from, and when that was written."""
MOST_BASES = 2
"""Weights in memory: of the model that is asked, and of the one beside it. Adapters share those of their base."""


@dataclass
class Base:
    """Weights in memory, and what is asked of them: bare, or with an adapter that shares them."""

    model: Any
    asked: dict[Key, Model] = field(default_factory=dict)


class Generation:
    def __init__(self, runs_dir: Path, served: ServedModels) -> None:
        self.runs_dir, self.served = runs_dir, served
        self._adapters: dict[str, tuple[ChosenModel, Key]] = {}
        """Those that were loaded by name. Their folders may be gone by now."""
        self._bases: OrderedDict[Key, Base] = OrderedDict()
        self._changing = threading.Lock()
        self._worker = Worker()

    def close(self) -> None:
        """End the thread that owns the models; whoever waits for an answer is told."""
        self._worker.close()

    # ------------------------------------------------------------ names

    def models(self) -> list[str]:
        """The first model, adapters, models that belong to no run, and every run with a finished phase; each with
        its base."""
        names = [] if self.served.first is None else [self.served.first]
        names += [*self._adapters, *self.served.folders]
        for result in sorted(self.runs_dir.glob("*/phases/*/result.json")):
            if NAME.fullmatch(result.parents[2].name):
                names.append(result.parents[2].name)
        beside = [f"{name.partition('/')[0]}/base" for name in names if not self._is_bare(name)]
        return list(dict.fromkeys([*names, *beside]))

    def _is_bare(self, name: str) -> bool:
        folder = self.served.folders.get(name)
        return name in self._adapters or name.endswith("/base") or (folder is not None and folder.adapter is None)

    def chosen(self, name: str) -> ChosenModel:
        """RUN or RUN/STATE, a folder's name or that and `/base`, an adapter's; raises UnknownModel."""
        if name in self._adapters:
            return self._adapters[name][0]
        start, _, state = name.partition("/")
        if start in self.served.folders:
            if state in ("", "base"):
                return _bare(self.served.folders[start]) if state else self.served.folders[start]
        elif NAME.fullmatch(start) and (run := RunFolder.named(self.runs_dir, start)).recipe.is_file():
            try:
                return of_run(run, resolve_base(recipe_file.load(run.recipe), run), state or None)
            except InputError as error:
                raise UnknownModel(str(error)) from None
        raise UnknownModel(f"the model {name!r} does not exist; GET /v1/models lists those that do")

    # ------------------------------------------------------------ adapters

    def load_adapter(self, name: str, folder: Path, replaced: bool = False) -> None:
        """Serve this PEFT folder on the first model's base as `name`; raises ModelError, InputError."""
        if self.served.first is None:
            raise InputError("this server has no model of its own to put adapters on: start it with --model")
        with self._changing:
            taken = name in self.models() if name not in self._adapters else not replaced
            if taken:
                raise InputError(f"the name {name!r} is taken; unload it first, or load it in place")
            chosen = replace(_bare(self.chosen(self.served.first)), adapter=folder)
            key = _key(chosen)
            self._load(chosen, key)
            self._adapters[name] = chosen, key

    def unload_adapter(self, name: str) -> None:
        if name not in self._adapters:
            raise UnknownModel(f"the adapter {name!r} is not loaded")
        _, key = self._adapters.pop(name)
        for base in self._bases.values():
            base.asked.pop(key, None)

    # ------------------------------------------------------------ memory

    def model(self, name: str) -> Model:
        """The model of this name, brought into memory if need be; raises UnknownModel, ModelError, MachineError."""
        chosen = self.chosen(name)
        return self._load(chosen, self._adapters[name][1] if name in self._adapters else _key(chosen))

    def _load(self, chosen: ChosenModel, key: Key) -> Model:
        return self._worker.call(lambda: self._held(chosen, key)).result()

    def _held(self, chosen: ChosenModel, key: Key) -> Model:
        """In the thread that owns the models."""
        # A checkpoint may hold all weights, so that nothing is shared with its base.
        bare = chosen if chosen.checkpoint else _bare(chosen)
        place = _key(bare)
        if place not in self._bases:
            self._make_room(MOST_BASES - 1)
            try:
                model = bare.load(self.served.execution, self.served.precision)
            except MachineError:
                if not self._bases:
                    raise
                self._make_room(0)
                model = bare.load(self.served.execution, self.served.precision)
            self._bases[place] = Base(model)
        self._bases.move_to_end(place)
        base = self._bases[place]
        if key not in base.asked:
            model = base.model
            if chosen is not bare and chosen.adapter is not None:
                model = adapters.beside(model, chosen.adapter)
            base.asked[key] = self._ready(model, chosen)
        return base.asked[key]

    def _ready(self, model: Any, chosen: ChosenModel) -> Model:
        tokenizer = Tokenizer.load(chosen.base)
        budget = self.served.execution.rollout_tokens
        context = min(int(model.config.max_position_embeddings), budget)
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        live = Live(model, self.served.precision, budget)
        end = model.generation_config.eos_token_id
        ends = frozenset(end if isinstance(end, list) else [] if end is None else [end])
        return Model(self._worker, live, renderer(chosen.chat, tokenizer), tokenizer, context, vocabulary, ends)

    def _make_room(self, kept: int) -> None:
        """Forget the models that were not asked for longest; answers that are being written are finished."""
        if len(self._bases) <= kept:
            return
        while len(self._bases) > kept:
            self._bases.popitem(last=False)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _bare(chosen: ChosenModel) -> ChosenModel:
    return replace(chosen, adapter=None, checkpoint=None, fresh=None)


def _key(chosen: ChosenModel) -> Key:
    folders = [folder for folder in (chosen.base, chosen.adapter, chosen.checkpoint) if folder is not None]
    try:
        written = [(folder, folder.stat().st_mtime_ns) for folder in folders]
    except OSError as error:
        raise ModelError(f"{chosen.name}: {error.filename} cannot be read: {error.strerror}") from None
    return (chosen.chat.model_dump_json(), *written)
