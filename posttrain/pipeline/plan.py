"""The plan of a run: what each phase will do and why, and what that needs. Reads files only."""

from dataclasses import dataclass
from typing import Literal

from posttrain.host import machine
from posttrain.phases.context import ModelState
from posttrain.pipeline.base import CACHE, FRESH, on_this_machine, resolve_base
from posttrain.pipeline.curriculum import open_gates, refuse_other_recipe
from posttrain.pipeline.estimate import Needs, Past, needs
from posttrain.pipeline.history import History, read_history
from posttrain.pipeline.sizes import ModelSize, model_size
from posttrain.pipeline.standing import Standing, survey
from posttrain.recipe.types import Execution, FolderBase, FreshBase, HubBase, Phase, Recipe
from posttrain.run.folder import RunFolder
from posttrain.run.journal import Journal

Will = Literal["run", "resume", "skip", "stop here", "not reached"]


@dataclass(frozen=True)
class PlannedPhase:
    phase: Phase
    will: Will
    reason: str
    needs: Needs


@dataclass(frozen=True)
class Plan:
    base: str
    phases: tuple[PlannedPhase, ...]
    disk_bytes: int
    memory_bytes: int
    seconds: float
    """Of the phases that were measured before."""
    unmeasured: int
    free_bytes: int
    machine_bytes: int

    @property
    def to_do(self) -> list[PlannedPhase]:
        return [row for row in self.phases if row.will in ("run", "resume")]


def plan_run(run: RunFolder, recipe: Recipe, execution: Execution) -> Plan:
    """The plan as of now; RunFolderError when the folder is another recipe's."""
    refuse_other_recipe(run, recipe)
    history = read_history(Journal(run.events))
    size = model_size(recipe, run)
    past = Past(run.path.parent, machine.facts())
    rows: list[PlannedPhase] = []
    for phase, found in zip(recipe.phases, _standings(run, recipe, history), strict=True):
        will, reason = _intention(phase, found, history, rows)
        rows.append(PlannedPhase(phase, will, reason, needs(recipe, phase, size, execution, past)))
    to_do = [row.needs for row in rows if row.will in ("run", "resume")]
    return Plan(
        base=_describe_base(recipe, size),
        phases=tuple(rows),
        disk_bytes=sum(need.disk_bytes for need in to_do),
        memory_bytes=max((need.memory_bytes or 0 for need in to_do), default=0),
        seconds=sum(need.seconds or 0 for need in to_do),
        unmeasured=sum(need.seconds is None for need in to_do),
        free_bytes=machine.free_bytes(run.path),
        machine_bytes=machine.memory_bytes(),
    )


def _standings(run: RunFolder, recipe: Recipe, history: History) -> list[Standing]:
    """A plan writes and downloads nothing: a base that is not there yet stands for itself without a digest."""
    fresh = isinstance(recipe.base, FreshBase) and not (run.path / FRESH).exists()
    far = isinstance(recipe.base, HubBase) and not (run.path / CACHE).exists() and not on_this_machine(recipe.base)
    if fresh or far:
        base = ModelState(base=FRESH, base_digest="", adapter=None, adapter_digest=None, phase="base")
    else:
        base = resolve_base(recipe, run)
    return list(survey(run, recipe, base, history).values())


def _intention(phase: Phase, found: Standing, history: History, before: list[PlannedPhase]) -> tuple[Will, str]:
    barred = next((row for row in before if row.will == "stop here"), None)
    if barred is not None:
        return "not reached", f"a hard gate of {barred.phase.name} failed"
    if found.todo == "skip":
        closed = open_gates(phase.name, found, history)
        return ("stop here", f"hard gate {', '.join(closed)} failed") if closed else ("skip", found.reason)
    if found.todo == "resume":
        return "resume", found.reason
    return "run", found.reason


def _describe_base(recipe: Recipe, size: ModelSize) -> str:
    millions = f"{size.parameters / 1e6:,.1f}M parameters" if size.parameters else "size not known"
    match recipe.base:
        case FreshBase():
            return f"fresh, {millions}"
        case HubBase(repo=repo):
            return f"{repo} on the hub, {millions}"
        case FolderBase(path=path):
            return f"{path}, {millions}"
