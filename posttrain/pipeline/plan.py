"""The plan of a run: what each phase will do and why, and what that needs. Reads files only."""

from dataclasses import dataclass
from typing import Literal

from posttrain.host import machine
from posttrain.phases.context import ModelState
from posttrain.pipeline.base import CACHE, FRESH, on_this_machine, resolve_base
from posttrain.pipeline.curriculum import open_gates, refuse_other_recipe
from posttrain.pipeline.estimate import Needs, Past, device_bytes, download_bytes, facts_of, needs
from posttrain.pipeline.history import History, read_history
from posttrain.pipeline.memory import Device
from posttrain.pipeline.sizes import ModelSize
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
class Shortage:
    """What the run needs and this machine does not have."""

    what: Literal["disk", "memory"]
    said: str
    field: str
    """The option or field to change."""


@dataclass(frozen=True)
class Plan:
    base: str
    phases: tuple[PlannedPhase, ...]
    disk_bytes: int
    memory_bytes: int
    """Of the phase that needs most."""
    device: Device
    seconds: float
    """Of the phases that were measured before."""
    unmeasured: int
    free_bytes: int
    machine_bytes: int
    """Memory of the device."""
    unknown: tuple[str, ...]
    """Sources whose rows are not known before they are read."""
    execution: Execution

    @property
    def to_do(self) -> list[PlannedPhase]:
        return [row for row in self.phases if row.will in ("run", "resume")]

    @property
    def shortages(self) -> list[Shortage]:
        """What does not fit, with what to change."""
        found = []
        if self.disk_bytes > self.free_bytes:
            missing = (self.disk_bytes - self.free_bytes) / 1e9
            said = f"about {self.disk_bytes / 1e9:.1f} GB are needed, {missing:.1f} GB more than there are"
            fewer = "--keep-checkpoints 1, " if self.execution.keep_checkpoints > 1 else ""
            found.append(Shortage("disk", said, f"{fewer}fewer export formats, or --runs-dir on another disk"))
        for row in self.to_do:
            need = row.needs.memory
            if need is not None and need.total > self.machine_bytes:
                sizes = f"about {need.total / 1e9:.1f} GB, {self.machine_bytes / 1e9:.1f} are there"
                said = f"{row.phase.name} needs {sizes}; its largest part is {need.largest}"
                found.append(Shortage("memory", said, remedy(need.largest, self.execution)))
        return found


def remedy(part: str, execution: Execution) -> str:
    """What to change where this part of the memory is too large; what is already so is left out."""
    match part:
        case "weights":
            ways = ["--base-weights packed for an MXFP4 base"] if execution.base_weights == "unpacked" else []
            ways += ["another base", "a machine with more"]
        case "activations":
            ways = ["--recompute full"] if execution.recompute != "full" else []
            ways += ["--mlp-tile-tokens 2048"] if execution.mlp_tile_tokens is None else []
            ways += ["a smaller --micro-batch-tokens"]
        case "cache":
            ways = ["fewer --rollout-tokens"]
        case _:
            ways = ["a smaller rank in the recipe's Lora", "moments of 8 bits in its optimizer"]
    return ", then ".join(ways)


def plan_run(run: RunFolder, recipe: Recipe, execution: Execution) -> Plan:
    """The plan as of now; RunFolderError when the folder is another recipe's."""
    refuse_other_recipe(run, recipe)
    history = read_history(Journal(run.events))
    facts = facts_of(recipe, run, execution)
    past = Past(run.path.parent, machine.facts())
    rows: list[PlannedPhase] = []
    for phase, found in zip(recipe.phases, _standings(run, recipe, history), strict=True):
        will, reason = _intention(phase, found, history, rows)
        rows.append(PlannedPhase(phase, will, reason, needs(recipe, phase, facts, execution, past)))
    to_do = [row.needs for row in rows if row.will in ("run", "resume")]
    return Plan(
        base=_describe_base(recipe, facts.size),
        phases=tuple(rows),
        disk_bytes=sum(need.disk_bytes for need in to_do) + download_bytes(recipe, run, facts.size),
        memory_bytes=max((need.memory.total for need in to_do if need.memory), default=0),
        device=facts.device,
        seconds=sum(need.seconds or 0 for need in to_do),
        unmeasured=sum(need.seconds is None for need in to_do),
        free_bytes=machine.free_bytes(run.path),
        machine_bytes=device_bytes(facts.device, execution),
        unknown=tuple(sorted({name for data in facts.rows.values() for name in data.unknown})),
        execution=execution,
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
