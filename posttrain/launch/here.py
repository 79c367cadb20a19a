"""Runs on this machine, in sessions that outlive whoever starts them: begin, go on, stop."""

import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from posttrain.errors import MachineError, RunFolderError
from posttrain.host.sessions import Kind, Session, best_kind, open_session, session_name
from posttrain.pipeline.curriculum import is_finished, refuse_other_recipe
from posttrain.recipe.types import Recipe
from posttrain.run import recipe_file
from posttrain.run.folder import RunFolder, write_json_atomic
from posttrain.run.journal import Journal
from posttrain.run.lock import Owner, holder

BEGIN_S = 60.0
"""How long the new process may take until it holds the run."""
ENDS = ("stopped", "failed", "gate_failed", "run_completed")


def start(run: RunFolder, recipe: Recipe, words: Sequence[str], kind: Kind | None = None) -> Session | None:
    """Open a session with the command `words` and see that it holds the run; None where nothing is left to do.

    What cannot run is refused while somebody is looking: RunFolderError, MachineError.
    """
    if not (run.path / "starting").exists():
        # Before anything is written: it may be no run at all.
        refuse_other_recipe(run, recipe)
    with _starting(run):
        refuse_other_recipe(run, recipe)
        if (owner := holder(run)) is not None:
            raise RunFolderError(
                f"run {run.path.name!r} is already worked on by {owner}; look at it with: posttrain attach {run.words}"
            )
        again = any(word.startswith(("--from", "--accept")) for word in words)
        if not again and is_finished(run, recipe):
            return None
        if not run.recipe.exists():
            recipe_file.save(recipe, run.recipe)
        output = run.logs / "session.log"
        opened = open_session(kind or best_kind(), session_name(run.path.name), words, sys.executable, output)
        write_json_atomic(run.session, asdict(opened))
        _await_begin(run, opened, output)
    return opened


@contextmanager
def _starting(run: RunFolder) -> Iterator[None]:
    """One start at a time; the kernel lets go of the lock however this process ends."""
    run.path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run.path / "starting", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RunFolderError(
            f"run {run.path.name!r} is being started by another command; look at it with: posttrain status {run.words}"
        ) from None
    finally:
        os.close(descriptor)


def _await_begin(run: RunFolder, opened: Session, output: Path) -> None:
    """Until the run is held; MachineError where its process ended before."""
    until = time.monotonic() + BEGIN_S
    logs = set(run.logs.glob("attempt-*.log"))
    while time.monotonic() < until:
        # A run that was quick has been held and let go: it has a log that was not there before.
        if holder(run) is not None or set(run.logs.glob("attempt-*.log")) - logs:
            return
        if not opened.alive():
            said = output.read_text(errors="replace").strip().splitlines()[-5:] if output.exists() else []
            more = "\n".join(said) or "type the same with `run` in place of `start` to see why"
            raise MachineError(f"the run ended before it began:\n{more}")
        time.sleep(0.1)
    raise MachineError(f"the run did not begin within {BEGIN_S:.0f} s; look at it with: posttrain attach {run.words}")


def ask_to_stop(run: RunFolder, now: bool = False) -> Owner | None:
    """Ask the process that works on the run to finish its step, save and end; None where there is none.

    `now`: at once, what is not saved is lost.
    """
    owner = holder(run)
    if owner is None:
        return None
    if not owner.is_here:
        raise RunFolderError(f"run {run.path.name!r} is held by {owner}: it can be stopped on that machine only")
    os.kill(owner.pid, signal.SIGTERM)
    if now:
        os.kill(owner.pid, signal.SIGTERM)
    return owner


def how_it_ended(run: RunFolder) -> str:
    """What the journal says about the end of the last attempt."""
    last = [event for event in Journal(run.events).read() if event.get("event") in ENDS]
    return str(last[-1].get("message") or last[-1]["event"].replace("_", " ")) if last else "ended without a note"
