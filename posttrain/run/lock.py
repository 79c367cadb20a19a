"""One process per run: an advisory lock on a file in the run folder that says who holds it."""

import fcntl
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from types import TracebackType

from posttrain.errors import RunFolderError
from posttrain.run.folder import RunFolder


@dataclass(frozen=True)
class Owner:
    """The process that works on a run; zero where its note cannot be read."""

    pid: int
    host: str
    since: float
    """Unix seconds, for people: clocks jump."""

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} since {since}"

    @property
    def is_here(self) -> bool:
        return self.pid != 0 and self.host == platform.node()


class RunLock:
    """Held while the context is open; the kernel lets go of it when the process dies, however it dies."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.path = run.path / "lock"

    def __enter__(self) -> "RunLock":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not inherited by child processes: a child that outlives us must not keep the run locked.
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = self.owner()
            os.close(self.descriptor)
            raise RunFolderError(
                f"run {self.run.path.name!r} is held by {owner}. Wait for it, stop it "
                f"(posttrain stop {self.run.words}), or start another run with --name"
            ) from None
        mine = Owner(os.getpid(), platform.node(), time.time())
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(asdict(mine)).encode(), 0)
        return self

    def owner(self) -> Owner:
        try:
            return Owner(**json.loads(os.pread(self.descriptor, 4096, 0)))
        except (ValueError, TypeError):
            return Owner(0, "", 0.0)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self.descriptor)


def holder(run: RunFolder) -> Owner | None:
    """Who holds the run now, or None."""
    lock = RunLock(run)
    if not lock.path.exists():
        return None
    lock.descriptor = os.open(lock.path, os.O_RDONLY)
    try:
        fcntl.flock(lock.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return lock.owner()
    finally:
        os.close(lock.descriptor)
    return None
