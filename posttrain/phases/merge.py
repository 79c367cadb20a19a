"""Merge: base and adapter become one Hugging Face folder, which must then have the promised size and write text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from posttrain.chat.conversation import Conversation, Message
from posttrain.chat.render import renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.shard import Shard
from posttrain.engine.device import fuse_layers, prepare_device
from posttrain.engine.model import hold_frozen, load_model
from posttrain.export.commit import committing, is_committed
from posttrain.export.expected import expected_bytes, expected_shapes
from posttrain.export.merge import apply_merge, plan_merge
from posttrain.export.smoke import smoke_metrics
from posttrain.export.tensors import TensorFolder
from posttrain.phases.context import ModelState, PhaseContext, PhaseOutcome
from posttrain.recipe.types import MergePhase, Precision, PreparePhase, Sampling
from posttrain.rollout.in_process import InProcessSampler
from posttrain.run.folder import digest_folder

SMOKE = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=96, max_turns=1)
SMOKE_PROMPTS = 4


def run(context: PhaseContext, phase: MergePhase) -> PhaseOutcome:
    """Write `final/` and judge it; a folder that an earlier attempt committed from the same state is kept."""
    torch.set_num_threads(context.execution.threads)
    state = context.states[phase.model]
    dtype = getattr(torch, phase.dtype)
    plan = plan_merge(context.base_folder(state), context.adapter_folder(state), dtype)
    final = context.folder.final
    made_from = {"base": state.base_digest, "adapter": state.adapter_digest, "dtype": phase.dtype}
    if not is_committed(final, made_from):
        with (
            context.progress(f"{phase.name}: merging", plan.bytes, "B", 0) as progress,
            committing(final, made_from, "merge.before_commit") as folder,
        ):
            apply_merge(plan, folder, progress.advance)

    texts = generations(context, final, phase.dtype)
    actions = [tensor.action for tensor in plan.tensors]
    return PhaseOutcome(
        outputs=(final,),
        metrics={**folder_metrics(final, dtype), **smoke_metrics(list(texts.values()))},
        counts={"tensors": len(actions), "merged_tensors": actions.count("merge")},
        state=ModelState(
            base=str(final.relative_to(context.run.path)),
            base_digest=digest_folder(final),
            adapter=None,
            adapter_digest=None,
            phase=phase.name,
        ),
        details={"plan": list(plan.lines()), "generations": texts},
    )


def folder_metrics(folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Size and tensors against what the config promises. No value is NaN or infinite, or the merge had stopped."""
    found, expected = TensorFolder(folder), expected_shapes(folder)
    wrong_shape = [name for name, shape in expected.items() if name in found.specs and found.specs[name].shape != shape]
    promised = expected_bytes(expected, dtype)
    return {
        "bytes": float(found.bytes),
        "expected_bytes": float(promised),
        "size_ratio": found.bytes / promised,
        "missing_tensors": float(len(expected.keys() - found.specs.keys()) + len(wrong_shape)),
        "unexpected_tensors": float(len(found.specs.keys() - expected.keys())),
    }


def generations(context: PhaseContext, folder: Path, dtype: Precision) -> dict[str, str]:
    """What the merged model writes to a few of the run's own prompts, greedily, in the type that it is stored in where
    there is a GPU for it."""
    render = renderer(context.recipe.chat, Tokenizer.load(folder))
    device = prepare_device(context.execution, dtype)
    precision: Precision = "float32" if device.type == "cpu" else dtype
    model = load_model(folder, device=device, precision=precision)
    hold_frozen(model, precision)
    fuse_layers(model, precision)
    sampler = InProcessSampler(model, render.stop_tokens, precision, context.execution.rollout_tokens)
    prompts = [render.prompt(conversation) for conversation in smoke_conversations(context)]
    sampled = sampler.sample(prompts, [0] * len(prompts), SMOKE)
    return {render.text(prompt): render.text(answer.tokens) for prompt, answer in zip(prompts, sampled, strict=True)}


def smoke_conversations(context: PhaseContext) -> list[Conversation]:
    """Openings of the first prepared dataset that has any; a plain greeting where none has."""
    for phase in context.recipe.phases:
        if not isinstance(phase, PreparePhase) or phase.name not in context.results:
            continue
        for dataset in phase.datasets:
            openings = list(_openings(Shard(context.dataset_folder(dataset.name))))
            if openings:
                return openings
    return [Conversation(messages=(Message(role="user", content="Hello! What can you do?"),))]


def _openings(shard: Shard) -> Iterator[Conversation]:
    for number in range(min(shard.num_rows, SMOKE_PROMPTS)):
        row: dict[str, Any] = shard.row(number)
        if "prompt" in row:
            yield Conversation.model_validate(row["prompt"])
        elif "conversation" in row:
            whole = Conversation.model_validate(row["conversation"])
            roles = [message.role for message in whole.messages]
            if "assistant" in roles and roles[0] != "assistant":
                yield whole.model_copy(update={"messages": whole.messages[: roles.index("assistant")]})
