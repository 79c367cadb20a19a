"""Runs as a program of its own, with the standard library only: forks one child per job it reads from stdin.

A job is a line `{"source", "function", "inputs"}`; the answer is a line `{"values": [...]}` with one
`["value", repr]` or `["fault", name]` per input, `{"failure": reason}`, or `{"unknown": reason}` where the program
cannot be judged. Expected answers are never sent here.
"""

import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any, NoReturn

OPCODES = 100_000
"""Per job. A count, so that the same program stops at the same place on every machine."""
CPU_S = 2
WALL_S = 30.0
"""Far wider than any count or CPU limit. A program that meets it slept, or the machine was starved: nobody knows
which, so nothing is said about it."""
MEMORY_BYTES = 512 * 2**20
FILE_BYTES = 2**16
ANSWER_BYTES = 2**18
NOBODY = 65534
PLAIN = (int, float, bool, str, type(None))


def _limit() -> None:
    for kind, value in (
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, 16),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _plain(value: Any, depth: int = 0) -> bool:
    """Exactly built-in types: no object of the program's own can decide what it equals or how it prints."""
    if depth > 20:
        return False
    if type(value) in (list, tuple):
        return all(_plain(item, depth + 1) for item in value)
    if type(value) is dict:
        return all(type(key) in PLAIN and _plain(item, depth + 1) for key, item in value.items())
    return type(value) in PLAIN


def _answer(descriptor: int, value: dict[str, Any]) -> NoReturn:
    data = json.dumps(value).encode()
    if len(data) > ANSWER_BYTES:
        data = b'{"failure": "its values are too long"}'
    while data:
        data = data[os.write(descriptor, data) :]
    os._exit(0)


def _run_job(job: dict[str, Any], descriptor: int) -> NoReturn:
    left = OPCODES

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        frame.f_trace_opcodes = True
        left -= 1
        if left < 0:
            _answer(descriptor, {"failure": "it takes too many steps"})
        return trace

    space: dict[str, Any] = {"__name__": "program"}
    values: list[tuple[str, str]] = []
    try:
        program = compile(job["source"], "<program>", "exec")
        sys.settrace(trace)
        exec(program, space)
        function = space[job["function"]]
    except BaseException as fault:
        sys.settrace(None)
        _answer(descriptor, {"failure": f"it does not load: {type(fault).__name__}"})
    for arguments in job["inputs"]:
        try:
            value = function(*arguments)
            values.append(("value", repr(value)) if _plain(value) else ("fault", "no plain value"))
        except BaseException as fault:
            values.append(("fault", type(fault).__name__))
    sys.settrace(None)
    _answer(descriptor, {"values": values})


def _become_child(job: dict[str, Any], descriptor: int) -> NoReturn:
    """Leave nothing open but the answer's pipe, then run."""
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        kept = os.dup2(descriptor, 3)
        os.closerange(4, 256)
        _limit()
        _run_job(job, kept)
    finally:
        os._exit(1)


def _read_answer(descriptor: int) -> bytes | None:
    """All the child wrote; None when the wall clock ran out."""
    deadline, data = time.monotonic() + WALL_S, b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([descriptor], [], [], left)[0]:
            break
        part = os.read(descriptor, 2**16)
        if not part:
            return data
        data += part
        if len(data) > ANSWER_BYTES:
            return b""
    return None


def _serve(job: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _become_child(job, writing)
    os.close(writing)
    data = _read_answer(reading)
    os.close(reading)
    for kill in (os.killpg, os.kill):
        try:
            kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
    _, status = os.waitpid(child, 0)
    if data is None:
        return {"unknown": f"no answer within {WALL_S:g} s"}
    try:
        answer = json.loads(data)
    except ValueError:
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        return {"failure": f"it ended without an answer ({how})"}
    return answer if isinstance(answer, dict) else {"failure": "its answer is no object"}


def main() -> None:
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(_serve(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
