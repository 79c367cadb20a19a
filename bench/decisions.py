"""How much of the way to the optimal policy GRPO went: `python -m bench.decisions RUN_FOLDER`, of `tes` or `duel`.

Per held-out decision the exact regret of the majority's action before and after GRPO; the interval is a paired
bootstrap over the decisions. Prints one JSON line.
"""

import json
import sys
from pathlib import Path

import numpy as np

from posttrain.run.journal import read_lines

DRAWS = 10_000


def parts(run: Path, phase: str) -> dict[str, dict[str, float]]:
    """Parts by task, of those whose majority could be scored."""
    lines = read_lines(run / "phases" / phase / "answers.jsonl")
    return {line["id"]: line["parts"] for line in lines if line["score"] is not None}


def main() -> None:
    run = Path(sys.argv[1])
    before, after = parts(run, "eval_opening"), parts(run, "eval_grpo")
    ids = sorted(before.keys() & after.keys())
    if not ids:
        raise SystemExit(f"{run} holds no two finished evaluations eval_opening and eval_grpo with scored decisions")
    regrets = np.array([[before[task]["regret"], after[task]["regret"]] for task in ids])
    values = np.array([[before[task]["q_value"], after[task]["q_value"]] for task in ids])
    rng = np.random.default_rng(0)
    drawn = regrets[rng.integers(len(ids), size=(DRAWS, len(ids)))].mean(axis=1)
    low, high = np.quantile(1 - drawn[:, 1] / drawn[:, 0], (0.025, 0.975))
    optimum = values[:, 0] + regrets[:, 0]
    print(
        json.dumps(
            {
                "run": run.name,
                "decisions": len(ids),
                "unscorable": len(before.keys() ^ after.keys()),
                "optimal_value": round(float(optimum.mean()), 3),
                "value_before": round(float(values[:, 0].mean()), 3),
                "value_after": round(float(values[:, 1].mean()), 3),
                "gap_closed": round(float(1 - regrets[:, 1].mean() / regrets[:, 0].mean()), 3),
                "interval_95": [round(float(low), 3), round(float(high), 3)],
            }
        )
    )


if __name__ == "__main__":
    main()
