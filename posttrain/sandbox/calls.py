"""Calls one function of a program on many inputs, in a warm worker, a fresh confined process for each program."""

import atexit
import json
import os
from collections.abc import Sequence
from typing import Any

from posttrain.sandbox import function, level
from posttrain.sandbox.slots import Lost, Slot


class Caller:
    """One warm worker; started on first use, started again after a fault."""

    def __init__(self, at_level: str | None = None) -> None:
        """`at_level` None: the level in use (`posttrain.sandbox.level`)."""
        self._level = at_level
        self._slot: Slot | None = None
        self.owner = os.getpid()

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._slot is not None:
            self._slot.close()

    @property
    def slot(self) -> Slot:
        if self._slot is None:
            self._slot = Slot("calls", self._level or level.chosen())
        return self._slot

    def run(self, source: str, inputs: Sequence[Sequence[Any]], called: str = "f") -> dict[str, Any]:
        """`{"values": [["value", repr] or ["fault", name], ...]}`, `{"failure": reason}`, or `{"unknown": reason}`
        where the program cannot be judged.

        A worker that a program took down with it is started again and tried once more; the second time the program
        has failed. MachineError when no worker can be started.
        """
        job = json.dumps({"source": source, "function": called, "inputs": list(inputs)}).encode()
        for _ in range(2):
            try:
                text, ended = self.slot.call(job, function.WALL_S)
            except Lost:
                self.slot.close()
                continue
            return _answer(text, ended)
        return {"failure": "it takes the sandbox down"}


def _answer(text: bytes, ended: dict[str, Any]) -> dict[str, Any]:
    if len(text) > function.ANSWER_BYTES:
        return {"failure": "its answer is too long"}
    if not ended["in_time"]:
        return {"unknown": f"no answer within {function.WALL_S:g} s"}
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        code = ended["exit"]
        how = f"signal {-code}" if code < 0 else f"exit {code}"
        return {"failure": f"it ended without an answer ({how})"}
    known = isinstance(answer, dict) and answer.keys() <= {"values", "failure"}
    return answer if known else {"failure": "its answer is no object"}


_shared: Caller | None = None


def shared() -> Caller:
    """This process's own, which ends with the process."""
    global _shared
    if _shared is None or _shared.owner != os.getpid():
        _shared = Caller()
        atexit.register(_shared.close)
    return _shared
