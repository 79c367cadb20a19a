"""What `posttrain generate` does: one answer to each prompt of a file, from any model state."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.chat.conversation import Conversation
from posttrain.chat.render import Renderer, renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.formats.format import BadRow
from posttrain.data.formats.prompts import asked
from posttrain.data.records import records
from posttrain.data.rows import Fault
from posttrain.errors import ChatFormatError, DataError
from posttrain.phases.chosen_model import ChosenModel
from posttrain.recipe.types import Execution, Precision, Sampling
from posttrain.rollout.episodes import seed_of
from posttrain.rollout.in_process import InProcessSampler
from posttrain.rollout.sampler import Sampled
from posttrain.scoring.calls import final_text


def prompts_of(file: Path) -> list[tuple[str, Conversation]]:
    """(id, conversation) per record: a line of text, or `prompt` (text or messages) or `messages`, with `tools`."""
    found = []
    for number, record in enumerate(records(file), 1):
        if isinstance(record, Fault):
            raise DataError(f"{file} row {number}: {record}")
        prompt = next((record[name] for name in ("prompt", "messages", "text") if record.get(name) is not None), None)
        try:
            found.append((str(record.get("id") or number), asked(record, prompt)))
        except BadRow as bad:
            raise DataError(f"{file} row {number}: {bad}") from None
    return found


def generate(
    chosen: ChosenModel,
    prompts: list[tuple[str, Conversation]],
    sampling: Sampling,
    seed: int,
    precision: Precision,
    execution: Execution,
) -> Iterator[dict[str, Any]]:
    """A line per prompt: `text` is the final message, empty where there is none, `completion` all that was written."""
    render = renderer(chosen.chat, Tokenizer.load(chosen.base))
    tokens = []
    for name, conversation in prompts:
        try:
            tokens.append(render.prompt(conversation))
        except ChatFormatError as error:
            raise DataError(f"prompt {name}: {error}") from None
    sampler = InProcessSampler(
        chosen.load(execution, precision), render.stop_tokens, precision, execution.rollout_tokens
    )
    seeds = [seed_of(seed, "generate", name) for name, _ in prompts]
    for (name, _), prompt, sampled in zip(prompts, tokens, sampler.sample(tokens, seeds, sampling), strict=True):
        yield {"id": name, "prompt": render.text(prompt), **answer_of(render, sampled)}


def answer_of(render: Renderer, sampled: Sampled) -> dict[str, Any]:
    told = {"completion": render.text(sampled.tokens), "ended": sampled.ended, "new_tokens": len(sampled.tokens)}
    try:
        messages = render.parse(sampled.tokens)
    except ChatFormatError as error:
        return {"text": "", **told, "fault": str(error)}
    calls = [
        {"tool": message.recipient, "arguments": message.content}
        for message in messages
        if message.recipient is not None
    ]
    return {"text": final_text(messages), **({"calls": calls} if calls else {}), **told}
