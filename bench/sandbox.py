"""What the sandbox adds to running a program, per level: a function call graded, and a command in a fresh folder.

`python -m bench.sandbox` times, warm, `scoring.functions.judge` on a small function with six tests, and a session that
writes one file, runs `true` and ends, beside the same `true` started plainly; it prints median and 95th percentile in
milliseconds and writes `bench/results/sandbox.json`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.host import machine
from posttrain.sandbox.calls import Caller
from posttrain.sandbox.confine import LADDER, OFF
from posttrain.sandbox.level import probe
from posttrain.sandbox.slots import Pool
from posttrain.scoring.functions import judge

RESULTS = Path(__file__).parent / "results" / "sandbox.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sandbox", description=__doc__)
    parser.add_argument("--repeats", type=int, default=300, help="times that each is done")
    repeats = parser.parse_args().repeats
    load = os.getloadavg()[0]
    rows = [timed("plain", "true, started plainly", repeats, lambda n: subprocess.run(["true"], check=True))]
    for level in (*LADDER, OFF):
        found = probe(level)
        if not found.works:
            print(f"{level}: {found.reason}")
            continue
        with Caller(level) as caller:
            rows.append(timed(level, "one function, six tests", repeats, lambda n, caller=caller: graded(caller, n)))
        with Pool(level, 1) as pool:
            rows.append(timed(level, "true in a fresh folder", repeats, lambda n, pool=pool: command(pool)))
    print(f"{'level':14} {'what':26} {'median ms':>10} {'p95 ms':>8}")
    for row in rows:
        print(f"{row['level']:14} {row['what']:26} {row['median_ms']:10.2f} {row['p95_ms']:8.2f}")
    print(f"load average before: {load:.2f} on {os.cpu_count()} processors")
    facts = {"hardware": machine.facts(), "load_before": load, "python": sys.version.split()[0], "repeats": repeats}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


def graded(caller: Caller, n: int) -> None:
    found = judge(caller, f"def f(a):\n    return a + {n}\n", [[[k], k + n] for k in range(6)])
    assert found.passed == (True,) * 6


def command(pool: Pool) -> None:
    with pool.session() as session:
        session.write({"program.sh": "true"})
        assert session.run(["true"]).exit == 0


def timed(level: str, what: str, repeats: int, act: Callable[[int], Any]) -> dict[str, Any]:
    """The first is not counted: it starts the worker."""
    times = []
    for n in range(repeats + 1):
        started = time.perf_counter()
        act(n)
        times.append((time.perf_counter() - started) * 1000)
    ordered = sorted(times[1:])
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {"level": level, "what": what, "median_ms": round(statistics.median(ordered), 3), "p95_ms": round(p95, 3)}


if __name__ == "__main__":
    main()
