"""Evaluation of one model state: tasks as greedy episodes, pairs by their log-probability margin."""

import itertools
from collections import Counter
from typing import Any

import torch
from transformers import PreTrainedModel

from posttrain.chat.render import Renderer, renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.shard import Shard
from posttrain.engine.model import load_model
from posttrain.phases.context import PhaseContext, PhaseOutcome
from posttrain.phases.preference import margins, pair_item
from posttrain.recipe.types import EvaluatePhase
from posttrain.rollout.episodes import run_episodes, seed_of
from posttrain.rollout.sampler import Sampler
from posttrain.run import faults
from posttrain.run.folder import write_atomic
from posttrain.run.journal import as_line


def run(context: PhaseContext, phase: EvaluatePhase) -> PhaseOutcome:
    torch.set_num_threads(context.execution.threads)
    state = context.states[phase.model]
    model = load_model(context.base_folder(state), context.adapter_folder(state))
    render = renderer(context.recipe.chat, Tokenizer.load(context.base_folder(state)))
    sampler = Sampler(model, render.stop_tokens, phase.precision, context.execution.rollout_tokens)

    answers: list[dict[str, Any]] = []
    for name in phase.datasets:
        shard = Shard(context.dataset_folder(name))
        if shard.content == "pairs":
            answers += answer_pairs(context, phase, model, render, name, shard)
        else:
            answers += answer_tasks(context, phase, sampler, render, name, shard)
        faults.reach("evaluate.dataset_done")
    write_atomic(context.folder.answers, b"".join(as_line(answer) for answer in answers))
    return PhaseOutcome((context.folder.answers,), means(answers), counts(answers))


def answer_tasks(
    context: PhaseContext, phase: EvaluatePhase, sampler: Sampler, render: Renderer, name: str, shard: Shard
) -> list[dict[str, Any]]:
    tasks = [shard.row(number) for number in range(shard.num_rows)]
    # The first rows of the set serve as solved examples and are then not asked.
    shots, asked = tasks[: phase.shots], tasks[phase.shots :]
    seeds = [seed_of(context.recipe.seed, "evaluate", name, task["id"]) for task in asked]
    with context.progress(f"{phase.name}: {name}", len(asked), "episodes", 0) as progress:
        episodes = run_episodes(sampler, render, asked, seeds, phase.sampling, shots, advance=progress.advance)
    return [
        {
            "id": episode.task["id"],
            "dataset": name,
            "prompt": render.text(episode.prompt),
            "completion": render.text(episode.tokens),
            "score": episode.score.value,
            "parts": episode.score.parts,
            "reason": episode.score.reason,
            "ended": episode.ended,
        }
        for episode in episodes
        if episode.score is not None
    ]


def answer_pairs(
    context: PhaseContext, phase: EvaluatePhase, model: PreTrainedModel, render: Renderer, name: str, shard: Shard
) -> list[dict[str, Any]]:
    items = [pair_item(shard, number) for number in range(shard.num_rows)]
    margin_P = margins(model, items, phase.precision, context.execution.micro_batch_tokens).tolist()
    return [
        {
            "id": shard.row(number)["id"],
            "dataset": name,
            "prompt": render.text(item.prefix.tolist()),
            "completion": "\n".join(
                f"{kind}: {render.text(ids.tolist())}"
                for kind, ids in zip(("chosen", "rejected"), item.tokens, strict=True)
            ),
            "score": float(margin > 0),
            "parts": {"accuracy": float(margin > 0), "margin": margin},
            "reason": None,
        }
        for number, (item, margin) in enumerate(zip(items, margin_P, strict=True))
    ]


def means(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Mean score and mean of every part per dataset, over what could be scored."""
    metrics: dict[str, float] = {}
    for name, rows in itertools.groupby(answers, key=lambda answer: answer["dataset"]):
        scored = [row for row in rows if row["score"] is not None]
        columns: dict[str, list[float]] = {"score": [row["score"] for row in scored]}
        for row in scored:
            for part, value in row["parts"].items():
                columns.setdefault(part, []).append(value)
        metrics |= {f"{name}.{part}": sum(values) / len(values) for part, values in columns.items() if values}
    return metrics


def counts(answers: list[dict[str, Any]]) -> dict[str, int]:
    asked = Counter(f"{answer['dataset']}.asked" for answer in answers)
    unscorable = Counter(f"{answer['dataset']}.unscorable" for answer in answers if answer["score"] is None)
    return dict(asked | unscorable)
