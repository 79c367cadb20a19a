"""Runs of the public command as child processes, killed or not, and what they must have in common."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

POSTTRAIN = [sys.executable, "-m", "posttrain"]
KILLED = -signal.SIGKILL
MEASURED = ("seconds", "tokens_per_second", "peak_flops_share", "peak_memory_bytes")
"""Metrics of a step that tell of the machine and are never the same twice."""
SMOKE = ["smoke", "--threads", "1", "--checkpoint-every-steps", "2"]


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("POSTTRAIN_FAULT")}
    return kept | extra


def posttrain(*arguments: str, fault: str | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """One command to its end; `fault` is a point at which it dies or finds the disk full."""
    extra = {} if fault is None else {"POSTTRAIN_FAULT": fault}
    return subprocess.run(
        [*POSTTRAIN, *arguments], env=environment(**extra), capture_output=True, text=True, timeout=timeout
    )


def smoke(runs_dir: Path, *flags: str, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    return posttrain("run", *SMOKE, "--runs-dir", str(runs_dir), *flags, fault=fault)


def smoke_killed_after(runs_dir: Path, seconds: float) -> int:
    """Start the smoke run and kill it with SIGKILL after so long; returns its exit code."""
    with open(os.devnull, "w") as nowhere:
        child = subprocess.Popen(
            [*POSTTRAIN, "run", *SMOKE, "--runs-dir", str(runs_dir)], env=environment(), stdout=nowhere, stderr=nowhere
        )
    time.sleep(seconds)
    child.kill()
    return child.wait()


def result(runs_dir: Path, phase: str, run: str = "smoke") -> dict:
    return json.loads((runs_dir / run / "phases" / phase / "result.json").read_text())


def essence(runs_dir: Path, run: str = "smoke") -> dict[str, object]:
    """All that must not depend on whether a run was killed: output digests, metrics without times, episodes."""
    found: dict[str, object] = {}
    phases = runs_dir / run / "phases"
    for folder in sorted(phases.iterdir()):
        stored = json.loads((folder / "result.json").read_text())
        found[f"{folder.name} outputs"] = sorted((output["path"], output["sha256"]) for output in stored["outputs"])
        found[f"{folder.name} state"] = stored["state"]
        found[f"{folder.name} counts"] = stored["counts"]
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (folder / name).exists():
                rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
                found[f"{folder.name} {name}"] = [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
    return found
