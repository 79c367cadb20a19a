"""Warm workers, from the side of whoever wants code to be run: function calls, and commands in a working folder.

A `Slot` owns one worker process (`posttrain.sandbox.worker`) and runs one job at a time; a `Pool` holds several slots
and hands them out to threads.
"""

import base64
import contextlib
import json
import os
import select
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import MachineError
from posttrain.sandbox import confine, function
from posttrain.sandbox.confine import Limits
from posttrain.sandbox.mirror import readable

START_WITHIN_S = 60.0
GRACE_S = 30.0
"""Beyond a job's own wall time, for a machine that is starved."""
PACKET_BYTES = 2**16
_START = (
    "import json, sys; package = sys.argv[1]; sys.path.append(package); from posttrain.sandbox import worker; "
    "sys.path.remove(package); worker.main(*json.loads(sys.argv[2]))"
)


@dataclass(frozen=True)
class Budget:
    """What one command may use; sums are over all processes it starts."""

    wall_s: float = 30.0
    cpu_s: int = 20
    """Of each process."""
    memory_bytes: int = 2**30
    address_bytes: int | None = None
    """Of each process; None leaves it to the sum of memory, which is looked at every few milliseconds."""
    file_bytes: int = 2**26
    open_files: int = 256
    processes: int = 64
    output_bytes: int = 2**20
    """Of each stream. What is beyond is not kept; a program that writes eight times as much is ended."""

    def limits(self) -> Limits:
        return Limits(self.cpu_s, self.address_bytes, self.file_bytes, self.open_files, self.processes)


@dataclass(frozen=True)
class Room:
    """The working folder of a session, and what of the machine can be seen from it beside the system's folders."""

    roots: tuple[str, ...] = ()
    bytes: int = 2**28
    files: int = 20_000


@dataclass(frozen=True)
class Finished:
    """How a command ended. `exit` is negative for a signal, `limit` names the total that was exceeded."""

    exit: int
    limit: str | None
    stdout: bytes
    stderr: bytes
    answers: bytes
    """What was written to descriptor 3, for drivers that hand values to the parent."""
    wall_s: float
    cpu_s: float
    peak_bytes: int


class Lost(Exception):
    """The worker is gone or does not answer."""


