"""Trackers: the rows of `metrics.jsonl` and the metrics of results, told to TensorBoard, trackio or Weights & Biases.

Every value is `<phase>/<metric>`, over the phase's own steps. Nothing leaves the machine unless the tracker's own
environment says so: WANDB_MODE is `offline` by default, trackio and TensorBoard write files.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from posttrain.errors import MachineError
from posttrain.recipe.types import Recipe
from posttrain.run.folder import RunFolder

PROJECT = "posttrain"


class Library(Protocol):
    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, run: RunFolder, recipe: Recipe) -> None:
        from tensorboard.summary import Writer

        self.writer = Writer(str(run.path / "tensorboard"))

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{phase}/{name}", value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Trackio:
    def __init__(self, run: RunFolder, recipe: Recipe) -> None:
        import trackio

        self.run = trackio.init(project=PROJECT, name=run.path.name, resume="allow", config=dict(recipe.flags))

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{phase}/{name}": value for name, value in values.items()} | {f"{phase}/step": step})

    def close(self) -> None:
        self.run.finish()


class Wandb:
    def __init__(self, run: RunFolder, recipe: Recipe) -> None:
        import wandb

        self.run = wandb.init(
            project=PROJECT, name=run.path.name, dir=str(run.path), config=dict(recipe.flags), resume="allow"
        )
        for phase in recipe.phases:
            self.run.define_metric(f"{phase.name}/*", step_metric=f"{phase.name}/step")

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{phase}/{name}": value for name, value in values.items()} | {f"{phase}/step": step})

    def close(self) -> None:
        self.run.finish()


LIBRARIES: dict[str, Callable[[RunFolder, Recipe], Library]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


class Tracker:
    """One attempt's tracker; a library that fails is let go of with a warning, and the run goes on."""

    def __init__(self, name: str, run: RunFolder, recipe: Recipe, say: Callable[[str], None]) -> None:
        self.name, self.say = name, say
        self.backend: Library | None = None
        if name == "none":
            return
        try:
            self.backend = LIBRARIES[name](run, recipe)
        except ImportError as error:
            raise MachineError(f"--tracker {name}: {error}; pip install 'posttrain[track]'") from error

    def log(self, phase: str, step: int, row: Mapping[str, Any]) -> None:
        """The row's numbers."""
        values = {
            name: float(value) for name, value in row.items() if name != "step" and isinstance(value, int | float)
        }
        self._try(lambda library: library.log(phase, step, values))

    def close(self) -> None:
        self._try(lambda library: library.close())
        self.backend = None

    def _try(self, act: Callable[[Library], None]) -> None:
        if self.backend is None:
            return
        try:
            act(self.backend)
        except Exception as error:
            self.backend = None
            self.say(f"WARNING: {self.name} failed and is told nothing more: {type(error).__name__}: {error}")
