"""What GRPO taught the tiny base, on held-out tasks: `python -m bench.learning RUN_FOLDER ...`.

For the GRPO phase of each run, between the evaluations of its input and its output. On decisions: the exact value of
the sampled actions before and after, of the majority's, of the best ones, and of playing by rules, and which share of
the gap between the model before, as it samples, and the optimum each closes. On other tasks: the share that passes.
Intervals are paired bootstraps over the tasks. Prints tables and puts each run's numbers, under its recipe's name, into
`bench/results/learning.json`.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.shard import Shard
from posttrain.host import machine
from posttrain.recipe.types import EvaluatePhase, GrpoPhase, PreparePhase, Recipe
from posttrain.report.statistics import compare
from posttrain.run import recipe_file
from posttrain.run.journal import read_lines
from posttrain.run.manifest import package_versions

RESULTS = Path(__file__).parent / "results" / "learning.json"
DRAWS = 10_000
Answers = dict[str, dict[str, Any]]
Numbers = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="finished runs")
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for run in parser.parse_args().runs:
        recipe = recipe_file.load(run / "recipe.json")
        numbers = measured(run, recipe)
        show(recipe.name, numbers)
        stored[recipe.name] = {**numbers, "packages": package_versions(), "python": sys.version.split()[0]}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(stored, indent=2) + "\n")


def measured(run: Path, recipe: Recipe) -> Numbers:
    phase = next(one for one in recipe.phases if isinstance(one, GrpoPhase))
    before, after = (answers(run, recipe, model) for model in (phase.model, phase.name))
    seconds = {one.name: result(run, one.name)["seconds"] for one in recipe.phases}
    numbers = {
        "flags": recipe.flags,
        "grpo_seconds": round(seconds[phase.name], 1),
        "run_seconds": round(sum(seconds.values()), 1),
        "hardware": machine.facts(),
        "load": round(os.getloadavg()[0], 2),
    }
    if any("regret" in answer["parts"] for answer in before.values()):
        return numbers | decisions(before, after, heldout(run, recipe, before))
    return numbers | passes(before, after, "hidden")


def result(run: Path, phase: str) -> Numbers:
    stored: Numbers = json.loads((run / "phases" / phase / "result.json").read_text())
    return stored


def answers(run: Path, recipe: Recipe, model: str) -> Answers:
    """A model's answers to the tasks that GRPO trains on the like of, by task."""
    for phase in recipe.phases:
        if isinstance(phase, EvaluatePhase) and phase.model == model and not phase.shots:
            lines = read_lines(run / "phases" / phase.name / "answers.jsonl")
            return {line["id"]: line for line in lines if line["dataset"] in ("heldout", "repair")}
    raise SystemExit(f"{run}: no evaluation of {model}, so there is nothing to compare")


def heldout(run: Path, recipe: Recipe, asked: Answers) -> dict[str, Numbers]:
    """What the tasks know of their actions, by task."""
    prepare = next(one for one in recipe.phases if isinstance(one, PreparePhase))
    shard = Shard(run / "phases" / prepare.name / "data" / "heldout")
    rows = map(shard.row, range(shard.num_rows))
    return {row["id"]: row["reference"] for row in rows if row["id"] in asked}


def decisions(before: Answers, after: Answers, tasks: dict[str, Numbers]) -> Numbers:
    """A decision whose majority names no action on one side is left out on both, and counted."""
    ids = [task for task in tasks if before[task]["score"] is not None and after[task]["score"] is not None]
    value_TA = np.array([tasks[task]["q_values"] for task in ids])
    best_T = value_TA.max(axis=1)
    # As it samples: of a model that has not decided yet, a majority is the lowest action more often than any other.
    first_T, last_T = (
        np.array([sampled_value(side[task], tasks[task]["q_values"]) for task in ids]) for side in (before, after)
    )
    first_vote_T, last_vote_T = (np.array([side[task]["parts"]["q_value"] for task in ids]) for side in (before, after))
    drawn = np.random.default_rng(0).integers(len(ids), size=(DRAWS, len(ids)))

    def closed(value_T: np.ndarray) -> Numbers:
        """Of the gap between the model before and the optimum, with the interval of the ratio of means."""
        left_T, gap_T = best_T - value_T, best_T - first_T
        low, high = np.quantile(1 - left_T[drawn].mean(axis=1) / gap_T[drawn].mean(axis=1), (0.025, 0.975))
        share = 1 - left_T.mean() / gap_T.mean()
        return {
            "value": round(float(value_T.mean()), 3),
            "gap_closed": round(float(share), 3),
            "interval_95": [round(float(low), 3), round(float(high), 3)],
        }

    places = np.arange(len(ids))
    policies = {"before": first_T, "after": last_T, "before, by vote": first_vote_T, "after, by vote": last_vote_T}
    policies |= {"optimal": best_T, "uniform": value_TA.mean(axis=1)}
    policies |= {f"always {action}": value_TA[:, action] for action in range(value_TA.shape[1])}
    for rule in tasks[ids[0]].get("rules", {}):
        policies[rule] = value_TA[places, [tasks[task]["rules"][rule] for task in ids]]
    return {
        "decisions": len(ids),
        "unscorable": len(tasks) - len(ids),
        "policies": {name: closed(value_T) for name, value_T in policies.items()},
    }


def sampled_value(answer: Numbers, q_values: list[float]) -> float:
    """Of the samples that name an action, the mean."""
    named = [int(sample["answer"]) for sample in answer["samples"] if sample["score"] is not None]
    return float(np.mean([q_values[action] for action in named]))


def passes(before: Answers, after: Answers, part: str) -> Numbers:
    """The share of tasks whose `part` is whole."""
    sides = (
        [(task, None if one["score"] is None else float(one["parts"][part] == 1)) for task, one in side.items()]
        for side in (before, after)
    )
    compared = compare(*sides)
    assert compared.interval is not None
    return {
        "tasks": compared.pairs,
        "unscorable": compared.unscorable,
        "pass_rate_before": round(compared.before_mean, 3),
        "pass_rate_after": round(compared.after_mean, 3),
        "difference": round(compared.difference, 3),
        "interval_95": [round(compared.interval.low, 3), round(compared.interval.high, 3)],
    }


def show(name: str, numbers: Numbers) -> None:
    print(f"{name}: GRPO {numbers['grpo_seconds']} s, all phases {numbers['run_seconds']} s, load {numbers['load']}")
    if "policies" not in numbers:
        print(
            f"  {numbers['tasks']} tasks: {numbers['pass_rate_before']:.1%} → {numbers['pass_rate_after']:.1%}, "
            f"difference {numbers['difference']:+.1%} {numbers['interval_95']}, {numbers['unscorable']} unscorable"
        )
        return
    print(f"  {numbers['decisions']} decisions, {numbers['unscorable']} unscorable")
    print(f"  {'policy':20} {'value':>8} {'gap closed':>11}  95 % interval")
    for policy, one in numbers["policies"].items():
        low, high = one["interval_95"]
        print(f"  {policy:20} {one['value']:8.3f} {one['gap_closed']:11.1%}  {low:.1%} to {high:.1%}")


if __name__ == "__main__":
    main()
