"""Preference optimisation on pairs that share their prompt; the reference is the state the phase was given."""

import json

import torch
from transformers import PreTrainedModel

from posttrain.data.order import Samples
from posttrain.data.shard import Shard
from posttrain.engine.forward import sequence_logprobs
from posttrain.engine.objectives import ipo_sum, sequence_means
from posttrain.engine.packing import Item, MicroBatch
from posttrain.engine.step import train_step
from posttrain.phases.context import PhaseContext, PhaseOutcome
from posttrain.phases.finish import save_state
from posttrain.phases.loop import TrainingLoop, load_trainable
from posttrain.recipe.types import Precision, PreferencePhase
from posttrain.run.folder import write_json_atomic


def run(context: PhaseContext, phase: PreferencePhase) -> PhaseOutcome:
    shard = Shard(context.dataset_folder(phase.dataset))
    order = Samples(shard.mixture(context.recipe.seed))
    items = [pair_item(shard, number) for number in range(len(shard) // 2)]
    model = load_trainable(context, phase.model, phase.trainable, phase.name)
    # Before the first update, and before a checkpoint is restored: this is the phase's input state.
    reference_P = reference_margins(context, phase, model, items)
    loop = TrainingLoop(context, phase.optimizer, phase.steps, model, context.fingerprint, "steps")

    for step in loop.remaining():
        rows = order.of_step(step, phase.pairs_per_step)

        def loss_sum(
            logprob_N: torch.Tensor, batch: MicroBatch, rows: list[int] = rows
        ) -> tuple[torch.Tensor, dict[str, float]]:
            first = batch.sequences.start
            mean_P2 = sequence_means(logprob_N, batch.sequence_N - first, len(batch.sequences)).view(-1, 2)
            known_P = reference_P[rows[first // 2 : batch.sequences.stop // 2]]
            margin_P = (mean_P2[:, 0] - mean_P2[:, 1]).detach()
            shown = {"margin": margin_P.sum().item(), "accuracy": (margin_P > 0).sum().item()}
            return ipo_sum(mean_P2[:, 0], mean_P2[:, 1], known_P, phase.beta), shown

        report = train_step(
            model,
            loop.optimizer,
            [items[row] for row in rows],
            loss_sum,
            denominator=len(rows),
            learning_rate=loop.learning_rate(step),
            clip_norm=phase.optimizer.clip_norm,
            precision=phase.precision,
            micro_batch_tokens=context.execution.micro_batch_tokens,
            step=step,
        )
        loop.record(step, report, **{name: total / len(rows) for name, total in report.sums.items()})

    state, outputs = save_state(context, phase, model)
    pairs = phase.steps * phase.pairs_per_step
    counts = {"pairs": len(items), "pairs_read": pairs}
    return PhaseOutcome(outputs, loop.summary() | {"epochs": pairs / len(items)}, counts, state)


def pair_item(shard: Shard, number: int) -> Item:
    """Pair `number` as one item: the prompt once, then chosen and rejected."""
    prefix = shard.prefix(number)
    chosen, rejected = 2 * number, 2 * number + 1
    return Item(
        shard.tokens(chosen)[:prefix],
        tuple(shard.tokens(sequence)[prefix:] for sequence in (chosen, rejected)),
        tuple(shard.targets(sequence)[prefix:] for sequence in (chosen, rejected)),
    )


def margins(model: PreTrainedModel, items: list[Item], precision: Precision, micro_batch_tokens: int) -> torch.Tensor:
    """Mean log-probability per token of the chosen minus that of the rejected completion, [P]."""
    sums_S, counts_S = sequence_logprobs(model, items, precision, micro_batch_tokens)
    mean_P2 = (sums_S / counts_S).view(-1, 2)
    return mean_P2[:, 0] - mean_P2[:, 1]


def reference_margins(
    context: PhaseContext, phase: PreferencePhase, model: PreTrainedModel, items: list[Item]
) -> torch.Tensor:
    """The input state's margins, computed once and kept with the fingerprint they belong to."""
    cache = context.folder.path / "reference.json"
    if cache.exists():
        stored = json.loads(cache.read_text())
        if stored["fingerprint"] == context.fingerprint:
            return torch.tensor(stored["margins"], dtype=torch.float32)
    margin_P = margins(model, items, phase.precision, context.execution.micro_batch_tokens)
    write_json_atomic(cache, {"fingerprint": context.fingerprint, "margins": margin_P.tolist()})
    return margin_P
