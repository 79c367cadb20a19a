"""Work over processes comes back whole and in order, and ends with who asked for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.errors import DataError, MachineError
from posttrain.host.workers import in_order


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("jobs", [0, 1, 2, 3, 4, 50])
def test_every_job_comes_back_in_its_place(workers: int, jobs: int) -> None:
    def slow_first(job: int) -> tuple[int, int]:
        time.sleep(0.01 if job == 0 else 0.0)
        return job * job, os.getpid()

    made = list(in_order(slow_first, iter(range(jobs)), workers))
    assert [(job, square) for job, (square, _) in made] == [(job, job * job) for job in range(jobs)]
    elsewhere = {process for _, (_, process) in made} - {os.getpid()}
    assert bool(elsewhere) == (workers > 1 and jobs > 1)


def test_jobs_are_read_no_further_ahead_than_the_workers_need() -> None:
    read = []

    def jobs():  # type: ignore[no-untyped-def]
        for job in range(100):
            read.append(job)
            yield job

    results = in_order(lambda job: job, jobs(), 2)
    next(results)
    assert len(read) <= 6
    results.close()  # type: ignore[attr-defined]


def test_what_a_job_raises_is_raised_here() -> None:
    def refuse(job: int) -> int:
        raise DataError(f"job {job}")

    with pytest.raises(DataError, match="job 0"):
        list(in_order(refuse, iter(range(5)), 2))


def test_a_worker_that_is_killed_is_named() -> None:
    with pytest.raises(MachineError, match="fewer --threads"):
        list(in_order(lambda job: os.kill(os.getpid(), signal.SIGKILL), iter(range(5)), 2))


ORPHANS = """
import os, sys, time
from posttrain.host.workers import in_order
lock = open(sys.argv[1], "w")
def job(number):
    kept = [fd for fd in range(3, 100) if os.path.realpath(f"/proc/self/fd/{fd}") == sys.argv[1]]
    return bool(kept), os.getpid()
for number, (holds, pid) in in_order(job, iter(range(40)), 2):
    print(holds, pid, flush=True)
    time.sleep(0.05)
"""


def test_workers_end_with_a_killed_parent_and_hold_none_of_its_files(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ORPHANS, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}) as parent:
        assert parent.stdout is not None
        holds, pid = parent.stdout.readline().split()
        parent.kill()
    assert holds == "False" and int(pid) != parent.pid
    for _ in range(200):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    pytest.fail(f"worker {pid} outlived its parent")
