"""The log of one attempt: what the terminal showed, as plain redacted lines."""

import re
import time
from pathlib import Path

from posttrain.run.folder import RunFolder
from posttrain.run.redaction import redact

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\r")


class AttemptLog:
    """Appends lines with their time of day, each flushed at once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the attempt)

    def write(self, text: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        for line in ESCAPES.sub("", redact(text)).splitlines():
            self.file.write(f"{stamp} {line}\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def log_path(run: RunFolder, attempt: int) -> Path:
    return run.logs / f"attempt-{attempt:04d}.log"
