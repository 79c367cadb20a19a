"""Evaluation of one model state: tasks as episodes, once or several times each, pairs by their margin."""

from collections import Counter
from collections.abc import Callable
from itertools import groupby, pairwise
from typing import Any

from transformers import PreTrainedModel

from posttrain.chat.render import Renderer, renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.formats.evaluation import GROUPS
from posttrain.data.shard import Shard
from posttrain.engine.device import fuse_layers, prepare_device
from posttrain.engine.model import hold_frozen, load_model
from posttrain.phases.context import PhaseContext, PhaseOutcome, Progress
from posttrain.phases.preference import margins, pair_item
from posttrain.phases.sampling import sampler_for, show_weights
from posttrain.recipe.types import EvaluatePhase, Vote
from posttrain.rollout.episodes import Episode, run_episodes, seed_of
from posttrain.rollout.sampler import Sampler
from posttrain.run import faults
from posttrain.run.folder import write_atomic
from posttrain.run.journal import as_line
from posttrain.scoring.score import Score
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
                    tasks = [shard.row(number) for number in range(shard.num_rows)]
                    answers += answer_tasks(sampler, render, phase, name, tasks, context.recipe.seed, context.progress)
            faults.reach("evaluate.dataset_done")
    write_atomic(context.folder.answers, b"".join(as_line(answer) for answer in answers))
    return PhaseOutcome((context.folder.answers,), means(answers), counts(answers))


def answer_tasks(
    sampler: Sampler,
    render: Renderer,
    phase: EvaluatePhase,
    name: str,
    tasks: list[dict[str, Any]],
    seed: int,
    show: Callable[[str, float, str, float], Progress],
) -> list[dict[str, Any]]:
    # The first rows of the set serve as solved examples and are then not asked.
    shots, asked = tasks[: phase.shots], tasks[phase.shots :]
    samples = phase.vote.samples if phase.vote else 1
    repeated = [task for task in asked for _ in range(samples)]
    seeds = [seed_of(seed, "evaluate", name, task["id"], number) for task in asked for number in range(samples)]
    with show(f"{phase.name}: {name}", len(repeated), "episodes", 0) as progress:
        episodes = run_episodes(sampler, render, repeated, seeds, phase.sampling, shots, advance=progress.advance)
    if phase.vote is None:
        return [as_answer(episode, name, render) for episode in episodes]
    groups = [episodes[at : at + samples] for at in range(0, len(episodes), samples)]
    return [as_voted_answer(group, phase.vote, name, render) for group in groups]


def as_answer(episode: Episode, name: str, render: Renderer) -> dict[str, Any]:
    """An episode as its line in answers.jsonl."""
    score = episode.score
    assert score is not None
    metadata = episode.task["prompt"].get("metadata") or {}
    return {
        "id": episode.task["id"],
        "dataset": name,
        **{group: metadata[group] for group in GROUPS if group in metadata},
        "prompt": render.text(episode.prompt),
        "completion": render.text(episode.tokens),
        "score": score.value,
        "parts": score.parts,
        "reason": score.reason,
        "ended": episode.ended,
        "turns": sum(now and not before for before, now in pairwise([False, *episode.sampled])),
        "new_tokens": sum(episode.sampled),
    }


def as_voted_answer(group: list[Episode], vote: Vote, name: str, render: Renderer) -> dict[str, Any]:
    """A task's episodes as one line, with what all of them say beside it."""
    scores = [episode.score for episode in group if episode.score is not None]
    line = {"majority": by_majority, "mean": by_mean}[vote.counts](group, scores, name, render)
    passed = sum(score.value is not None and score.value >= vote.pass_mark for score in scores)
    parts = {f"pass@{k}": pass_at(k, vote.samples, passed) for k in vote.pass_at}
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


def by_majority(group: list[Episode], scores: list[Score], name: str, render: Renderer) -> dict[str, Any]:
    """The first episode that gave the winning answer."""
    answers = [score.answer for score in scores]
    winner = majority(answers)
    if winner is None:
        line = as_answer(group[0], name, render)
        return line | {"score": None, "reason": f"none of {len(group)} samples has an answer"}
    line = as_answer(group[answers.index(winner)], name, render)
    known = [score.value for score in scores if score.value is not None]
    told = {"mean": sum(known) / len(known), "agreement": answers.count(winner) / len(group)}
    return line | {"parts": line["parts"] | told}


def by_mean(group: list[Episode], scores: list[Score], name: str, render: Renderer) -> dict[str, Any]:
    """The first episode, with the mean score and mean parts of those that could be scored."""
    line, known = as_answer(group[0], name, render), [score for score in scores if score.value is not None]
    if not known:
        return line
    parts = {part: sum(score.parts[part] for score in known) / len(known) for part in known[0].parts}
    value = sum(score.value or 0.0 for score in known) / len(known)
    return line | {"score": value, "parts": parts, "reason": None}


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
    for name, rows in groupby(answers, key=lambda answer: answer["dataset"]):
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
