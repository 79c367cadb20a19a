"""One process per run: an advisory lock on a file in the run folder that says who holds it."""

import fcntl
import json
import os
import platform
import time
from types import TracebackType

from posttrain.errors import RunFolderError
from posttrain.run.folder import RunFolder


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
            holder = self._holder()
            os.close(self.descriptor)
            raise RunFolderError(
                f"run {self.run.path.name!r} is held by {holder}. Wait for it, stop it, "
                f"or start another run with --name"
            ) from None
        owner = {"pid": os.getpid(), "host": platform.node(), "since": time.time()}
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(owner).encode(), 0)
        return self

    def _holder(self) -> str:
        try:
            owner = json.loads(os.pread(self.descriptor, 4096, 0))
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
            return f"process {owner['pid']} on {owner['host']} since {since}"
        except (ValueError, KeyError, TypeError):
            return "another process"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self.descriptor)


def holder(run: RunFolder) -> str | None:
    """Who holds the run now, or None."""
    lock = RunLock(run)
    if not lock.path.exists():
        return None
    lock.descriptor = os.open(lock.path, os.O_RDONLY)
    try:
        fcntl.flock(lock.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return lock._holder()
    finally:
        os.close(lock.descriptor)
    return None
