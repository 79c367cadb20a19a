"""Named points at which a test makes the process die, or the disk or the memory run full.

`POSTTRAIN_FAULT=<point>[#n]:kill|full|memory` fires at the n-th arrival (the first unless told). Unset, `reach` costs
one dictionary look-up.
"""

import errno
import os
import signal

_arrivals: dict[str, int] = {}


def reach(point: str) -> None:
    """Say that the process is at `point`."""
    fault = os.environ.get("POSTTRAIN_FAULT")
    if not fault:
        return
    target, action = fault.rsplit(":", 1)
    name, _, count = target.partition("#")
    if name != point:
        return
    _arrivals[point] = _arrivals.get(point, 0) + 1
    if _arrivals[point] != int(count or 1):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "memory":
        raise MemoryError(f"(fault at {point})")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"(fault at {point})")
