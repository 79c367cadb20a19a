"""One attempt at a run: its lock, log, signals and manifest entry, and what is written when it ends badly."""

import contextlib
import errno
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import GateFailed, MachineError, PhaseFault, PosttrainError, Stopped
from posttrain.host import machine, tunix
from posttrain.host.cache import cache_folder
from posttrain.pipeline.screen import Screen
from posttrain.pipeline.stop import StopSignals
from posttrain.pipeline.track import Tracker
from posttrain.pipeline.watch import Watch
from posttrain.recipe.types import Execution, Recipe
from posttrain.run import manifest
from posttrain.run.attempt_log import AttemptLog, log_path
from posttrain.run.folder import RunFolder
from posttrain.run.journal import Journal
from posttrain.run.redaction import redact
from posttrain.sandbox import level


@dataclass(frozen=True)
class Attempt:
    number: int
    journal: Journal
    stop: StopSignals
    watch: Watch
    tracker: Tracker


@contextlib.contextmanager
def attempt(run: RunFolder, recipe: Recipe, source: str, execution: Execution, screen: Screen) -> Iterator[Attempt]:
    """Begin an attempt at a run whose lock is held. Errors leave it typed, journalled and logged."""
    machine.set_thread_environment(execution.threads)
    machine.keep_freed_memory()
    if execution.gpu_ranks is not None:
        machine.show_gpus(execution.gpu_ranks)
    if execution.device == "cuda":
        machine.require_gpu()
    level.use(execution.sandbox)
    if execution.backend == "tunix":
        tunix.interpreter()
    number = manifest.begin_attempt(run, recipe, source, execution, machine.facts())
    journal = Journal(run.events)
    journal.write("attempt_started", attempt=number, execution=execution.model_dump(mode="json"))
    log = AttemptLog(log_path(run, number))
    screen.attach(log)
    try:
        with (
            StopSignals(screen.say) as stop,
            Watch(run, screen, stop) as watch,
            contextlib.closing(Tracker(execution.tracker, run, recipe, screen.say)) as tracker,
        ):
            try:
                yield Attempt(number, journal, stop, watch, tracker)
            except Stopped:
                if stop.error is None:
                    raise
                raise stop.error from None
    except BaseException as error:
        typed = _typed(error, run, log)
        _note_end(run, journal, number, typed)
        log.write(f"{type(typed).__name__}: {typed}" if isinstance(typed, Exception) else repr(typed))
        if typed is error:
            raise
        raise typed from error
    else:
        manifest.end_attempt(run, number, "completed")
    finally:
        screen.attach(None)
        log.close()


def _typed(error: BaseException, run: RunFolder, log: AttemptLog) -> BaseException:
    """The error a user should see; the traceback of anything unforeseen goes to the log."""
    if disk_is_full(error):
        log.write("".join(traceback.format_exception(error)))
        return MachineError(_disk_message(error, run))
    if isinstance(error, KeyboardInterrupt):
        return Stopped("stopped at once by an interrupt; work since the last save is lost")
    if isinstance(error, PosttrainError) or not isinstance(error, Exception):
        return error
    log.write("".join(traceback.format_exception(error)))
    if machine.is_out_of_memory(error):
        return MachineError(_memory_message(error))
    text = redact(f"{type(error).__name__}: {error}")
    return PhaseFault(f"unforeseen error, a fault of ours or of the recipe: {text}\nThe traceback is in {log.path}")


def disk_is_full(error: BaseException | None) -> bool:
    """Whether the error, or one it came from, is the operating system's "no space left"."""
    while error is not None:
        # Rust libraries wrap the error and keep only its text.
        if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "os error 28" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _disk_message(error: BaseException, run: RunFolder) -> str:
    name = getattr(error, "filename", None)
    # What no error names is one of the places that a run writes to, and the fullest of them.
    places = (
        [Path(str(name)).parent] if name else [run.path.parent, cache_folder(), Path(os.environ.get("TMPDIR", "/tmp"))]
    )
    full = min(places, key=machine.free_bytes)
    return (
        f"the disk is full: writing {Path(str(name)).name if name else 'a file'} failed, and "
        f"{machine.free_bytes(full) / 1e6:,.0f} MB are free in {full}. "
        f"What was committed is kept. `posttrain plan {run.words}` shows the space that is needed; "
        f"free it and type: posttrain resume {run.words}"
    )


def _memory_message(error: BaseException) -> str:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"memory ran out: {said}. What was committed is kept. The ways out: fewer --rollout-tokens where it was a "
        f"rollout or an evaluation, --recompute full or --activation-offload cpu where it was training, or a machine "
        f"with more memory"
    )


def _note_end(run: RunFolder, journal: Journal, number: int, error: BaseException) -> None:
    outcome = "stopped" if isinstance(error, Stopped) else "gate_failed" if isinstance(error, GateFailed) else "failed"
    # The journal and the manifest lie on the same disk that may be full; the next attempt does not need this note.
    with contextlib.suppress(OSError):
        journal.write(outcome, attempt=number, message=redact(str(error)))
        manifest.end_attempt(run, number, outcome)
