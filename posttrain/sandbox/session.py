"""The trusted first process of a working folder: starts commands in it, one at a time, watches and ends them.

Packets, each answered by one: `write` ([memory file] of `{name: base64}`), `read` ([pipe], names), `run` ([stdout,
stderr, answers], argv, env, limits). Files are written and read by a child as confined as the program, so that a link
that a program left leads nowhere.
"""

import base64
import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from posttrain.sandbox import confine, watch

PACKET_BYTES = 2**16
NAME_CHARACTERS = 4096
OWN_WORK = confine.Limits(cpu_s=60, address_bytes=None, file_bytes=2**30, open_files=64, processes=1)
"""Of the child that writes and reads files."""


def serve(cell: confine.Cell, base: str, link_descriptor: int) -> None:
    """Until the other side closes."""
    link = socket.socket(fileno=link_descriptor)
    link.send(b'{"ready": true}')
    while True:
        packet, descriptors, _, _ = socket.recv_fds(link, PACKET_BYTES, 8)
        if not packet:
            return
        message = json.loads(packet)
        actions = {"run": _run, "write": _write, "read": _read}
        reply = actions[message["do"]](cell, base, link, message, descriptors)
        link.send(json.dumps(reply).encode())


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _confined(cell: confine.Cell, limits: confine.Limits, base: str, kept: list[int], act: Callable[[], None]) -> int:
    """A child with `kept` as its descriptors 0, 1, 2 ... that gives up everything and then acts."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        high = [os.dup2(descriptor, 64 + i) for i, descriptor in enumerate(kept)]
        for i, descriptor in enumerate(high):
            os.dup2(descriptor, i)
        os.closerange(len(kept), 2**16)
        confine.drop(cell, limits)
        os.chdir(base + "/work")
        act()
        confine.leave(0)
    except BaseException as fault:
        try:
            os.write(2, f"sandbox: {fault}\n".encode())
        finally:
            confine.leave(127)


def _null() -> int:
    return os.open(os.devnull, os.O_RDWR)


def _parts(name: str) -> list[str]:
    parts = name.split("/")
    if len(name) > NAME_CHARACTERS or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} is no path inside the working folder")
    return parts


def _open_inside(name: str, flags: int) -> int:
    """Open a file below the current folder; no step of the way may be a link."""
    *folders, last = _parts(name)
    at = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    for folder in folders:
        if flags & os.O_CREAT:
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700, dir_fd=at)
        below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
        os.close(at)
        at = below
    opened = os.open(last, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=at)
    os.close(at)
    return opened


def _write(cell: confine.Cell, base: str, link: socket.socket, message: Any, descriptors: list[int]) -> dict[str, Any]:
    def act() -> None:
        files = json.loads(os.pread(0, os.fstat(0).st_size, 0))
        for name, text in files.items():
            opened = _open_inside(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            data = memoryview(base64.b64decode(text))
            while data:
                data = data[os.write(opened, data) :]
            os.close(opened)

    return _own_work(cell, base, descriptors, act)


def _read(cell: confine.Cell, base: str, link: socket.socket, message: Any, descriptors: list[int]) -> dict[str, Any]:
    def act() -> None:
        found = {}
        for name in message["names"]:
            try:
                opened = _open_inside(name, os.O_RDONLY)
            except OSError:
                continue
            content = os.pread(opened, message["file_bytes"] + 1, 0) if os.fstat(opened).st_size else b""
            if len(content) <= message["file_bytes"]:
                found[name] = base64.b64encode(content).decode()
            os.close(opened)
        data = memoryview(json.dumps(found).encode())
        while data:
            data = data[os.write(0, data) :]

    return _own_work(cell, base, descriptors, act)


def _own_work(cell: confine.Cell, base: str, descriptors: list[int], act: Callable[[], None]) -> dict[str, Any]:
    reading, writing = os.pipe()
    null = _null()
    child = _confined(cell, OWN_WORK, base, [descriptors[0], null, writing], act)
    _close([*descriptors, writing, null])
    said = b""
    while part := os.read(reading, 2**16):
        said += part
    os.close(reading)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return {"error": said.decode(errors="replace").strip() or None if code else None, "exit": code}


def _run(cell: confine.Cell, base: str, link: socket.socket, message: Any, descriptors: list[int]) -> dict[str, Any]:
    total = watch.Totals(**message["totals"])
    environment = {"HOME": f"{base}/tmp", "TMPDIR": f"{base}/tmp", "LANG": "C.UTF-8", **message["env"]}
    argv = [word.replace("{work}", f"{base}/work") for word in message["argv"]]
    null = _null()
    started = time.monotonic()
    limits = confine.Limits(**message["limits"])
    child = _confined(cell, limits, base, [null, *descriptors], lambda: os.execvpe(argv[0], argv, environment))
    _close([null, *descriptors])
    process = os.pidfd_open(child)
    watcher = watch.Watcher(cell, base, total, alone=cell.level == confine.NAMESPACES)
    limit, status = None, None
    poller = select.poll()
    poller.register(process, select.POLLIN)
    poller.register(link, select.POLLIN)
    while limit is None:
        ready = {descriptor for descriptor, _ in poller.poll(watcher.pause_ms())}
        if process in ready:
            break
        if link.fileno() in ready:
            packet = link.recv(PACKET_BYTES)
            limit = json.loads(packet)["why"] if packet else "closed"
        else:
            limit = watcher.over(time.monotonic() - started)
    watcher.kill_all()
    os.close(process)
    status, usage = watcher.reap(child)
    return {
        "exit": os.waitstatus_to_exitcode(status),
        "limit": limit,
        "wall_s": time.monotonic() - started,
        "cpu_s": usage,
        "peak_bytes": watcher.peak_bytes,
    }
