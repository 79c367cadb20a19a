"""Reinforcement learning on episode groups: rollout, scores, episodes to disk, update."""

from itertools import accumulate
from typing import Any, get_args

import numpy as np
import torch

from posttrain.chat.conversation import Conversation
from posttrain.chat.render import Renderer, renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.order import Samples
from posttrain.data.shard import Shard
from posttrain.engine.forward import token_logprobs
from posttrain.engine.model import trainable
from posttrain.engine.objectives import Rollouts, group_advantages, policy_denominator, policy_sum, truncated_weights
from posttrain.engine.packing import Item, MicroBatch
from posttrain.engine.reference import Reference
from posttrain.engine.step import StepReport
from posttrain.errors import PhaseFault, Stopped
from posttrain.phases.context import PhaseContext, PhaseOutcome, handed_on
from posttrain.phases.finish import save_state
from posttrain.phases.groups import DUPLICATE, TOO_SHORT, TRUNCATED, Curriculum, Group, chosen, mask, spread
from posttrain.phases.held_out import task_metrics
from posttrain.phases.loop import TrainingLoop, load_trainable, num_steps, summary
from posttrain.phases.sampling import sampler_for, show_weights
from posttrain.recipe.types import DrGrpo, GrpoPhase
from posttrain.rollout.episodes import Ended, Episode, run_episodes, seed_of, trimmed
from posttrain.rollout.sampler import Sampler
from posttrain.run import faults
from posttrain.run.journal import append_lines, read_lines


def run(context: PhaseContext, phase: GrpoPhase) -> PhaseOutcome:
    tasks = Shard(context.dataset_folder(phase.dataset))
    if not tasks.num_rows:
        return handed_on(context.states[phase.model], f"dataset {phase.dataset} has no tasks")
    order = Samples(tasks.mixture(context.recipe.seed))
    model = load_trainable(context, phase)
    tokenizer = Tokenizer.load(context.base_folder(context.states[phase.model]))
    render = renderer(context.recipe.chat, tokenizer)
    # Before a checkpoint is restored: this is the phase's input state.
    reference = Reference(trainable(model)) if phase.kl_weight else None
    steps = num_steps(phase.steps, lambda epoch: len(order), phase.groups_per_step)
    held_out = task_metrics(context, phase, phase.held_out, model) if phase.held_out else None
    loop = TrainingLoop(context, phase, steps, model, held_out)
    written = episodes_on_disk(context, phase)
    curriculum = curriculum_of(context, phase, tasks, render)

    with sampler_for(context, phase, model, render) as sampler:
        for step in loop.remaining():
            episodes = written.get(step)
            if episodes is None:
                show_weights(sampler, context, model, step)
                try:
                    with context.interruptible():
                        episodes = roll_out(context, phase, step, sampler, render, tasks, curriculum)
                except Stopped:
                    # Nothing of a rollout is kept: the same seeds give the same one again.
                    loop.stop()
                append_lines(context.folder.samples, episodes, sync=True)
                faults.reach("grpo.episodes_written")
            groups = in_groups(phase, episodes)
            report = update(
                context, phase, loop, reference, [groups[n] for n in chosen(groups, phase.groups_per_step)], step
            )
            # How far the trainer's log-probabilities are from the sampler's: rounding alone, at the first update.
            drift = report.sums.get("drift", 0.0) / max(1, report.target_tokens)
            loop.record(step, report, drift=drift, **rollout_metrics(phase, groups))

    state, outputs = save_state(context, phase, model)
    return PhaseOutcome(outputs, summary(context.folder.metrics), episode_counts(context, phase), state)


def curriculum_of(context: PhaseContext, phase: GrpoPhase, tasks: Shard, render: Renderer) -> Curriculum:
    rows = [tasks.row(number) for number in range(tasks.num_rows)] if phase.curriculum else []
    lengths = [len(render.prompt(Conversation.model_validate(row["prompt"]))) for row in rows]
    return Curriculum(phase, Samples(tasks.mixture(context.recipe.seed)), rows, lengths)


