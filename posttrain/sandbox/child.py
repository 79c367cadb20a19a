"""Grades small programs that a model wrote, in child processes.

The interim isolation: a clean environment, an empty working folder, no inherited descriptors, limits on steps, CPU,
memory, file size, descriptors and processes, the user `nobody` where we are root, and expected answers that stay here.
It does not cover: reading files that are open to everyone, the network, shared memory, or a kernel exploit. The full
sandbox replaces it.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from posttrain.errors import MachineError
from posttrain.sandbox import server

CACHED_GRADES = 50_000
ANSWER_WITHIN_S = server.WALL_S + 15.0


@dataclass(frozen=True)
class Grade:
    """One verdict per test; `passed` None: the sandbox could not tell, and a reward made of it would be luck."""

    passed: tuple[bool, ...] | None
    reason: str | None


class Sandbox:
    """A warm server process that forks for each program; started on first use, restarted after a fault."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._owner = os.getpid()
        self._grades: dict[str, Grade] = {}

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server and remove its folder. Only the process that started them does it."""
        if self._owner != os.getpid():
            return
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._folder = tempfile.TemporaryDirectory(prefix="posttrain-sandbox-")
            os.chmod(self._folder.name, 0o555)
            program = str(Path(server.__file__).resolve())
            # Like -I, but the hash seed can be fixed: a program that walks a set must give one value, not several.
            command = [sys.executable, "-s", "-S", "-P", program]
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    cwd=self._folder.name,
                    env={"PYTHONHASHSEED": "0"},
                    start_new_session=True,
                )
            except OSError as error:
                raise MachineError(f"the sandbox cannot start {sys.executable}: {error}") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def run(self, source: str, inputs: Sequence[Sequence[Any]], function: str = "f") -> dict[str, Any]:
        """The server's answer (`posttrain.sandbox.server`).

        A server that a program took down with it is started again and tried once more; the second time the program
        has failed. MachineError when no server can be started.
        """
        if self._owner != os.getpid():
            raise MachineError("a sandbox belongs to the process that made it")
        job = json.dumps({"source": source, "function": function, "inputs": list(inputs)}).encode() + b"\n"
        for _ in range(2):
            line = self._ask(job)
            if line.endswith(b"\n"):
                answer: dict[str, Any] = json.loads(line)
                return answer
            self.close()
        return {"failure": "it takes the sandbox down"}

    def _ask(self, job: bytes) -> bytes:
        writing, reading = self._pipes()
        try:
            writing.write(job)
            writing.flush()
            return reading.readline() if select.select([reading], [], [], ANSWER_WITHIN_S)[0] else b""
        except OSError:
            return b""

    def grade(self, source: str, tests: Sequence[Sequence[Any]]) -> Grade:
        """Call `f` on each test's arguments and compare with its expected value, by type and value."""
        key = json.dumps([source, tests])
        if key not in self._grades:
            try:
                answer = self.run(source, [arguments for arguments, _ in tests])
            except MachineError as error:
                return Grade(None, str(error))
            if "unknown" in answer:
                return Grade(None, str(answer["unknown"]))
            if len(self._grades) >= CACHED_GRADES:
                self._grades.clear()
            self._grades[key] = _judge(answer, [expected for _, expected in tests])
        return self._grades[key]


def _judge(answer: dict[str, Any], expected: Sequence[Any]) -> Grade:
    values = answer.get("values")
    if not isinstance(values, list) or len(values) != len(expected):
        return Grade((False,) * len(expected), str(answer.get("failure", "its answer has another length")))
    passed = tuple(value == ["value", repr(wanted)] for value, wanted in zip(values, expected, strict=True))
    return Grade(passed, None)


_shared: Sandbox | None = None


def grade(source: str, tests: Sequence[Sequence[Any]]) -> Grade:
    """Grade with this process's shared sandbox, which ends with the process."""
    global _shared
    if _shared is None or _shared._owner != os.getpid():
        _shared = Sandbox()
        atexit.register(_shared.close)
    return _shared.grade(source, tests)
