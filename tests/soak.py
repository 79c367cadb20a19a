"""Kills the smoke run at random times, resumes it, and prints how many ended with the bits of an undisturbed run.

`python -m tests.soak [kills] [seed]`; `make soak` does a hundred.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.end_to_end.runs import KILLED, essence, smoke, smoke_killed_after


def main(kills: int = 100, seed: int = 0) -> int:
    chance, tally = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        first = smoke(Path(folder))
        if first.returncode:
            print(first.stdout + first.stderr)
            return 1
        whole_s, expected = time.perf_counter() - started, essence(Path(folder))
    print(f"undisturbed: {whole_s:.1f} s")
    for number in range(1, kills + 1):
        after_s = chance.uniform(0, whole_s)
        outcome = one_kill(after_s, expected)
        tally[outcome] += 1
        print(f"{number}/{kills}: killed after {after_s:.1f} s: {outcome}", flush=True)
    print(", ".join(f"{outcome}: {count}" for outcome, count in tally.most_common()))
    return 0 if set(tally) <= {"same bits", "had ended before the kill, same bits"} else 1


def one_kill(after_s: float, expected: dict[str, object]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        killed = smoke_killed_after(Path(folder), after_s)
        again = smoke(Path(folder))
        if again.returncode:
            return f"resume failed with exit code {again.returncode}"
        if essence(Path(folder)) != expected:
            return "OTHER BITS"
    return "same bits" if killed == KILLED else "had ended before the kill, same bits"


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
