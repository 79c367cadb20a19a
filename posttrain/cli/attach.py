"""`posttrain attach RUN`: the terminal of a run that was started detached."""

import os
import sys
from pathlib import Path

import click

from posttrain.cli.logs import follow
from posttrain.cli.options import existing_run, run_argument, runs_dir_option
from posttrain.errors import InputError, RunFolderError
from posttrain.host.sessions import Session, read_session
from posttrain.run.folder import RunFolder
from posttrain.run.lock import holder


def _attach(run_name: str, runs_dir: Path) -> None:
    run = existing_run(run_name, runs_dir.absolute())
    session, owner = read_session(run.session), holder(run)
    if session is None or not session.alive():
        what = "was not started detached" if session is None else f"has a dead {session.kind} session {session.name}"
        if owner is None:
            raise RunFolderError(
                f"run {run.path.name!r} {what}, and no process works on it; "
                f"it goes on with: posttrain start {run.words}"
            )
        raise RunFolderError(f"run {run.path.name!r} {what}, but {owner} works on it: posttrain logs {run.words} -f")
    attach_to(run, session)


def attach_to(run: RunFolder, session: Session) -> None:
    """Become the session's terminal; of a session of its own, there is only the log to follow."""
    words = session.attach_words
    if words is None:
        click.echo("it has no terminal; its log follows, Ctrl-C leaves it alone", err=True)
        follow(run)
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise InputError(f"this is no terminal to attach: posttrain logs {run.words} -f")
    os.execvp(words[0], words)


attach = click.Command(
    "attach",
    callback=_attach,
    params=[run_argument(), runs_dir_option()],
    help="Attach this terminal to a run that was started detached (screen: Ctrl-A D leaves it, tmux: Ctrl-B D).",
)
