"""What a phase is given and what it hands back. No torch here: the pipeline reads this file."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from posttrain.recipe.types import Execution, Phase, PreparePhase, Recipe
from posttrain.run.folder import PhaseFolder, RunFolder
from posttrain.run.journal import Journal

MICRO_BATCH_TOKENS = 8192
"""Where neither the execution nor the recipe says."""


class ModelState(BaseModel):
    """A base and at most one adapter on it. Paths are relative to the run folder unless absolute or `shipped:`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    base_digest: str
    adapter: str | None
    adapter_digest: str | None
    phase: str
    """The phase that made it, or `base`."""


class Progress(Protocol):
    """One line of progress with rate and time left; used as a context manager."""

    def __enter__(self) -> "Progress": ...
    def __exit__(self, *exc: object) -> None: ...
    def advance(self, amount: float = 1, **shown: float | str) -> None: ...


@dataclass(frozen=True)
class PhaseContext:
    recipe: Recipe
    execution: Execution
    run: RunFolder
    folder: PhaseFolder
    fingerprint: str
    """Digest of the phase's specification and inputs; checkpoints and caches carry it."""
    states: dict[str, ModelState]
    """Model states by phase name; `base` is the recipe's base."""
    results: dict[str, dict[str, Any]]
    """`result.json` of every completed earlier phase, by name."""
    journal: Journal
    progress: Callable[[str, float, str, float], Progress]
    """progress(label, total, unit, done_already)."""
    stop_requested: Callable[[], bool]
    """Polled between steps: save, then raise `Stopped`."""
    say: Callable[[str], None]
    """One line to the terminal and the attempt's log."""
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext
    """Within, a request to stop raises `Stopped` at once: for work that leaves nothing half-done when broken off."""
    track: Callable[[str, int, Mapping[str, Any]], None] = lambda phase, step, row: None
    """track(phase, step, the step's row of metrics)."""
    prepared_only: bool = False
    """Datasets that are not prepared yet are not made."""

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one pass of this phase: what the execution says, else what the recipe suggests, else a default.

        Smaller where memory ran out in an earlier attempt at the same phase.
        """
        suggested = self.recipe.suggested.micro_batch_tokens.get(self.folder.path.name)
        asked = self.execution.micro_batch_tokens or suggested or MICRO_BATCH_TOKENS
        ran_out = [
            event["then"]
            for event in self.journal.read()
            if event.get("event") == "out_of_memory"
            and event.get("fingerprint") == self.fingerprint
            and "then" in event
        ]
        return min([asked, *ran_out])

    def base_folder(self, state: ModelState) -> Path:
        return self.run.model_folder(state.base)

    def adapter_folder(self, state: ModelState) -> Path | None:
        return None if state.adapter is None else self.run.model_folder(state.adapter)

    def dataset_folder(self, name: str) -> Path:
        """The prepared dataset `name`; the recipe's check has made sure that one prepare phase makes it."""
        for phase in self.recipe.phases:
            if isinstance(phase, PreparePhase) and any(dataset.name == name for dataset in phase.datasets):
                return self.run.phase(phase.name).data / name
        raise KeyError(name)


@dataclass(frozen=True)
class PhaseOutcome:
    """What a phase made. The pipeline digests `outputs`, judges the gates and writes `result.json`."""

    outputs: tuple[Path, ...]
    """Files and folders inside the phase's folder that later phases read."""
    metrics: dict[str, float]
    counts: dict[str, int]
    """Everything dropped, skipped or left unscored, and how much there was."""
    state: ModelState | None = None
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    """Kind-specific facts for the report (export tables, chosen candidate, dataset digests). What `unfinished` names
    failed without failing the run: the phase is carried out again by the next attempt."""
    skipped: bool = False
    """Nothing was done, so that there is nothing for the gates to judge."""


def handed_on(state: ModelState, reason: str) -> PhaseOutcome:
    """The outcome of a training phase that is skipped: the model state it was given."""
    return PhaseOutcome((), {}, {}, state, notes=(f"skipped: {reason}",), skipped=True)


PhaseFunction = Callable[[PhaseContext, Phase], PhaseOutcome]
