"""IPO on two CPU cores against TRL + PEFT, the reference pass included: `python -m bench.preference_cpu`.

Prompts of about 150 tokens, answers of about 90, four pairs a step.
"""

import argparse

import numpy as np

from bench import training
from bench.toy import random_rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.preference_cpu", description=__doc__)
    parser.add_argument("--pairs-per-step", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    requests = []
    for seed in range(training.WARM_UP + options.steps):
        rng = np.random.default_rng(seed)
        lengths = [
            (int(rng.integers(130, 171)), int(rng.integers(70, 111)), int(rng.integers(70, 111)))
            for _ in range(options.pairs_per_step)
        ]
        requests.append({"pairs": [random_rows(list(three), seed * 100 + i) for i, three in enumerate(lengths)]})
    units = [options.pairs_per_step] * len(requests)
    training.run("preference_cpu_256x4", "preference", "pairs", (256, 4), requests, units, full=True)


if __name__ == "__main__":
    main()
