"""The state machine: phases in order, each skipped, resumed or started; gates after each; the report at the end.

State lives in the run folder alone (`history`, `results`), so that a kill between any two lines loses nothing.
"""

import importlib
import shutil
import time
from dataclasses import dataclass, field

from posttrain.errors import GateFailed, InputError, PhaseFault, RunFolderError, Stopped
from posttrain.host import machine
from posttrain.phases.context import ModelState, PhaseContext, PhaseFunction, PhaseOutcome, handed_on
from posttrain.pipeline import gates
from posttrain.pipeline.attempt import Attempt, attempt
from posttrain.pipeline.base import resolve_base
from posttrain.pipeline.estimate import checkpoint_bytes, device_bytes, disk_bytes, facts_of
from posttrain.pipeline.history import History, read_history
from posttrain.pipeline.memory import memory, place
from posttrain.pipeline.results import Result, describe, read_result
from posttrain.pipeline.screen import Screen
from posttrain.pipeline.sizes import ModelSize
from posttrain.pipeline.standing import Standing, inputs_of, standing, states_of, survey
from posttrain.recipe.check import TrainingPhase
from posttrain.recipe.difference import difference
from posttrain.recipe.spelling import did_you_mean
from posttrain.recipe.types import Execution, Phase, Recipe, Skipped
from posttrain.run import faults, manifest, recipe_file
from posttrain.run.folder import RunFolder, fsync_folder, write_json_atomic
from posttrain.run.journal import Journal, read_lines
from posttrain.run.lock import RunLock


@dataclass(frozen=True)
class Request:
    """What one command asks of a run."""

    recipe: Recipe
    source: str
    """The recipe as the user named it."""
    execution: Execution
    redo_from: str | None = None
    accept: tuple[tuple[str, str], ...] = ()
    prepared_only: bool = False
    """Use prepared data only: read no source."""


def carry_out(run: RunFolder, request: Request, screen: Screen) -> bool:
    """Bring the run to its end; False when it was there already. Raises GateFailed, Stopped and phase errors."""
    refuse_other_recipe(run, request.recipe)
    _check_names(request)
    if not request.redo_from and not request.accept and is_finished(run, request.recipe):
        return False
    with RunLock(run):
        if not run.recipe.exists():
            recipe_file.save(request.recipe, run.recipe)
        with attempt(run, request.recipe, request.source, request.execution, screen) as current:
            Curriculum(run, request, screen, current).carry_out()
    return True


def refuse_other_recipe(run: RunFolder, recipe: Recipe) -> None:
    """RunFolderError with the differing fields when the folder belongs to another recipe."""
    if not run.recipe.exists():
        if run.path.exists() and any(
            entry.name not in ("lock", "starting", ".base.tmp") for entry in run.path.iterdir()
        ):
            raise RunFolderError(f"{run.path} holds files but no recipe.json: it is no run. Choose another --name")
        return
    stored = recipe_file.load(run.recipe)
    if stored != recipe:
        lines = "\n".join(f"  {line}" for line in difference(stored, recipe))
        raise RunFolderError(
            f"run {run.path.name!r} was made by another recipe; these fields differ (its value -> yours):\n{lines}\n"
            f"To go on with its own recipe type: posttrain resume {run.words}\n"
            f"To start a run with yours add --name NEW_NAME"
        )


def _check_names(request: Request) -> None:
    phases = {phase.name: phase for phase in request.recipe.phases}
    for phase in (request.redo_from, *(phase for phase, _ in request.accept)):
        if phase is not None and phase not in phases:
            raise InputError(f"there is no phase {phase!r}{did_you_mean(phase, phases)}; phases: {', '.join(phases)}")
    for phase, gate in request.accept:
        names = [each.name for each in phases[phase].gates]
        if gate not in names:
            near = did_you_mean(gate, names)
            raise InputError(f"phase {phase!r} has no gate {gate!r}{near}; its gates: {', '.join(names) or 'none'}")


def is_finished(run: RunFolder, recipe: Recipe) -> bool:
    """Whether every phase is complete, verified and through its gates, and the end was noted."""
    history = read_history(Journal(run.events))
    if not history.finished or not (run.path / "report.html").exists():
        return False
    found = survey(run, recipe, resolve_base(recipe, run), history)
    return all(each.todo == "skip" and not open_gates(name, each, history) for name, each in found.items())


def open_gates(phase: str, found: Standing, history: History) -> list[str]:
    """Names of the hard gates that a complete phase failed and nobody accepted."""
    verdicts = found.result["gates"] if found.result else []
    names = [str(verdict["gate"]["name"]) for verdict in gates.failed(verdicts, hard=True)]
    return [name for name in names if (phase, name) not in history.accepted]


