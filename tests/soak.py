"""Kills the smoke run at random times until it has died often enough; every run must end with the undisturbed bits.

`python -m tests.soak [--kills 100] [--seed 0]`; also `make soak`. A run is killed again and again until it once gets to
its end, then it is compared. What is made is removed, but a run that ended differently stays and is named.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.run.journal import read_lines
from tests.end_to_end.runs import KILLED, essence, smoke, smoke_killed_after


@dataclass
class Tally:
    """What has happened so far."""

    wanted: int
    kills: int = 0
    landed: Counter[str] = field(default_factory=Counter)
    """Kills by what the run was doing when it died."""
    equal: int = 0
    faults: list[str] = field(default_factory=list)
    """Runs that ended with other bits, or did not end well; one line each."""

    def lines(self) -> Iterator[str]:
        yield f"kills: {self.kills}"
        for place, count in self.landed.most_common():
            yield f"  {count:4d}  {place}"
        yield f"runs with the bits of the undisturbed one: {self.equal}"
        yield f"runs without: {len(self.faults)}"
        yield from (f"  {fault}" for fault in self.faults)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs to land in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times at which they come")
    asked = parser.parse_args()
    chance, tally = random.Random(asked.seed), Tally(asked.kills)
    place = Path(tempfile.mkdtemp(prefix="posttrain-soak-"))
    try:
        started = time.perf_counter()
        first = smoke(place / "undisturbed")
        whole_s = time.perf_counter() - started
        if first.returncode:
            print(first.stdout + first.stderr)
            return 1
        print(f"undisturbed: {whole_s:.1f} s", flush=True)
        expected = essence(place / "undisturbed")
        number = 0
        while tally.kills < tally.wanted:
            number += 1
            one_run(place / f"run-{number}", expected, whole_s, chance, tally)
    finally:
        print("\n".join(tally.lines()), flush=True)
        shutil.rmtree(place / "undisturbed", ignore_errors=True)
        if not any(place.iterdir()):
            place.rmdir()
    return 1 if tally.faults else 0


def one_run(runs: Path, expected: dict[str, object], whole_s: float, chance: random.Random, tally: Tally) -> None:
    """Kill a run until it ends, then compare it; its folder goes unless it differs."""
    died = 0
    while tally.kills < tally.wanted:
        attempts, after_s = count(runs, "attempt_started"), chance.uniform(0, whole_s)
        code = smoke_killed_after(runs, after_s)
        if code == 0:
            break
        if code != KILLED:
            tally.faults.append(f"{runs.name}: exit code {code} after {died} kills; it lies in {runs}")
            return
        died += 1
        tally.kills += 1
        place = doing(runs, attempts)
        tally.landed[place] += 1
        print(f"{tally.kills}/{tally.wanted}  {runs.name}: killed after {after_s:4.1f} s, {place}", flush=True)
    last = smoke(runs)
    if last.returncode:
        tally.faults.append(f"{runs.name}: exit code {last.returncode} after {died} kills; it lies in {runs}")
        print(last.stdout + last.stderr)
        return
    found = essence(runs)
    differing = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    if differing:
        tally.faults.append(f"{runs.name}: after {died} kills {', '.join(sorted(differing))} differ; it lies in {runs}")
    else:
        tally.equal += 1
        shutil.rmtree(runs)
    print(f"{runs.name}: {'OTHER BITS' if differing else 'same bits'} after {died} kills", flush=True)


def count(runs: Path, event: str) -> int:
    return sum(one["event"] == event for one in read_lines(runs / "smoke" / "events.jsonl"))


def doing(runs: Path, attempts_before: int) -> str:
    """What the last attempt was doing when it died, as its journal tells."""
    if count(runs, "attempt_started") == attempts_before:
        return "before the attempt began"
    place = ""
    for event in read_lines(runs / "smoke" / "events.jsonl"):
        match event["event"]:
            case "attempt_started":
                place = "looking at what there is"
            case "phase_started" | "phase_resumed":
                place = f"in {event['phase']}"
            case "phase_completed":
                place = "between phases"
            case "run_completed":
                place = "writing the report"
    return place


if __name__ == "__main__":
    sys.exit(main())
