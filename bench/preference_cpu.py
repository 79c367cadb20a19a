"""IPO on two CPU cores against TRL + PEFT, the reference pass included: `python -m bench.preference_cpu`.

Prompts of about 150 tokens, answers of about 90. A request is what a phase does: the reference's pass over all pairs,
then steps of four. The peer's cells make that pass with each step, or "ahead" over all pairs as ours does.
"""

import argparse

import numpy as np

from bench import training
from bench.toy import random_rows
from bench.worker import PAIRS_PER_STEP

WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.preference_cpu", description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a request")
    parser.add_argument("--requests", type=int, default=5)
    options = parser.parse_args()
    count = options.steps * PAIRS_PER_STEP
    requests = []
    for seed in range(WARM_UP + options.requests):
        rng = np.random.default_rng(seed)
        lengths = [
            (int(rng.integers(130, 171)), int(rng.integers(70, 111)), int(rng.integers(70, 111))) for _ in range(count)
        ]
        requests.append({"pairs": [random_rows(list(three), seed * 100 + i) for i, three in enumerate(lengths)]})
    units = [count] * len(requests)
    training.run("preference_cpu_256x4", "preference", "pairs", (256, 4), requests, units, full=True, warm_up=WARM_UP)


if __name__ == "__main__":
    main()
