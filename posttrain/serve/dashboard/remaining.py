"""How long a run will still take: the phase at hand by its own pace, the ones after it as they took before."""

import re
import time
from dataclasses import dataclass

from posttrain.host import machine
from posttrain.pipeline.estimate import Past
from posttrain.pipeline.watch import read_heartbeat
from posttrain.recipe.types import Execution, Recipe
from posttrain.report.read import PhaseRecord, RunRecord
from posttrain.run.folder import RunFolder

PROGRESS = re.compile(r": ([\d,]+)/([\d,]+) (\w+)$")
"""How a heartbeat says how far it is."""
READ_PAST_EVERY_S = 60.0


@dataclass(frozen=True)
class Remaining:
    seconds: float
    unmeasured: tuple[str, ...]
    """Phases that no run here ever took, and that say nothing of their pace."""


@dataclass(frozen=True)
class Progress:
    done: int
    total: int
    unit: str


def progress_of(run: RunFolder, phase: str) -> Progress | None:
    """What the phase that runs says of itself."""
    beat = read_heartbeat(run)
    found = PROGRESS.search(beat.doing) if beat and beat.doing.startswith(phase) else None
    return Progress(int(found[1].replace(",", "")), int(found[2].replace(",", "")), found[3]) if found else None


class Clock:
    """Keeps what the runs of a folder took, read again after a while."""

    def __init__(self) -> None:
        self._past: Past | None = None
        self._read = 0.0

    def past(self, run: RunFolder) -> Past:
        if self._past is None or time.monotonic() - self._read > READ_PAST_EVERY_S:
            self._past, self._read = Past(run.path.parent, machine.facts()), time.monotonic()
        return self._past

    def remaining(self, run: RunFolder, recipe: Recipe, record: RunRecord, seconds_per_step: float | None) -> Remaining:
        """`seconds_per_step`: of the phase that runs, where it has steps."""
        attempts = record.manifest.get("attempts") or [{}]
        execution = Execution.model_validate(attempts[-1].get("execution") or {})
        total, unmeasured = 0.0, []
        for phase, found in zip(recipe.phases, record.phases, strict=True):
            if found.complete:
                continue
            steps = getattr(phase, "steps", None)
            past, _ = self.past(run).seconds(recipe, phase, execution, steps if isinstance(steps, int) else None)
            left = _of_running(run, found, seconds_per_step, past) if found.status == "running" else past
            if left is None:
                unmeasured.append(found.name)
            total += left or 0.0
        return Remaining(total, tuple(unmeasured))


def _of_running(run: RunFolder, phase: PhaseRecord, seconds_per_step: float | None, past: float | None) -> float | None:
    progress = progress_of(run, phase.name)
    if progress is not None and progress.unit == "steps" and seconds_per_step is not None:
        return (progress.total - progress.done) * seconds_per_step
    return max(0.0, past - (phase.seconds or 0.0)) if past is not None else None
