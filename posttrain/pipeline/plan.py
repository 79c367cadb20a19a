"""The plan of a run: what each phase will do and why, and what that needs. Reads files only."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.host import machine
from posttrain.phases.context import ModelState
from posttrain.pipeline.base import CACHE, FRESH, on_this_machine, resolve_base
from posttrain.pipeline.curriculum import open_gates, refuse_other_recipe
from posttrain.pipeline.estimate import Facts, Needs, Past, device_bytes, download_bytes, facts_of, needs
from posttrain.pipeline.history import History, read_history
from posttrain.pipeline.memory import Device, memory, place
from posttrain.pipeline.sizes import ModelSize
from posttrain.pipeline.standing import Standing, survey
from posttrain.recipe.check import TrainingPhase
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
class Room:
    """Memory of a device: what the phase there that needs most takes, and what there is."""

    device: Device
    needed_bytes: int
    there_bytes: int


@dataclass(frozen=True)
class Plan:
    base: str
    phases: tuple[PlannedPhase, ...]
    disk_bytes: int
    rooms: tuple[Room, ...]
    seconds: float
    """Of the phases that were measured before."""
    unmeasured: int
    free_bytes: int
    unknown: tuple[str, ...]
    """Sources whose rows are not known before they are read."""
    shortages: tuple[Shortage, ...]

    @property
    def to_do(self) -> list[PlannedPhase]:
        return [row for row in self.phases if row.will in ("run", "resume")]


def disk_shortage(needed: int, free: int, execution: Execution) -> Iterator[Shortage]:
    if needed > free:
        said = f"about {needed / 1e9:.1f} GB are needed, {(needed - free) / 1e9:.1f} GB more than there are"
        fewer = "--keep-checkpoints 1, " if execution.keep_checkpoints > 1 else ""
        yield Shortage("disk", said, f"{fewer}fewer export formats, or --runs-dir on another disk")


def memory_shortage(recipe: Recipe, phase: Phase, facts: Facts, execution: Execution) -> Iterator[Shortage]:
    """What does not fit, with the options that make it fit."""
    device = place(phase, facts.device)
    there = device_bytes(device, execution)
    need = memory(recipe, phase, facts.size, execution, facts.device, facts.rows)
    if need is not None and need.total > there:
        where = "the GPU" if device == "cuda" else "the machine"
        said = (
            f"{phase.name} needs about {need.total / 1e9:.1f} GB, {there / 1e9:.1f} are there on {where}; its largest "
            f"part is {need.largest}"
        )
        yield Shortage("memory", said, remedy(recipe, phase, facts, execution, there))


def remedy(recipe: Recipe, phase: Phase, facts: Facts, execution: Execution, there: int) -> str:
    """The first option that is enough, else all that make it smaller, and what is left to change where they are not."""

    def needed(changed: Execution) -> int:
        found = memory(recipe, phase, facts.size, changed, facts.device, facts.rows)
        return found.total if found else 0

    for words, update in ways():
        if needed(execution.model_copy(update=update)) <= there:
            return words
    taken: dict[str, str] = {}
    for words, update in ways():
        changed = execution.model_copy(update=update)
        if needed(changed) < needed(execution):
            execution = changed
            taken[words.split()[0]] = words
        if needed(execution) <= there:
            return " ".join(taken.values())
    rest = ["another base, or a machine with more"]
    if isinstance(phase, TrainingPhase):
        rest.insert(0, "a smaller rank in the recipe's Lora, moments of 8 bits in its optimizer")
    return ", then ".join([" ".join(taken.values()), *rest] if taken else rest)


def ways() -> Iterator[tuple[str, dict[str, Any]]]:
    """Options that make memory smaller, those that cost least first."""
    yield "--base-weights packed", {"base_weights": "packed"}
    yield "--recompute full", {"recompute": "full"}
    yield "--mlp-tile-tokens 2048", {"mlp_tile_tokens": 2048}
    for power in (16, 15, 14, 13, 12):
        yield f"--micro-batch-tokens {2**power}", {"micro_batch_tokens": 2**power}
    for power in (15, 14, 13):
        yield f"--rollout-tokens {2**power}", {"rollout_tokens": 2**power}
    yield "--activation-offload cpu", {"activation_offload": "cpu"}


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
    to_do = [row for row in rows if row.will in ("run", "resume")]
    disk = sum(row.needs.disk_bytes for row in to_do) + download_bytes(recipe, run, facts.size)
    free = machine.free_bytes(run.path)
    short = (one for row in to_do for one in memory_shortage(recipe, row.phase, facts, execution))
    return Plan(
        base=_describe_base(recipe, facts.size),
        phases=tuple(rows),
        disk_bytes=disk,
        rooms=tuple(_rooms(to_do, facts.device, execution)),
        seconds=sum(row.needs.seconds or 0 for row in to_do),
        unmeasured=sum(row.needs.seconds is None for row in to_do),
        free_bytes=free,
        unknown=tuple(sorted({name for data in facts.rows.values() for name in data.unknown})),
        shortages=(*disk_shortage(disk, free, execution), *short),
    )


def _rooms(to_do: list[PlannedPhase], device: Device, execution: Execution) -> Iterator[Room]:
    places: tuple[Device, ...] = (device, "cpu")
    for where in dict.fromkeys(places):
        needs = [row.needs.memory for row in to_do if place(row.phase, device) == where]
        needed = max((need.total for need in needs if need), default=0)
        if needed or where == device:
            yield Room(where, needed, device_bytes(where, execution))


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
