"""How long the light commands take: `--help`, `plan`, `status`, and a finished run once more.

`python -m bench.commands` makes a smoke run in a temporary folder, times each command as a process of its own, prints a
table and writes `bench/results/commands.json`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from posttrain.host import machine
from posttrain.run.manifest import package_versions

POSTTRAIN = str(Path(sys.executable).parent / "posttrain")
RESULTS = Path(__file__).parent / "results" / "commands.json"
COMMANDS = (["--help"], ["plan", "smoke"], ["status"], ["status", "smoke"], ["run", "smoke"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.commands", description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, help="times that each command is run")
    repeats = parser.parse_args().repeats
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as runs:
        where = ["--runs-dir", runs]
        run_s = timed([POSTTRAIN, "run", "smoke", *where])
        rows: list[dict[str, Any]] = [{"command": "posttrain run smoke (new)", "seconds": [round(run_s, 4)]}]
        for words in COMMANDS:
            command = [POSTTRAIN, *words, *([] if words == ["--help"] else where)]
            seconds = [round(timed(command), 4) for _ in range(repeats)]
            name = " ".join(["posttrain", *words])
            rows.append({"command": f"{name} (finished)" if words[0] == "run" else name, "seconds": seconds})
    for row in rows:
        row |= {"median": statistics.median(row["seconds"]), "min": min(row["seconds"]), "max": max(row["seconds"])}
    show(rows)
    print(f"load average before: {load:.2f} on {os.cpu_count()} processors")
    facts = {"hardware": machine.facts(), "load_before": load}
    facts |= {"python": sys.version.split()[0], "packages": package_versions()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


def timed(command: list[str]) -> float:
    """Wall-clock seconds of one process, started to ended; it must succeed."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'command':34} {'times':>5} {'median s':>9} {'min s':>7} {'max s':>7}")
    for row in rows:
        numbers = f"{row['median']:9.3f} {row['min']:7.3f} {row['max']:7.3f}"
        print(f"{row['command']:34} {len(row['seconds']):5d} {numbers}")


if __name__ == "__main__":
    main()