class Slot:
    """One worker. Started on first use, started again after it is lost; not for two threads at once."""

    def __init__(self, kind: str, level: str) -> None:
        self.kind, self.level = kind, level
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._stage: tempfile.TemporaryDirectory[str] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def stage(self) -> str | None:
        """The folder that the worker has on disk."""
        return self._stage.name if self._stage else None

    def close(self) -> None:
        """End the worker and remove its folder. Only the process that started them does it."""
        if self._owner != os.getpid():
            return
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(timeout=10.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._stage is not None:
            self._stage.cleanup()
            self._stage = None

    def start(self) -> socket.socket:
        """The control socket of a living worker; MachineError with the worker's reason where there can be none."""
        if self._owner != os.getpid():
            raise MachineError("a sandbox belongs to the process that made it")
        if self._control is not None and self._process is not None and self._process.poll() is None:
            return self._control
        self.close()
        self._stage = tempfile.TemporaryDirectory(prefix="posttrain-sandbox-", ignore_cleanup_errors=True)
        os.chmod(self._stage.name, 0o711)
        os.mkdir(self._stage.name + "/empty", 0o555)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        home = readable(sys.base_prefix, self.level)
        python = home + "/" + os.path.relpath(os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix))
        arguments = json.dumps([self.kind, self.level, self._stage.name, [home], theirs.fileno()])
        package = str(Path(confine.__file__).resolve().parents[2])
        environment = {"PYTHONHASHSEED": "0"}
        if home != os.path.realpath(sys.base_prefix):
            environment["LD_LIBRARY_PATH"] = home + "/lib"
        # Like -I, but the hash seed can be fixed: a program that walks a set must give one value, not several.
        command = [python, "-s", "-S", "-P", "-c", _START, package, arguments]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=self._stage.name,
                env=environment,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )
        except OSError as error:
            ours.close()
            raise MachineError(f"the sandbox cannot start {python}: {error}") from error
        finally:
            theirs.close()
        self._control = ours
        try:
            said = self._receive(START_WITHIN_S)
        except Lost as error:
            said = {"error": f"its worker {error}"}
        if "error" in said:
            self.close()
            raise MachineError(f"sandbox level {self.level!r} cannot be had: {said['error']}")
        return ours

    def _receive(self, within_s: float) -> dict[str, Any]:
        assert self._control is not None
        return _receive(self._control, within_s)

    def call(self, job: bytes, wall_s: float) -> tuple[bytes, dict[str, Any]]:
        """Run a job of `posttrain.sandbox.function`: what it wrote, and how its process ended.

        `Lost` when the worker did not survive it.
        """
        control = self.start()
        reading, writing = os.pipe()
        try:
            file = _memory_file(job)
            try:
                socket.send_fds(control, [json.dumps({"do": "call", "wall_s": wall_s}).encode()], [file, writing])
            except OSError as error:
                raise Lost("has gone") from error
            finally:
                os.close(file)
                os.close(writing)
            answer = _read_up_to(reading, function.ANSWER_BYTES, wall_s + GRACE_S)
        finally:
            os.close(reading)
        return answer, self._receive(wall_s + GRACE_S)

    @contextlib.contextmanager
    def session(self, room: Room) -> Iterator["Session"]:
        """A fresh working folder; gone, with every process, at the end. MachineError where there can be none."""
        control = self.start()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        roots = [readable(root, self.level) for root in room.roots]
        message = {"do": "open", "roots": roots, "room_bytes": room.bytes, "room_files": room.files}
        try:
            socket.send_fds(control, [json.dumps(message).encode()], [theirs.fileno()])
            theirs.close()
            said = _receive(ours, START_WITHIN_S)
            if "error" in said:
                raise MachineError(f"sandbox level {self.level!r} gives no working folder: {said['error']}")
            yield Session(ours, room, self.level)
        except (Lost, OSError) as error:
            self.close()
            raise MachineError(f"the sandbox's worker {error}") from error
        finally:
            ours.close()
            theirs.close()
            if self._control is not None:
                try:
                    self._receive(START_WITHIN_S)
                except Lost:
                    self.close()


def _receive(link: socket.socket, within_s: float) -> dict[str, Any]:
    if not select.select([link], [], [], within_s)[0]:
        raise Lost(f"did not answer within {within_s:g} s")
    try:
        packet = link.recv(PACKET_BYTES)
    except OSError as error:
        raise Lost("has gone") from error
    if not packet:
        raise Lost("has gone")
    said: dict[str, Any] = json.loads(packet)
    return said


def _memory_file(data: bytes) -> int:
    file = os.memfd_create("job")
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
    return file


def _read_up_to(descriptor: int, most: int, within_s: float) -> bytes:
    deadline, data = time.monotonic() + within_s, b""
    while len(data) <= most and (left := deadline - time.monotonic()) > 0:
        if not select.select([descriptor], [], [], left)[0]:
            break
        part = os.read(descriptor, 2**16)
        if not part:
            break
        data += part
    return data


@dataclass
class _Stream:
    kept: int
    data: bytearray = field(default_factory=bytearray)
    seen: int = 0

    def take(self, part: bytes) -> bool:
        """False when the program writes far more than is kept."""
        self.seen += len(part)
        self.data += part[: self.kept - len(self.data)]
        return self.seen <= 8 * self.kept