def roll_out(
    context: PhaseContext,
    phase: GrpoPhase,
    step: int,
    sampler: Sampler,
    render: Renderer,
    tasks: Shard,
    curriculum: Curriculum,
) -> list[dict[str, Any]]:
    """The step's episodes as lines of samples.jsonl, group after group, masked as the filters ask."""
    size = phase.group_size
    numbers = [number for number in curriculum.of_step(step) for _ in range(size)]
    seeds = [
        seed_of(context.recipe.seed, phase.name, step, place // size, place % size) for place in range(len(numbers))
    ]
    played = run_episodes(sampler, render, [tasks.row(n) for n in numbers], seeds, curriculum.sampling(step))
    episodes = [as_row(phase, step, place, episode, render) for place, episode in enumerate(played)]
    for group in in_groups(phase, episodes):
        mask(group, phase.filters)
    return episodes


def in_groups(phase: GrpoPhase, episodes: list[dict[str, Any]]) -> list[Group]:
    return [episodes[at : at + phase.group_size] for at in range(0, len(episodes), phase.group_size)]


def episode_counts(context: PhaseContext, phase: GrpoPhase) -> dict[str, int]:
    episodes = list(read_lines(context.folder.samples))
    rows = list(read_lines(context.folder.metrics))
    return {
        "episodes": len(episodes),
        "steps_without_spread": sum(row["zero_spread_groups"] == rolled_groups(phase) for row in rows),
        "unscorable": sum(episode["score"] is None for episode in episodes),
        **{
            f"masked_{reason.replace(' ', '_')}": sum(episode["reason"] == reason for episode in episodes)
            for reason in (TRUNCATED, TOO_SHORT, DUPLICATE)
        },
        **{f"ended_{kind}": sum(episode["ended"] == kind for episode in episodes) for kind in get_args(Ended)},
    }


def rolled_groups(phase: GrpoPhase) -> int:
    return phase.groups_per_step + phase.spare_groups


def as_row(phase: GrpoPhase, step: int, place: int, episode: Episode, render: Renderer) -> dict[str, Any]:
    """An episode as its line in samples.jsonl; what cannot be scored is masked, not scored 0."""
    tokens, sampled, logprobs = trimmed(episode)
    score = episode.score
    assert score is not None
    value: float | None = None
    if score.reason is None:
        world = episode.task["world"]
        weights = weights_of(phase.reward, world)
        if unknown := weights.keys() - score.parts.keys():
            raise PhaseFault(
                f"{phase.name}.reward: no part {sorted(unknown)}; world {world!r} has {sorted(score.parts)}, and may "
                f"have weights of its own, as {world}.{min(score.parts)}"
            )
        value = sum(weight * score.parts[part] for part, weight in weights.items())
    return {
        "step": step,
        "place": place,
        "task": episode.task["id"],
        "prompt": render.text(episode.prompt),
        "completion": render.text(tokens.tolist()),
        "score": value,
        "parts": score.parts,
        "reason": score.reason,
        "ended": episode.ended,
        "prompt_tokens": episode.prompt,
        "tokens": tokens.tolist(),
        "sampled": sampled.astype(int).tolist(),
        "logprobs": logprobs.tolist(),
    }


def weights_of(reward: dict[str, float], world: str) -> dict[str, float]:
    """Of the parts of this world's scores: those named `WORLD.PART`, or where there are none, those named `PART`."""
    own = {key.removeprefix(f"{world}."): weight for key, weight in reward.items() if key.startswith(f"{world}.")}
    return own or {key: weight for key, weight in reward.items() if "." not in key}


def episodes_on_disk(context: PhaseContext, phase: GrpoPhase) -> dict[int, list[dict[str, Any]]]:
    """Complete steps of episodes that an interrupted attempt wrote; a step cut short is rolled out again."""
    per_step = rolled_groups(phase) * phase.group_size
    steps: dict[int, list[dict[str, Any]]] = {}
    for row in read_lines(context.folder.samples):
        steps.setdefault(row["step"], []).append(row)
    complete = {step: rows for step, rows in steps.items() if len(rows) == per_step}
    if len(complete) != len(steps):
        context.folder.samples.unlink()
        append_lines(context.folder.samples, [row for rows in complete.values() for row in rows], sync=True)
    return complete


def update(
    context: PhaseContext,
    phase: GrpoPhase,
    loop: TrainingLoop,
    reference: Reference | None,
    groups: list[Group],
    step: int,
) -> StepReport:
    """`updates_per_rollout` optimizer steps on the groups' episodes, none if no group has spread; the last report."""
    by_spread = not isinstance(phase.objective, DrGrpo)
    advantages = [group_advantages([episode["score"] for episode in group], by_spread) for group in groups]
    # A divergence holds every token sampled, an unscorable episode's too: it is what leads a policy that drifts into
    # such answers back. Without one, groups without spread have no gradient: they are counted and cost no pass.
    diverges = reference is not None
    live = [number for number, values in enumerate(advantages) if diverges or any(values)]
    if not live:
        return StepReport(loss=0.0, gradient_norm=0.0, tokens=0, target_tokens=0, seconds=0.0, sums={}, items=())
    items = [group_item(groups[number], diverges) for number in live]
    advantage_S = torch.tensor([value for number in live for value in advantages[number]])
    sampler_N = torch.cat(
        [torch.tensor(episode["logprobs"])[trained(episode, diverges)] for number in live for episode in groups[number]]
    )
    counted = [episode for group in groups for episode in group if diverges or episode["score"] is not None]
    plan = phase.precision, loop.micro_batch_tokens, phase.sampling.temperature
    old_N, weight_N, reference_N = sampler_N, None, None
    if phase.sampler_ratio_cap is not None:
        old_N, _ = token_logprobs(loop.model, items, *plan)
        weight_N = truncated_weights(old_N, sampler_N, phase.sampler_ratio_cap)
    if reference is not None:
        with reference.in_place():
            reference_N, _ = token_logprobs(loop.model, items, *plan)
    first_S = [0, *accumulate(int(mask.sum()) for item in items for mask in item.targets)]

    def loss_sum(logprob_N: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
        here = slice(first_S[batch.sequences.start], first_S[batch.sequences.stop])
        rollouts = Rollouts(
            old_N[here],
            advantage_S[batch.sequence_N],
            batch.sequence_N - batch.sequences.start,
            len(batch.sequences),
            None if weight_N is None else weight_N[here],
            None if reference_N is None else reference_N[here],
        )
        total = policy_sum(phase.objective, logprob_N, rollouts, phase.kl_weight)
        return total, {"drift": (logprob_N.detach() - sampler_N[here]).abs().sum().item()}

    for _ in range(phase.updates_per_rollout):
        denominator = policy_denominator(
            phase.objective,
            len(counted),
            phase.sampling.max_new_tokens * phase.sampling.max_turns,
            sum(sum(episode["sampled"]) for episode in counted),
        )
        report = loop.train(items, loss_sum, denominator, step, phase.sampling.temperature)
    return report


def group_item(group: list[dict[str, Any]], diverges: bool) -> Item:
    """A group as one item: the prompt once, then each member's episode."""
    return Item(
        np.array(group[0]["prompt_tokens"], np.int64),
        tuple(np.array(episode["tokens"], np.int64) for episode in group),
        tuple(trained(episode, diverges).numpy() for episode in group),
    )


def trained(episode: dict[str, Any], diverges: bool) -> torch.Tensor:
    """The tokens that the policy is trained on: those it sampled; of an unscorable episode for a divergence alone."""
    return torch.tensor(episode["sampled"], dtype=torch.bool) & (diverges or episode["score"] is not None)


def rollout_metrics(phase: GrpoPhase, groups: list[Group]) -> dict[str, float]:
    """Of all that was rolled out, spare groups included."""
    episodes = [episode for group in groups for episode in group]
    scores = [episode["score"] for episode in episodes if episode["score"] is not None]
    metrics = {
        "zero_spread_groups": sum(not spread(group) for group in groups),
        "unscorable": len(episodes) - len(scores),
        "mean_new_tokens": sum(sum(episode["sampled"]) for episode in episodes) / len(episodes),
    }
    if scores:
        metrics["reward"] = sum(scores) / len(scores)
        metrics["reward_accuracy"] = sum(score >= phase.pass_mark for score in scores) / len(scores)
    return metrics
