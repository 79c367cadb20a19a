"""Sessions that outlive the shell: screen, else tmux, else a session of the process's own."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.errors import MachineError
from posttrain.run.redaction import without_secrets

Kind = Literal["screen", "tmux", "own"]
KINDS: tuple[Kind, ...] = ("screen", "tmux")
"""Those that somebody can attach to, in order of preference; each is the name of its program."""
START_S = 30.0


@dataclass(frozen=True)
class Session:
    kind: Kind
    name: str
    pid: int | None
    """Of the process, where the session is its own."""

    def alive(self) -> bool:
        match self.kind:
            case "screen":
                listed = _asked("screen", "-ls", self.name)
                return any(f".{self.name}\t" in line and "(Dead" not in line for line in listed.splitlines())
            case "tmux":
                return self.name in _asked("tmux", "list-sessions", "-F", "#{session_name}").splitlines()
            case "own":
                return self.pid is not None and _runs(self.pid)

    @property
    def attach_words(self) -> tuple[str, ...] | None:
        """What attaches a terminal to it; None where there is nothing to attach to."""
        words = {"screen": ("screen", "-r", self.name), "tmux": ("tmux", "attach", "-t", f"={self.name}")}
        return words.get(self.kind)


def _asked(*words: str) -> str:
    """What the program answers; nothing where it is missing or knows of no session."""
    if shutil.which(words[0]) is None:
        return ""
    return subprocess.run(words, capture_output=True, text=True, check=False, env=without_secrets()).stdout


def _runs(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def read_session(path: Path) -> Session | None:
    """The session that a run was last started in; None where it was never detached."""
    try:
        return Session(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def best_kind() -> Kind:
    return next((kind for kind in KINDS if shutil.which(kind)), "own")


def session_name(run: str) -> str:
    """A run's session; tmux takes no dots in a name."""
    return f"posttrain-{run.replace('.', '_')}"


def open_session(kind: Kind, name: str, words: Sequence[str], python: str, output: Path) -> Session:
    """Run a command in a new session, here and with this environment. `output` is of a session of its own.

    The environment goes through a pipe: a server of tmux or screen that runs already has another one, and what stands
    on a command line or in a server's environment can be read by others.
    """
    if kind != "own" and shutil.which(kind) is None:
        raise MachineError(f"{kind} is not installed: apt-get install -y {kind}, or leave --session out")
    with tempfile.TemporaryDirectory(prefix="posttrain-") as folder:
        pipe = Path(folder, "environment")
        os.mkfifo(pipe, 0o600)
        inside = [python, "-m", "posttrain.host.detached", str(pipe)]
        process = _launch(kind, name, inside, output)
        session = Session(kind, name, process.pid if kind == "own" else None)
        handed = {"words": list(words), "folder": os.getcwd(), "environment": dict(os.environ)}
        _hand_over(pipe, json.dumps(handed).encode(), session)
    return session


def _launch(kind: Kind, name: str, inside: list[str], output: Path) -> "subprocess.Popen[bytes]":
    # Where the package lies, for Python to find the module; the rest of the environment follows through the pipe.
    environment = without_secrets() | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    if kind == "own":
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "ab") as said:
            return subprocess.Popen(
                inside, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, start_new_session=True
            )
    if kind == "screen":
        # A dead session of the same name would take the new one's place in every list.
        _asked("screen", "-wipe", name)
        words = ["screen", "-dmS", name, *inside]
    else:
        path = f"PYTHONPATH={environment['PYTHONPATH']}"
        words = ["tmux", "new-session", "-d", "-s", name, "-e", path, *inside]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    if process.wait(timeout=START_S):
        complaint = process.stderr.read().decode(errors="replace").strip() if process.stderr else ""
        raise MachineError(f"{kind} opened no session: {complaint or f'it ended with {process.returncode}'}")
    return process


def _hand_over(pipe: Path, content: bytes, session: Session) -> None:
    """Write to the pipe once the other end is open; MachineError where it does not open."""
    until = time.monotonic() + START_S
    while True:
        try:
            descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            if time.monotonic() > until or (session.kind == "own" and not session.alive()):
                raise MachineError(f"the {session.kind} session {session.name} did not start its command") from None
            time.sleep(0.02)
    os.set_blocking(descriptor, True)
    with open(descriptor, "wb") as file:
        file.write(content)
