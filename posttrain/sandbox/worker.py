"""The program of a warm worker: `worker.main(kind, level, stage, roots)` in a Python with a clean environment.

It forks a child per job and never looks into one: a job's text reaches the child in a memory file and the answer leaves
it by a pipe, both made by the parent, so that nothing of an earlier job lies in the memory that a later one inherits.

Control packets: the worker says `{"ready": level}` or `{"error": why}` once, then takes `{"do": ...}` with descriptors.
`call` ([job, answer], see `function`) is answered with how the child ended; `open` ([session socket], see `session`)
with `{"closed": true}` when the session is over. A control socket that closes ends the worker and all it started.
"""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any, NoReturn

from posttrain.sandbox import confine, function, kernel, landlock, seccomp, session

PACKET_BYTES = 2**16


def main(kind: str, level: str, stage: str, roots: list[str], control_descriptor: int) -> NoReturn:
    control = socket.socket(fileno=control_descriptor)
    try:
        confine.default_signals()
        require(level)
        if level != confine.OFF:
            for processes in (True, False):
                seccomp.program(processes)  # made once, here, for all children
        cell = confine.Cell(level, confine.sandbox_uid(level), [*roots, stage + "/empty"], [])
        if kind == "calls":
            _enter_for_calls(cell, stage, roots)
    except (OSError, ValueError) as error:
        control.send(json.dumps({"error": str(error)}).encode())
        confine.leave(1)
    control.send(json.dumps({"ready": level}).encode())
    while True:
        packet, descriptors, _, _ = socket.recv_fds(control, PACKET_BYTES, 8)
        if not packet:
            break
        message = json.loads(packet)
        if message["do"] == "call":
            reply = _call(cell, descriptors, message["wall_s"])
        else:
            reply = _session(cell, stage, message, descriptors[0])
        try:
            control.send(json.dumps(reply).encode())
        except OSError:
            break  # the parent has gone
    _clear(stage)
    confine.leave(0)


def require(level: str) -> None:
    """OSError where this level cannot be had here; the namespaces say so themselves."""
    if level == confine.OFF:
        return
    if kernel.machine() not in kernel.MACHINES:
        raise OSError(f"system calls of {kernel.machine()} are not known; known: {', '.join(kernel.MACHINES)}")
    if level == confine.NAMESPACES:
        return
    abi = landlock.version()
    if level == confine.DROPPED_USER:
        if os.getuid() != 0:
            raise OSError("only root can become another user")
        if abi < 1:
            raise OSError("the kernel has no Landlock (Linux 5.13, and lsm=landlock among its boot options)")
    elif os.getuid() == 0:
        raise OSError("we are root: the program would be too")
    elif abi < landlock.SCOPED_SINCE:
        needed = f"version {landlock.SCOPED_SINCE} (Linux 6.12) confines signals"
        raise OSError(f"Landlock is version {abi}; {needed}, without which a program could kill its parent")


def _enter_for_calls(cell: confine.Cell, stage: str, roots: list[str]) -> None:
    """Confine the worker itself, once: function calls get no process, no writable file and no namespace of their own.

    Where new namespaces are made, what goes on is their first process; this one stays outside, waits and cleans up.
    """
    if cell.level != confine.NAMESPACES:
        os.chdir(stage + "/empty")
        return
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        _clear(stage)
        confine.leave(0)
    kernel.die_with_parent()
    confine.enter_namespaces()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        confine.leave(0)
    kernel.die_with_parent()
    confine.build_root(stage, roots, cell.uid, 2**16, 16, proc=False)
    os.mkdir(confine.BASE + "/empty", 0o555)
    os.chdir(confine.BASE + "/empty")


def _call(cell: confine.Cell, descriptors: list[int], wall_s: float) -> dict[str, Any]:
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            job, answer = descriptors
            for descriptor, number in ((job, 10), (answer, 11), (null, 12)):
                os.dup2(descriptor, number)
            for source, number in ((12, 0), (12, 1), (12, 2), (11, 3), (10, 4)):
                os.dup2(source, number)
            confine.close_all_but((0, 1, 2, 3, 4))
            confine.drop(cell, function.LIMITS)
            function.run(4, 3)
        finally:
            confine.leave(1)
    for descriptor in descriptors:
        os.close(descriptor)
    process = os.pidfd_open(child)
    in_time = bool(select.select([process], [], [], wall_s)[0])
    os.close(process)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return {"in_time": in_time, "exit": os.waitstatus_to_exitcode(status)}


def _session(cell: confine.Cell, stage: str, message: dict[str, Any], link: int) -> dict[str, Any]:
    child = os.fork()
    if child == 0:
        try:
            kernel.die_with_parent()
            os.dup2(link, 20)
            os.dup2(20, 3)
            confine.close_all_but((0, 1, 2, 3))
            if cell.level == confine.NAMESPACES:
                _session_in_namespaces(cell, stage, message)
            else:
                session.serve(_session_in_folder(cell, stage, message["roots"]), stage + "/room", 3)
        except (OSError, ValueError) as error:
            socket.socket(fileno=3).send(json.dumps({"error": str(error)}).encode())
        finally:
            confine.leave(1)
    os.close(link)
    os.waitpid(child, 0)
    if cell.level != confine.NAMESPACES:
        _clear(stage + "/room")
    return {"closed": True}


def _session_in_namespaces(cell: confine.Cell, stage: str, message: dict[str, Any]) -> None:
    confine.enter_namespaces()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        confine.leave(0)
    kernel.die_with_parent()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    roots, room_bytes, room_files = message["roots"], message["room_bytes"], message["room_files"]
    confine.build_root(stage, roots, cell.uid, room_bytes, room_files, proc=True)
    session.serve(cell, confine.BASE, 3)


def _session_in_folder(cell: confine.Cell, stage: str, roots: list[str]) -> confine.Cell:
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    os.mkdir(stage + "/room", 0o711)
    confine.make_room(stage + "/room", cell.uid)
    folders = [stage + "/room/work", stage + "/room/tmp"]
    return confine.Cell(cell.level, cell.uid, roots, folders)


def _clear(folder: str) -> None:
    """Remove what a program left, whatever it is. `rm` neither follows links nor minds how deep folders go."""
    if not os.path.isdir(folder):
        return
    for command in (["chmod", "-R", "u+rwX", folder], ["rm", "-rf", "--one-file-system", folder]):
        subprocess.run(command, stderr=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin"}, check=False)
    if os.path.lexists(folder):
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        os.rename(folder, f"{folder}-left-{time.monotonic_ns()}")


if __name__ == "__main__":
    sys.exit("this is the program of a worker; posttrain.sandbox.slots starts it")
