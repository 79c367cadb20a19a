"""Supervised fine-tuning: cross entropy on the target tokens of a prepared dataset."""

import numpy as np

from posttrain.data.order import rows_of_step
from posttrain.data.shard import Shard
from posttrain.engine.objectives import sft_sum
from posttrain.engine.packing import Item
from posttrain.engine.step import train_step
from posttrain.phases.context import PhaseContext, PhaseOutcome
from posttrain.phases.finish import save_state
from posttrain.phases.loop import TrainingLoop, load_trainable
from posttrain.recipe.types import SftPhase


def run(context: PhaseContext, phase: SftPhase) -> PhaseOutcome:
    shard = Shard(context.dataset_folder(phase.dataset))
    model = load_trainable(context, phase)
    loop = TrainingLoop(context, phase.optimizer, phase.steps, model, context.fingerprint, "steps")

    for step in loop.remaining():
        rows = rows_of_step(context.recipe.seed, step, phase.samples_per_step, len(shard))
        items = [Item(np.empty(0, np.int32), (shard.tokens(row),), (shard.targets(row),)) for row in rows]
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
        loop.record(step, report)

    state, outputs = save_state(context, phase, model)
    samples = phase.steps * phase.samples_per_step
    counts = {"rows": len(shard), "samples_read": samples}
    return PhaseOutcome(outputs, loop.summary() | {"epochs": samples / len(shard)}, counts, state)
