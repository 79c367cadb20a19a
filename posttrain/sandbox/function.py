"""The last thing in a forked child that calls one function of a program: run, and answer with plain values.

A job is `{"source", "function", "inputs"}`; the answer `{"values": [...]}` with one `["value", repr]` or
`["fault", name]` per input, or `{"failure": reason}`. Expected answers are never sent here, so the worst a program can
do to the answer is to write another wrong one.
"""

import json
import os
import sys
from typing import Any, NoReturn

from posttrain.sandbox.confine import Limits

OPCODES = 100_000
"""Per job. A count, so that the same program stops at the same place on every machine."""
WALL_S = 30.0
"""Far wider than any count or CPU limit. A program that meets it slept, or the machine was starved: nobody knows
which, so nothing is said about it."""
ANSWER_BYTES = 2**18
LIMITS = Limits(cpu_s=2, address_bytes=512 * 2**20, file_bytes=2**16, open_files=16, processes=0)
PLAIN = (int, float, bool, str, type(None))


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


def _read_job(descriptor: int) -> dict[str, Any]:
    job: dict[str, Any] = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    os.close(descriptor)
    return job


def run(job_descriptor: int, descriptor: int) -> NoReturn:
    job = _read_job(job_descriptor)
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
