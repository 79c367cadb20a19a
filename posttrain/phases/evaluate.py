"""Evaluation of one model state: tasks as episodes, once or by majority vote, pairs by their margin."""

import itertools
from collections import Counter
from typing import Any

from transformers import PreTrainedModel

from posttrain.chat.render import Renderer, renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.shard import Shard
from posttrain.engine.device import fuse_layers, prepare_device
from posttrain.engine.model import hold_frozen, load_model
from posttrain.phases.context import PhaseContext, PhaseOutcome
from posttrain.phases.preference import margins, pair_item
from posttrain.phases.sampling import sampler_for, show_weights
from posttrain.recipe.types import EvaluatePhase, Vote
from posttrain.rollout.episodes import Episode, run_episodes, seed_of
from posttrain.rollout.sampler import Sampler
from posttrain.run import faults
from posttrain.run.folder import write_atomic
from posttrain.run.journal import as_line
from posttrain.scoring.votes import majority, pass_at


def run(context: PhaseContext, phase: EvaluatePhase) -> PhaseOutcome:
    state = context.states[phase.model]
    model = load_model(
        context.base_folder(state),
        context.adapter_folder(state),
        device=prepare_device(context.execution, phase.precision),
        precision=phase.precision,
        packed=context.execution.base_weights == "packed",
    )
    hold_frozen(model, phase.precision)
    fuse_layers(model, phase.precision)
    render = renderer(context.recipe.chat, Tokenizer.load(context.base_folder(state)))

    answers: list[dict[str, Any]] = []
    with sampler_for(context, phase, model, render) as sampler:
        show_weights(sampler, context, model, 0)
        for name in phase.datasets:
            shard = Shard(context.dataset_folder(name))
            with context.interruptible():
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
    samples = phase.vote.samples if phase.vote else 1
    repeated = [task for task in asked for _ in range(samples)]
    seeds = [
        seed_of(context.recipe.seed, "evaluate", name, task["id"], number)
        for task in asked
        for number in range(samples)
    ]
    with context.progress(f"{phase.name}: {name}", len(repeated), "episodes", 0) as progress:
        episodes = run_episodes(sampler, render, repeated, seeds, phase.sampling, shots, advance=progress.advance)
    if phase.vote is None:
        return [as_answer(episode, name, render) for episode in episodes]
    groups = [episodes[at : at + samples] for at in range(0, len(episodes), samples)]
    return [as_voted_answer(group, phase.vote, name, render) for group in groups]


def as_answer(episode: Episode, name: str, render: Renderer) -> dict[str, Any]:
    """An episode as its line in answers.jsonl."""
    score = episode.score
    assert score is not None
    return {
        "id": episode.task["id"],
        "dataset": name,
        "prompt": render.text(episode.prompt),
        "completion": render.text(episode.tokens),
        "score": score.value,
        "parts": score.parts,
        "reason": score.reason,
        "ended": episode.ended,
    }


def as_voted_answer(group: list[Episode], vote: Vote, name: str, render: Renderer) -> dict[str, Any]:
    """A task's episodes as one line: the first that gave the winning answer, with what all of them say beside it."""
    scores = [episode.score for episode in group if episode.score is not None]
    answers = [score.answer for score in scores]
    winner = majority(answers)
    line = as_answer(group[answers.index(winner)] if winner is not None else group[0], name, render)
    if winner is None:
        line |= {"score": None, "reason": f"none of {vote.samples} samples has an answer"}
    known = [score.value for score in scores if score.value is not None]
    passed = sum(value >= vote.pass_mark for value in known)
    parts = {f"pass@{k}": pass_at(k, vote.samples, passed) for k in vote.pass_at}
    if known:
        parts |= {"mean": sum(known) / len(known), "agreement": answers.count(winner) / vote.samples}
    samples = [
        {
            "answer": score.answer,
            "score": score.value,
            "reason": score.reason,
            "completion": render.text(episode.tokens),
            "ended": episode.ended,
        }
        for episode, score in zip(group, scores, strict=True)
    ]
    return {**line, "parts": {**line["parts"], **parts}, "samples": samples}


def answer_pairs(
    context: PhaseContext, phase: EvaluatePhase, model: PreTrainedModel, render: Renderer, name: str, shard: Shard
) -> list[dict[str, Any]]:
    items = [pair_item(shard, number) for number in range(shard.num_rows)]
    margin_P = margins(model, items, phase.precision, context.micro_batch_tokens).tolist()
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
    samples = Counter(
        f"{answer['dataset']}.unscorable_samples"
        for answer in answers
        for sample in answer.get("samples", ())
        if sample["score"] is None
    )
    return dict(asked | unscorable | samples)
