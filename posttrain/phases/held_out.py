"""Tasks that are asked while a phase trains: the scores of the model as it is."""

from transformers import PreTrainedModel

from posttrain.chat.render import renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.shard import Shard
from posttrain.phases.context import PhaseContext
from posttrain.phases.loop import HeldOutMetrics, TrainingPhase
from posttrain.recipe.types import HeldOutTasks
from posttrain.rollout.episodes import run_episodes, seed_of
from posttrain.rollout.in_process import InProcessSampler


def task_metrics(
    context: PhaseContext, phase: TrainingPhase, asked: HeldOutTasks, model: PreTrainedModel
) -> HeldOutMetrics:
    """Mean score and parts over what could be scored, asked as an evaluation phase asks; and what could not."""
    shard = Shard(context.dataset_folder(asked.dataset))
    tasks = [shard.row(number) for number in range(shard.num_rows)]
    seeds = [seed_of(context.recipe.seed, "evaluate", asked.dataset, task["id"], 0) for task in tasks]
    render = renderer(context.recipe.chat, Tokenizer.load(context.base_folder(context.states[phase.model])))
    sampler = InProcessSampler(model, render.stop_tokens, phase.precision, context.execution.rollout_tokens)

    def measure() -> dict[str, float]:
        episodes = run_episodes(sampler, render, tasks, seeds, asked.sampling)
        scored = [score for episode in episodes if (score := episode.score) is not None and score.value is not None]
        columns: dict[str, list[float]] = {}
        for score in scored:
            for part, value in {"score": score.value or 0.0, **score.parts}.items():
                columns.setdefault(part, []).append(value)
        means = {part: sum(values) / len(values) for part, values in columns.items()}
        return means | {"unscorable": float(len(tasks) - len(scored))}

    return HeldOutMetrics(asked.every_steps, measure)
