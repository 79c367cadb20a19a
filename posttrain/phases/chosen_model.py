"""The model that a command means: a state or a checkpoint of a run, or a model folder, with its chat format."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from posttrain.chat.render import renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.engine import adapters, checkpoint
from posttrain.engine.device import fuse_layers, prepare_device
from posttrain.engine.model import hold_frozen, load_model
from posttrain.errors import InputError, ModelError
from posttrain.phases.context import ModelState
from posttrain.phases.export_command import best_state, results_of
from posttrain.recipe.spelling import did_you_mean
from posttrain.recipe.types import ChatFormat, Effort, Execution, HarmonyFormat, Lora, Precision, Recipe, TemplateFormat
from posttrain.recipes.quickstart import CHAT
from posttrain.run import recipe_file
from posttrain.run.folder import RunFolder, digest_folder


@dataclass(frozen=True)
class ChosenModel:
    """A base, at most one adapter on it, and at most one checkpoint of a phase that began with them."""

    name: str
    """The run or the folder."""
    state: str
    base: Path
    adapter: Path | None
    chat: ChatFormat
    checkpoint: Path | None = None
    fresh: Lora | None = None
    """The adapter that the checkpoint's phase began."""

    def with_effort(self, effort: Effort | None) -> "ChosenModel":
        """With this reasoning effort for conversations that name none; InputError where the format has none."""
        if effort is None:
            return self
        if not isinstance(self.chat, HarmonyFormat):
            raise InputError(f"--effort {effort}: {self.name} is asked in {self.chat.kind}, which has no such setting")
        return replace(self, chat=self.chat.model_copy(update={"reasoning_effort": effort}))

    def load(self, execution: Execution, precision: Precision) -> PreTrainedModel:
        """Ready to sample from, where and how the execution says."""
        model = load_model(
            self.base,
            self.adapter,
            device=prepare_device(execution, precision),
            precision=precision,
            packed=execution.base_weights == "packed",
        )
        if self.fresh is not None:
            adapters.attach(model, self.fresh)
        if self.checkpoint is not None:
            checkpoint.load_weights(self.checkpoint, model)
        hold_frozen(model, precision)
        fuse_layers(model, precision)
        return model

    def digests(self) -> dict[str, str | None]:
        folders = {"base": self.base, "adapter": self.adapter, "checkpoint": self.checkpoint}
        return {name: digest_folder(folder) if folder else None for name, folder in folders.items()}


def of_run(run: RunFolder, base: ModelState, asked: str | None) -> ChosenModel:
    """A state by its phase's name, `base`, or `PHASE/checkpoint-N`; without one, what an export would take."""
    recipe = recipe_file.load(run.recipe)
    results = results_of(run, recipe)
    states = {"base": base} | {
        name: ModelState.model_validate(result["state"]) for name, result in results.items() if result["state"]
    }
    name = asked or (best_state(recipe, results) or ("base", ""))[0]
    if "/" in name:
        return _checkpoint(run, recipe, states, name)
    if name not in states:
        near = did_you_mean(name, states)
        raise InputError(
            f"run {run.path.name!r} has no model state {name!r}{near}; it has {', '.join(states)}; "
            f"a checkpoint is PHASE/checkpoint-N{_listed(run, recipe)}"
        )
    return ChosenModel(run.path.name, name, *_folders(run, states[name]), recipe.chat)


def _folders(run: RunFolder, state: ModelState) -> tuple[Path, Path | None]:
    return run.model_folder(state.base), None if state.adapter is None else run.model_folder(state.adapter)


def _checkpoint(run: RunFolder, recipe: Recipe, states: dict[str, ModelState], name: str) -> ChosenModel:
    phase_name, _, folder_name = name.partition("/")
    phase = next((phase for phase in recipe.phases if phase.name == phase_name), None)
    folder = run.phase(phase_name).path / folder_name
    trainable = getattr(phase, "trainable", None)
    if trainable is None or folder not in checkpoint.by_step(run.phase(phase_name).path):
        raise InputError(f"run {run.path.name!r} has no checkpoint {name!r}{_listed(run, recipe)}")
    before = states[phase.model]  # type: ignore[union-attr]
    fresh = trainable if isinstance(trainable, Lora) else None
    return ChosenModel(run.path.name, name, *_folders(run, before), recipe.chat, folder, fresh)


def _listed(run: RunFolder, recipe: Recipe) -> str:
    found = [
        f"{phase.name}/{path.name}"
        for phase in recipe.phases
        for path in checkpoint.by_step(run.phase(phase.name).path)
    ]
    return f"; checkpoints: {', '.join(found) or 'none is kept'}"


def of_folder(name: str, folder: Path, adapter: Path | None) -> ChosenModel:
    """A model folder, or an adapter folder on the base that it names, in the chat format of its tokenizer."""
    if (folder / "adapter_config.json").is_file():
        if adapter is not None:
            raise InputError(f"{folder} is an adapter already; --adapter needs a model folder before it")
        named = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path") or ""
        folder, adapter = RunFolder(Path()).model_folder(named), folder
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{adapter} is an adapter on {named!r}, which is no folder here: name the base, and --adapter {adapter}"
            )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no model folder: it has no config.json")
    return ChosenModel(name, "model", folder, adapter, own_format(folder))


def own_format(folder: Path) -> ChatFormat:
    """Harmony for a GPT-OSS, else the template in the folder, with reasoning where it has a place for it."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if config.get("model_type") == "gpt_oss":
        return CHAT
    tokenizer = Tokenizer.load(folder)
    common: dict[str, Any] = {"kind": "template", "template": None, "date": CHAT.date, "variables": {}}
    try:
        chat = TemplateFormat(reasoning="template", **common)
        renderer(chat, tokenizer)
    except ModelError:
        chat = TemplateFormat(reasoning="dropped", **common)
        renderer(chat, tokenizer)
    return chat
