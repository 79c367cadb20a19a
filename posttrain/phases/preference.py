"""Preference optimisation on pairs that share their prompt; the reference is the state the phase was given."""

import json
from dataclasses import dataclass

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
from posttrain.phases.held_out import task_metrics
from posttrain.phases.loop import HeldOutMetrics, TrainingLoop, load_trainable, num_steps, summary
from posttrain.recipe.types import HeldOutTasks, Kto, Precision, PreferencePhase
from posttrain.run.folder import write_json_atomic


@dataclass(frozen=True)
class PairSet:
    """A dataset's pairs with what the phase's input state says of them."""

    items: list[Item]
    reference_P2: torch.Tensor | None
    """None for an objective without a reference."""
    strangers: list[Item]
    """KTO's samples for the divergence, one per pair; none for other objectives."""
    stranger_P: torch.Tensor


def run(context: PhaseContext, phase: PreferencePhase) -> PhaseOutcome:
    shard = Shard(context.dataset_folder(phase.dataset))
    order = Samples(shard.mixture(context.recipe.seed))
    model = load_trainable(context, phase)
    # Before the first update, and before a checkpoint is restored: this is the phase's input state.
    pairs = pair_set(context, phase, model, shard, "reference")
    held_out = held_out_metrics(context, phase, model)
    steps = num_steps(phase.steps, lambda epoch: len(order), phase.pairs_per_step)
    loop = TrainingLoop(context, phase, steps, model, held_out)
    denominator_of_pair = 2 if isinstance(phase.objective, Kto) else 1

    for step in loop.remaining():
        rows = order.of_step(step, phase.pairs_per_step)
        kl = divergence(context, phase, model, pairs, rows)

        def loss_sum(
            logprob_N: torch.Tensor, batch: MicroBatch, rows: list[int] = rows, kl: float = kl
        ) -> tuple[torch.Tensor, dict[str, float]]:
            first, count = batch.sequences.start, len(batch.sequences)
            sums_S = sequence_sums(logprob_N, batch.sequence_N - first, count)
            lengths_S = sequence_lengths(batch.sequence_N - first, count)
            return judged(phase, pairs, rows[first // 2 : batch.sequences.stop // 2], sums_S, lengths_S, kl)

        report = loop.train([pairs.items[row] for row in rows], loss_sum, len(rows) * denominator_of_pair, step)
        loop.record(step, report, **{name: total / len(rows) for name, total in report.sums.items()})

    state, outputs = save_state(context, phase, model)
    read = steps * phase.pairs_per_step
    counts = {"pairs": len(pairs.items), "pairs_read": read}
    return PhaseOutcome(outputs, summary(context.folder.metrics) | {"epochs": read / len(pairs.items)}, counts, state)


def held_out_metrics(context: PhaseContext, phase: PreferencePhase, model: PreTrainedModel) -> HeldOutMetrics | None:
    """Loss, margin and accuracy over the held-out pairs, as a step would have them; or scores of held-out tasks."""
    if phase.held_out is None:
        return None
    if isinstance(phase.held_out, HeldOutTasks):
        return task_metrics(context, phase, phase.held_out, model)
    pairs = pair_set(context, phase, model, Shard(context.dataset_folder(phase.held_out.dataset)), "reference_held_out")
    rows = list(range(len(pairs.items)))

    def measure() -> dict[str, float]:
        plan = phase.precision, context.micro_batch_tokens
        sums_S, lengths_S = sequence_logprobs(model, pairs.items, *plan)
        kl = divergence(context, phase, model, pairs, rows)
        total, shown = judged(phase, pairs, rows, sums_S, lengths_S, kl)
        completions = len(rows) * (2 if isinstance(phase.objective, Kto) else 1)
        return {"loss": total.item() / completions} | {name: value / len(rows) for name, value in shown.items()}

    return HeldOutMetrics(phase.held_out.every_steps, measure)


def judged(
    phase: PreferencePhase,
    pairs: PairSet,
    rows: list[int],
    sums_S: torch.Tensor,
    lengths_S: torch.Tensor,
    kl: float,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The objective's sum over these pairs and the sums that are reported; S is two sequences a row, chosen first."""
    known_P2 = None if pairs.reference_P2 is None else pairs.reference_P2[rows]
    given = Pairs(sums_S.view(-1, 2), lengths_S.view(-1, 2), known_P2)
    mean_P2 = (given.policy_P2 / given.lengths_P2).detach()
    margin_P = mean_P2[:, 0] - mean_P2[:, 1]
    shown = {"margin": margin_P.sum().item(), "accuracy": (margin_P > 0).sum().item()}
    return preference_sum(phase.objective, given, kl), shown


def pair_set(
    context: PhaseContext, phase: PreferencePhase, model: PreTrainedModel, shard: Shard, cache: str
) -> PairSet:
    """The dataset's pairs; reference log-probabilities are of the model as it is, or from `cache` and `cache`_kl."""
    items = [pair_item(shard, number) for number in range(len(shard) // 2)]
    needed = needs_reference(phase.objective)
    reference_P2 = reference(context, phase, model, items, f"{cache}.json") if needed else None
    if not isinstance(phase.objective, Kto):
        return PairSet(items, reference_P2, [], torch.empty(0))
    strangers = mismatched(items)
    return PairSet(
        items, reference_P2, strangers, reference(context, phase, model, strangers, f"{cache}_kl.json")[:, 0]
    )


def divergence(
    context: PhaseContext, phase: PreferencePhase, model: PreTrainedModel, pairs: PairSet, rows: list[int]
) -> float:
    """KTO's estimate on the strangers of these rows; 0 for other objectives."""
    if not pairs.strangers:
        return 0.0
    drawn = [pairs.strangers[row] for row in rows]
    sums_S, _ = sequence_logprobs(model, drawn, phase.precision, context.micro_batch_tokens)
    return kl_estimate(sums_S, pairs.stranger_P[rows])


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
