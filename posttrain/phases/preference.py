"""Preference optimisation on pairs that share their prompt; the reference is the state the phase was given."""

import json

import torch
from transformers import PreTrainedModel

from posttrain.data.order import Samples
from posttrain.data.shard import Shard
from posttrain.engine.forward import sequence_logprobs
from posttrain.engine.objectives import Pairs, needs_reference, preference_sum, sequence_lengths, sequence_sums
from posttrain.engine.packing import Item, MicroBatch
from posttrain.engine.reference import kl_estimate
from posttrain.phases.context import PhaseContext, PhaseOutcome
from posttrain.phases.finish import save_state
from posttrain.phases.loop import TrainingLoop, load_trainable, num_steps
from posttrain.recipe.types import Kto, Precision, PreferencePhase
from posttrain.run.folder import write_json_atomic


def run(context: PhaseContext, phase: PreferencePhase) -> PhaseOutcome:
    shard = Shard(context.dataset_folder(phase.dataset))
    order = Samples(shard.mixture(context.recipe.seed))
    items = [pair_item(shard, number) for number in range(len(shard) // 2)]
    model = load_trainable(context, phase)
    # Before the first update, and before a checkpoint is restored: this is the phase's input state.
    reference_P2 = None
    if needs_reference(phase.objective):
        reference_P2 = reference(context, phase, model, items, "reference.json")
    strangers = mismatched(items) if isinstance(phase.objective, Kto) else []
    stranger_P = reference(context, phase, model, strangers, "reference_kl.json")[:, 0] if strangers else None
    steps = num_steps(phase.steps, lambda epoch: len(order), phase.pairs_per_step)
    loop = TrainingLoop(context, phase, steps, model)
    denominator_of_pair = 2 if isinstance(phase.objective, Kto) else 1

    for step in loop.remaining():
        rows = order.of_step(step, phase.pairs_per_step)
        kl = 0.0
        if stranger_P is not None:
            drawn = [strangers[row] for row in rows]
            sums_S, _ = sequence_logprobs(model, drawn, phase.precision, loop.micro_batch_tokens)
            kl = kl_estimate(sums_S, stranger_P[rows])

        def loss_sum(
            logprob_N: torch.Tensor, batch: MicroBatch, rows: list[int] = rows, kl: float = kl
        ) -> tuple[torch.Tensor, dict[str, float]]:
            first, count = batch.sequences.start, len(batch.sequences)
            known_P2 = None if reference_P2 is None else reference_P2[rows[first // 2 : batch.sequences.stop // 2]]
            pairs = Pairs(
                sequence_sums(logprob_N, batch.sequence_N - first, count).view(-1, 2),
                sequence_lengths(batch.sequence_N - first, count).view(-1, 2),
                known_P2,
            )
            mean_P2 = (pairs.policy_P2 / pairs.lengths_P2).detach()
            margin_P = mean_P2[:, 0] - mean_P2[:, 1]
            shown = {"margin": margin_P.sum().item(), "accuracy": (margin_P > 0).sum().item()}
            return preference_sum(phase.objective, pairs, kl), shown

        report = loop.train([items[row] for row in rows], loss_sum, len(rows) * denominator_of_pair, step)
        loop.record(step, report, **{name: total / len(rows) for name, total in report.sums.items()})

    state, outputs = save_state(context, phase, model)
    pairs = steps * phase.pairs_per_step
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


def mismatched(items: list[Item]) -> list[Item]:
    """Every prompt with the chosen completion of the next pair: KTO's samples for the divergence."""
    return [
        Item(item.prefix, other.tokens[:1], other.targets[:1])
        for item, other in zip(items, items[1:] + items[:1], strict=True)
    ]


def summed_logprobs(
    model: PreTrainedModel, items: list[Item], precision: Precision, micro_batch_tokens: int
) -> torch.Tensor:
    """Log-probabilities of every item's sequences, a row per item."""
    sums_S, _ = sequence_logprobs(model, items, precision, micro_batch_tokens)
    return sums_S.view(len(items), -1)


def margins(model: PreTrainedModel, items: list[Item], precision: Precision, micro_batch_tokens: int) -> torch.Tensor:
    """Mean log-probability per token of the chosen minus that of the rejected completion, [P]."""
    sums_S, counts_S = sequence_logprobs(model, items, precision, micro_batch_tokens)
    mean_P2 = (sums_S / counts_S).view(-1, 2)
    return mean_P2[:, 0] - mean_P2[:, 1]


def reference(
    context: PhaseContext, phase: PreferencePhase, model: PreTrainedModel, items: list[Item], file: str
) -> torch.Tensor:
    """The input state's log-probabilities, computed once and kept with the fingerprint they belong to."""
    cache = context.folder.path / file
    if cache.exists():
        stored = json.loads(cache.read_text())
        if stored["fingerprint"] == context.fingerprint:
            return torch.tensor(stored["logprobs"], dtype=torch.float32)
    with context.interruptible():
        logprobs = summed_logprobs(model, items, phase.precision, context.micro_batch_tokens)
    write_json_atomic(cache, {"fingerprint": context.fingerprint, "logprobs": logprobs.tolist()})
    return logprobs