@dataclass
class Curriculum:
    """One pass over the phases of a run whose lock is held."""

    run: RunFolder
    request: Request
    screen: Screen
    attempt: Attempt
    results: dict[str, Result] = field(default_factory=dict)
    size: ModelSize = field(default_factory=lambda: ModelSize({}))

    def carry_out(self) -> None:
        recipe, journal = self.request.recipe, self.attempt.journal
        base = resolve_base(recipe, self.run)
        manifest.record(self.run, model_digest=base.base_digest)
        self._record_request()
        self._warn_of_room(base)
        for phase in recipe.phases:
            history = read_history(journal)
            found = standing(self.run, recipe, phase, base, self.results, history)
            if found.todo == "skip" and found.result is not None:
                self.results[phase.name] = found.result
                self.screen.say(f"{phase.name}: {found.reason}")
            else:
                self.results[phase.name] = self._carry_out_phase(phase, found, base)
            if phase.name not in read_history(journal).completed:
                journal.write("phase_completed", phase=phase.name, gates=self._verdict_lines(phase))
            faults.reach("phase.after_completed")
            self._decide(phase)
            if self.attempt.stop.requested():
                raise Stopped(f"stopped after phase {phase.name}")
        faults.reach("run.before_report")
        self._finish()

    def _warn_of_room(self, base: ModelState) -> None:
        """An estimate, so it warns; what is committed survives a disk that does fill up."""
        recipe, run = self.request.recipe, self.run
        found = survey(run, recipe, base, read_history(self.attempt.journal))
        left = [phase for phase in recipe.phases if found[phase.name].todo != "skip"]
        facts = facts_of(recipe, run, self.request.execution)
        self.size = facts.size
        needed = disk_bytes(recipe, left, facts, self.request.execution)
        free = machine.free_bytes(run.path)
        if needed > free:
            self.screen.say(f"WARNING: the run needs about {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")
        for phase in left:
            need = memory(recipe, phase, facts.size, self.request.execution, facts.device, facts.rows)
            there = device_bytes(place(phase, facts.device), self.request.execution)
            if need is not None and need.total > there:
                gpu = " and no GPU" if facts.device == "cpu" else ""
                self.screen.say(
                    f"WARNING: {phase.name} needs about {need.total / 1e9:.1f} GB of memory, there are "
                    f"{there / 1e9:.1f} GB{gpu}; what makes it fit: posttrain plan {run.words}"
                )

    def _record_request(self) -> None:
        """What was asked for by flag goes into the journal first: it holds even if this attempt is killed."""
        journal, names = self.attempt.journal, [phase.name for phase in self.request.recipe.phases]
        if self.request.redo_from is not None:
            journal.write("redo_requested", phases=names[names.index(self.request.redo_from) :])
        for phase, gate in self.request.accept:
            result, _ = read_result(self.run.phase(phase))
            if gate not in [one["gate"]["name"] for one in gates.failed(result["gates"] if result else [], hard=True)]:
                raise InputError(f"phase {phase!r} has no failed hard gate {gate!r}: there is nothing to accept")
            journal.write("accepted", phase=phase, gate=gate, attempt=self.attempt.number)
            self.screen.say(f"{phase}: gate {gate} accepted by name; recorded in the journal")

    def _carry_out_phase(self, phase: Phase, found: Standing, base: ModelState) -> Result:
        assert found.fingerprint is not None, "earlier phases are complete, so the inputs are known"
        folder, journal = self.run.phase(phase.name), self.attempt.journal
        self._clear(phase, found)
        event = "phase_resumed" if found.todo == "resume" else "phase_started"
        journal.write(event, phase=phase.name, kind=phase.kind, fingerprint=found.fingerprint, reason=found.reason)
        self.screen.say(f"{phase.name} ({phase.kind}): {'resuming' if found.todo == 'resume' else 'starting'}")
        folder.path.mkdir(parents=True, exist_ok=True)
        self.attempt.watch.next_save_bytes = checkpoint_bytes(self.request.recipe, phase, self.size)
        self.attempt.watch.note(f"{phase.name}: beginning")
        faults.reach("phase.started")

        started, clock = time.time(), time.perf_counter()
        try:
            outcome = self._outcome(phase, self._context(phase, found.fingerprint, base))
        except PhaseFault as fault:
            raise PhaseFault(f"phase {phase.name!r}: {fault}") from fault

        faults.reach("phase.before_result")
        result = {
            "phase": phase.name,
            "kind": phase.kind,
            "fingerprint": found.fingerprint,
            "inputs": inputs_of(self.request.recipe, phase, self.results),
            **describe(outcome, folder),
            "started": started,
            "finished": time.time(),
            "seconds": time.perf_counter() - clock,
        }
        rows = list(read_lines(folder.metrics))
        judged = () if outcome.skipped else phase.gates
        result["gates"] = [gates.judge(gate, result["metrics"], rows) for gate in judged]
        write_json_atomic(folder.result, result)
        faults.reach("phase.after_result")
        self.attempt.tracker.log(f"{phase.name}/result", 0, result["metrics"])
        self._note_datasets(result)
        done = outcome.notes[0] if outcome.skipped else f"done in {result['seconds']:.1f} s"
        self.screen.say(f"{phase.name}: {done}")
        return result

    def _outcome(self, phase: Phase, context: PhaseContext) -> PhaseOutcome:
        if isinstance(phase, TrainingPhase) and isinstance(phase.steps, Skipped):
            return handed_on(context.states[phase.model], phase.steps.reason)
        function: PhaseFunction = importlib.import_module(f"posttrain.phases.{phase.kind}").run
        return function(context, phase)

    def _clear(self, phase: Phase, found: Standing) -> None:
        """Remove what must not be built upon. Killed half-way, the next attempt comes to the same conclusion."""
        folder = self.run.phase(phase.name).path
        doomed = folder if found.todo == "restart" else folder / found.damaged if found.damaged else None
        if doomed is None or not doomed.exists():
            return
        self.attempt.journal.write("discarded", phase=phase.name, path=doomed.name, reason=found.reason)
        self.screen.say(f"{phase.name}: {found.reason}; {doomed.name} is made again")
        if doomed.is_dir():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()
        fsync_folder(doomed.parent)
        faults.reach("phase.discarded")

    def _context(self, phase: Phase, fingerprint: str, base: ModelState) -> PhaseContext:
        return PhaseContext(
            recipe=self.request.recipe,
            execution=self.request.execution,
            run=self.run,
            folder=self.run.phase(phase.name),
            fingerprint=fingerprint,
            states=states_of(base, self.results),
            results=self.results,
            journal=self.attempt.journal,
            progress=self.attempt.watch.progress,
            stop_requested=self.attempt.stop.requested,
            say=self.screen.say,
            interruptible=self.attempt.stop.interruptible,
            track=self.attempt.tracker.log,
            prepared_only=self.request.prepared_only,
        )

    def _note_datasets(self, result: Result) -> None:
        if result["kind"] == "prepare":
            digests = {output["path"]: output["sha256"] for output in result["outputs"]}
            known = manifest.read(self.run).get("datasets", {})
            manifest.record(self.run, datasets=known | {result["phase"]: digests})

    def _verdict_lines(self, phase: Phase) -> list[dict[str, object]]:
        verdicts = self.results[phase.name]["gates"]
        return [{"gate": one["gate"]["name"], "value": one["value"], "passed": one["passed"]} for one in verdicts]

    def _decide(self, phase: Phase) -> None:
        """Go on, or raise GateFailed with the numbers and the ways out."""
        verdicts = self.results[phase.name]["gates"]
        for verdict in verdicts:
            failure = "FAILED" if verdict["gate"]["hard"] else "failed, but is soft"
            outcome = "passed" if verdict["passed"] else failure
            self.screen.say(f"{phase.name}: gate {verdict['gate']['name']} {outcome}: {verdict['reason']}")
        accepted = read_history(self.attempt.journal).accepted
        barred = [one for one in gates.failed(verdicts, hard=True) if (phase.name, one["gate"]["name"]) not in accepted]
        if not barred:
            return
        name, run = phase.name, self.run.words
        numbers = {one["gate"]["name"]: one["reason"] for one in barred}
        lines = "\n".join(f"  {gate}: {reason}" for gate, reason in numbers.items())
        accepts = " ".join(f"--accept {name}:{gate}" for gate in numbers)
        raise GateFailed(
            f"phase {name!r} did not pass {'its hard gate' if len(barred) == 1 else 'its hard gates'}:\n{lines}\n"
            f"The ways out:\n  do it again:  posttrain resume {run} --from {name}\n"
            f"  accept it:    posttrain resume {run} {accepts}\n"
            f"  or change the recipe and start another run with --name"
        )

    def _finish(self) -> None:
        """The end is noted before the report is written, so that the report can say so; both may be repeated."""
        from posttrain.report.page import write_report

        self.attempt.journal.write("run_completed", attempt=self.attempt.number)
        write_report(self.run)
