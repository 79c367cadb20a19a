"""Work spread over processes, with results in the order of the work."""

import ctypes
import multiprocessing
import os
import signal
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from posttrain.errors import MachineError
from posttrain.run.redaction import without_secrets

Job = TypeVar("Job")
Made = TypeVar("Made")

PR_SET_PDEATHSIG = 1


def in_order(function: Callable[[Job], Made], jobs: Iterable[Job], workers: int) -> Iterator[tuple[Job, Made]]:
    """(job, function(job)) in the order of `jobs`, a few of which are read ahead.

    One worker, or one job, stays in this process. Workers are forked when the second job is known, and see what the
    function holds as it is then.
    """
    remaining = iter(jobs)
    ahead = list(islice(remaining, 2))
    if workers == 1 or len(ahead) < 2:
        for job in chain(ahead, remaining):
            yield job, function(job)
        return
    call: Callable[[Job], Made] = _call
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(), function))
    pending: deque[tuple[Job, Future[Made]]] = deque()
    try:
        for job in chain(ahead, remaining):
            pending.append((job, pool.submit(call, job)))
            if len(pending) > 2 * workers:
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()
    except BrokenProcessPool:
        raise MachineError(
            "a process that renders rows was ended from outside, by the kernel if memory ran out; "
            "use fewer --threads, and the same command goes on"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_function: Callable[..., object] | None = None


def _start_worker(parent: int, function: Callable[..., object]) -> None:
    """In a new worker: it ends with its parent, leaves signals to it, and holds none of its files open."""
    global _function
    _function = function
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for name in os.environ.keys() - without_secrets().keys():
        del os.environ[name]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Another thread may have held a stream's lock at the fork, and a lock file would stay locked.
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        try:
            if number > 2 and stat.S_ISREG(os.fstat(number).st_mode):
                os.close(number)
        except OSError:
            continue


def _call(job: Any) -> Any:
    assert _function is not None
    return _function(job)
