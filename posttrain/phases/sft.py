"""Supervised fine-tuning: cross entropy on the target tokens of a prepared dataset."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel

from posttrain.data.order import Samples
from posttrain.data.packed_rows import PackedRows
from posttrain.data.shard import Shard
from posttrain.engine.forward import token_logprobs
from posttrain.engine.objectives import sft_sum
from posttrain.engine.packing import Item
from posttrain.phases.context import PhaseContext, PhaseOutcome
from posttrain.phases.finish import save_state
from posttrain.phases.held_out import task_metrics
from posttrain.phases.loop import HeldOutMetrics, TrainingLoop, load_trainable, num_steps, summary
from posttrain.recipe.types import Batch, HeldOutTasks, RowBatch, SampleBatch, SftPhase


def run(context: PhaseContext, phase: SftPhase) -> PhaseOutcome:
    shard = Shard(context.dataset_folder(phase.dataset))
    plan = batches(shard, phase.batch, context.recipe.seed)
    steps = num_steps(phase.steps, plan.of_epoch, plan.per_step)
    if context.execution.backend == "tunix":
        from posttrain.phases import tunix

        of_steps = [[one for item in plan.of_step(step) for one in item] for step in range(1, steps + 1)]
        return tunix.train(context, phase, shard, of_steps)
    model = load_trainable(context, phase)
    loop = TrainingLoop(context, phase, steps, model, held_out_metrics(context, phase, model))

    for step in loop.remaining():
        items = [sample_item(shard, samples) for samples in plan.of_step(step)]
        targets = sum(item.num_targets for item in items)
        report = loop.train(items, lambda logprob_N, batch: (sft_sum(logprob_N), {}), targets, step)
        loop.record(step, report, **filled(items, phase.batch))

    state, outputs = save_state(context, phase, model)
    read = sum(len(samples) for step in range(1, steps + 1) for samples in plan.of_step(step))
    counts = {"rows": shard.num_rows, "samples": len(shard), "samples_read": read}
    epochs = read / len(shard.mixture(context.recipe.seed))
    return PhaseOutcome(outputs, summary(context.folder.metrics) | {"epochs": epochs}, counts, state)


def held_out_metrics(context: PhaseContext, phase: SftPhase, model: PreTrainedModel) -> HeldOutMetrics | None:
    """Mean cross entropy of the held-out dataset's targets, or scores of its tasks."""
    if phase.held_out is None:
        return None
    if isinstance(phase.held_out, HeldOutTasks):
        return task_metrics(context, phase, phase.held_out, model)
    shard = Shard(context.dataset_folder(phase.held_out.dataset))
    items = [sample_item(shard, [sample]) for sample in range(len(shard))]

    def measure() -> dict[str, float]:
        logprob_N, _ = token_logprobs(model, items, phase.precision, context.micro_batch_tokens)
        return {"loss": -logprob_N.double().mean().item()}

    return HeldOutMetrics(phase.held_out.every_steps, measure)


class Batches(NamedTuple):
    per_step: int
    """Items that a step reads."""
    of_epoch: Callable[[int], int]
    """How many items a 0-based epoch has."""
    of_step: Callable[[int], list[Sequence[int]]]
    """The items of a 1-based step, each a list of the shard's samples."""


def batches(shard: Shard, batch: Batch, seed: int) -> Batches:
    mixture = shard.mixture(seed)
    match batch:
        case SampleBatch(samples=count):
            samples = Samples(mixture)
            return Batches(
                count, lambda epoch: len(mixture), lambda step: [[one] for one in samples.of_step(step, count)]
            )
        case RowBatch(rows=count, row_tokens=row_tokens):
            packed = PackedRows(mixture, shard.lengths(), row_tokens)
            return Batches(
                count,
                lambda epoch: len(packed.epoch(epoch)),
                lambda step: [row.tolist() for row in packed.rows_of_step(step, count)],
            )


def sample_item(shard: Shard, samples: Sequence[int]) -> Item:
    """Samples that are never split over micro-batches and do not see each other."""
    tokens, targets = map(shard.tokens, samples), map(shard.targets, samples)
    return Item(np.empty(0, np.int32), tuple(tokens), tuple(targets))


def filled(items: Sequence[Item], batch: Batch) -> dict[str, float]:
    """How full a step's rows are, where it counts rows."""
    if not isinstance(batch, RowBatch):
        return {}
    return {"fill": sum(item.size for item in items) / (len(items) * batch.row_tokens)}
