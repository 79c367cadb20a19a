"""Supervised fine-tuning: cross entropy on the target tokens of a prepared dataset."""

from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedModel

from posttrain.data.order import Samples
from posttrain.data.packed_rows import PackedRows
from posttrain.data.shard import Shard
from posttrain.engine.forward import token_logprobs
from posttrain.engine.objectives import sft_sum
from posttrain.engine.packing import Item
from posttrain.engine.step import train_step
from posttrain.phases.context import PhaseContext, PhaseOutcome
from posttrain.phases.finish import save_state
from posttrain.phases.held_out import task_metrics
from posttrain.phases.loop import HeldOutMetrics, TrainingLoop, load_trainable
from posttrain.recipe.types import Batch, HeldOutTasks, RowBatch, SampleBatch, SftPhase


def run(context: PhaseContext, phase: SftPhase) -> PhaseOutcome:
    shard = Shard(context.dataset_folder(phase.dataset))
    items_of_step = batches(shard, phase.batch, context.recipe.seed)
    model = load_trainable(context, phase)
    loop = TrainingLoop(context, phase, model, held_out_metrics(context, phase, model))

    for step in loop.remaining():
        items = [sample_item(shard, samples) for samples in items_of_step(step)]
        report = train_step(
            model,
            loop.optimizer,
            items,
            lambda logprob_N, batch: (sft_sum(logprob_N), {}),
            denominator=sum(item.num_targets for item in items),
            learning_rate=loop.learning_rate(step),
            clip_norm=phase.optimizer.clip_norm,
            precision=phase.precision,
            micro_batch_tokens=context.execution.micro_batch_tokens,
            step=step,
        )
        loop.record(step, report, **filled(items, phase.batch))

    state, outputs = save_state(context, phase, model)
    read = sum(len(samples) for step in range(1, phase.steps + 1) for samples in items_of_step(step))
    counts = {"rows": shard.num_rows, "samples": len(shard), "samples_read": read}
    epochs = read / len(shard.mixture(context.recipe.seed))
    return PhaseOutcome(outputs, loop.summary() | {"epochs": epochs}, counts, state)


def held_out_metrics(context: PhaseContext, phase: SftPhase, model: PreTrainedModel) -> HeldOutMetrics | None:
    """Mean cross entropy of the held-out dataset's targets, or scores of its tasks."""
    if phase.held_out is None:
        return None
    if isinstance(phase.held_out, HeldOutTasks):
        return task_metrics(context, phase, phase.held_out, model)
    shard = Shard(context.dataset_folder(phase.held_out.dataset))
    items = [sample_item(shard, [sample]) for sample in range(len(shard))]

    def measure() -> dict[str, float]:
        logprob_N, _ = token_logprobs(model, items, phase.precision, context.execution.micro_batch_tokens)
        return {"loss": -logprob_N.double().mean().item()}

    return HeldOutMetrics(phase.held_out.every_steps, measure)


def batches(shard: Shard, batch: Batch, seed: int) -> Callable[[int], list[Sequence[int]]]:
    """1-based step → its items, each a list of the shard's samples."""
    mixture = shard.mixture(seed)
    match batch:
        case SampleBatch():
            samples = Samples(mixture)
            return lambda step: [[sample] for sample in samples.of_step(step, batch.samples)]
        case RowBatch():
            packed = PackedRows(mixture, shard.lengths(), batch.row_tokens)
            return lambda step: [row.tolist() for row in packed.rows_of_step(step, batch.rows)]


def sample_item(shard: Shard, samples: Sequence[int]) -> Item:
    """Samples that are never split over micro-batches and do not see each other."""
    tokens, targets = map(shard.tokens, samples), map(shard.targets, samples)
    return Item(np.empty(0, np.int32), tuple(tokens), tuple(targets))


def filled(items: Sequence[Item], batch: Batch) -> dict[str, float]:
    """How full a step's rows are, where it counts rows."""
    if not isinstance(batch, RowBatch):
        return {}
    return {"fill": sum(item.size for item in items) / (len(items) * batch.row_tokens)}
