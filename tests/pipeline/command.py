"""Runs the public command as a child process, and compares what two runs made."""

import os
import subprocess
import sys
from pathlib import Path

from posttrain.run.folder import digest_file, files_below

SMALL = str(Path(__file__).with_name("small_recipe.py"))


def posttrain(*words: object, cwd: Path, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "POSTTRAIN_FAULT"}
    if fault is not None:
        environment["POSTTRAIN_FAULT"] = fault
    command = [sys.executable, "-m", "posttrain", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def made_by(run: Path) -> dict[str, str]:
    """Digest of everything the phases and the base made; results carry times and are compared by their outputs."""
    made = {}
    for part in ("phases", "base"):
        for file in files_below(run / part):
            if file.name != "result.json":
                made[str(file.relative_to(run))] = digest_file(file)
    return made
