"""GRPO on two CPU cores against TRL's GRPOTrainer + PEFT, rollout and update: `python -m bench.grpo_cpu`.

One prompt of 512 tokens, a group of 8, 128 tokens each, never fewer; the reward is the share of even tokens.
"""

import argparse

import numpy as np

from bench import training
from bench.grpo_worker import GROUP, NEW
from bench.toy import VOCABULARY, random_rows

PROMPT = 512


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.grpo_cpu", description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    requests = [
        {"prompt": random_rows([PROMPT], seed)[0], "seed": seed} for seed in range(training.WARM_UP + options.steps)
    ]
    given = {
        "completions": random_rows([NEW] * GROUP, 100),
        "advantages": np.linspace(-1, 2, GROUP).tolist(),
        # About that of a random model, so that some ratios are clipped and some are not.
        "old": -float(np.log(VOCABULARY)),
    }
    requests[0] |= given
    training.run("grpo_cpu_256x4", "grpo", "samples", (256, 4), requests, [GROUP] * len(requests), full=False)


if __name__ == "__main__":
    main()