class Session:
    """A working folder and what runs in it; made by `Slot.session` or `Pool.session`."""

    def __init__(self, link: socket.socket, room: Room, level: str) -> None:
        self._link, self._room, self._level = link, room, level

    def place(self, path: str) -> str:
        """Where a path of the room's roots is seen from inside."""
        for root in self._room.roots:
            if path == root or path.startswith(root + "/"):
                return readable(root, self._level) + path[len(root) :]
        return path

    def write(self, files: Mapping[str, str | bytes]) -> None:
        """Files by their path below the working folder; MachineError where one cannot be written."""
        encoded = {
            name: base64.b64encode(text.encode() if isinstance(text, str) else text).decode()
            for name, text in files.items()
        }
        file = _memory_file(json.dumps(encoded).encode())
        said = self._ask({"do": "write"}, [file])
        if said["exit"] != 0:
            raise MachineError(f"files could not be written into the sandbox: {said['error'] or said['exit']}")

    def read(self, names: Sequence[str], file_bytes: int = 2**20) -> dict[str, bytes]:
        """Those of the files that are there, are plain and are no longer than this."""
        reading, writing = os.pipe()
        try:
            self._send({"do": "read", "names": list(names), "file_bytes": file_bytes}, [writing])
            text = _read_up_to(reading, len(names) * (2 * file_bytes + 2**12), START_WITHIN_S)
        finally:
            os.close(reading)
        _receive(self._link, START_WITHIN_S)
        return {name: base64.b64decode(data) for name, data in json.loads(text or b"{}").items()}

    def run(
        self, argv: Sequence[str], budget: Budget | None = None, environment: Mapping[str, str] | None = None
    ) -> Finished:
        """Run one command in the working folder (`{work}` in a word is its path) and end all that it started."""
        budget = budget or Budget()
        totals = {
            "wall_s": budget.wall_s,
            "memory_bytes": budget.memory_bytes,
            "room_bytes": self._room.bytes,
            "room_files": self._room.files,
            "processes": budget.processes,
        }
        message = {
            "do": "run",
            "argv": list(argv),
            "env": {"PATH": "/usr/local/bin:/usr/bin:/bin", **(environment or {})},
            "limits": asdict(budget.limits()),
            "totals": totals,
        }
        pipes = [os.pipe() for _ in range(3)]
        try:
            self._send(message, [writing for _, writing in pipes])
            return self._collect([reading for reading, _ in pipes], budget)
        finally:
            for reading, _ in pipes:
                os.close(reading)

    def _ask(self, message: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        self._send(message, descriptors)
        return _receive(self._link, START_WITHIN_S + GRACE_S)

    def _send(self, message: dict[str, Any], descriptors: list[int]) -> None:
        """The descriptors are handed over: closed here whatever happens."""
        try:
            socket.send_fds(self._link, [json.dumps(message).encode()], descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _collect(self, readings: list[int], budget: Budget) -> Finished:
        streams = {reading: _Stream(budget.output_bytes) for reading in readings}
        deadline, told, said = time.monotonic() + budget.wall_s + GRACE_S, False, None
        with selectors.DefaultSelector() as selector:
            for source in (*readings, self._link.fileno()):
                selector.register(source, selectors.EVENT_READ)
            while selector.get_map():
                events = selector.select(deadline - time.monotonic())
                if not events:
                    raise Lost(f"did not end a command of {budget.wall_s:g} s")
                for key, _ in events:
                    if key.fd == self._link.fileno():
                        said = _receive(self._link, 0)
                        selector.unregister(key.fd)
                        continue
                    part = os.read(key.fd, 2**16)
                    if not part:
                        selector.unregister(key.fd)
                    elif not streams[key.fd].take(part) and not told and said is None:
                        told = True
                        self._link.send(json.dumps({"why": f"output of {8 * budget.output_bytes} bytes"}).encode())
        assert said is not None
        out, err, answers = (bytes(streams[reading].data) for reading in readings)
        return Finished(
            said["exit"], said["limit"], out, err, answers, said["wall_s"], said["cpu_s"], said["peak_bytes"]
        )


class Pool:
    """Up to `slots` workers for commands, started as they are needed, shared by threads."""

    def __init__(self, level: str, slots: int) -> None:
        self.level = level
        self._idle: list[Slot] = []
        self._all: list[Slot] = []
        self._free = threading.Semaphore(slots)
        self._lock = threading.Lock()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def session(self, room: Room | None = None) -> Iterator[Session]:
        """Waits for a free slot."""
        with self._free:
            with self._lock:
                slot = self._idle.pop() if self._idle else Slot("commands", self.level)
                if slot not in self._all:
                    self._all.append(slot)
            try:
                with slot.session(room or Room()) as session:
                    yield session
            finally:
                with self._lock:
                    self._idle.append(slot)

    def pids(self) -> list[int]:
        return [slot.pid for slot in self._all if slot.pid is not None]

    def stages(self) -> list[str]:
        return [slot.stage for slot in self._all if slot.stage is not None]

    def close(self) -> None:
        for slot in self._all:
            slot.close()
        self._all.clear()
        self._idle.clear()
