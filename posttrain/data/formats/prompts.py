"""TRL's shapes with a `prompt`, each standard (text) or conversational (messages).

`prompt_only`, `prompt_completion`, `preference` (the prompt explicit or implicit), `unpaired_preference`, `stepwise`.
"""

from collections.abc import Sequence
from typing import Any

from posttrain.chat.conversation import Conversation, Message
from posttrain.data.formats.format import BadRow, Fields, Format, Record, items, kind, text
from posttrain.data.formats.messages import written
from posttrain.data.formats.turns import Turns, offered


def prompt_only(record: Record) -> Fields:
    """A task whose reference is every other column; `answer` or `solution` as text is what it is scored by."""
    reference = {name: value for name, value in record.items() if name not in ("prompt", "tools")}
    answer = reference.get("answer", reference.get("solution"))
    if isinstance(answer, str):
        reference = {**reference, "kind": "exact", "answer": answer}
    solution = [Message(role="assistant", channel="final", content=answer)] if isinstance(answer, str) else []
    return {
        "world": "answers",
        "prompt": asked(record, record.get("prompt")),
        "reference": reference,
        "solution": tuple(solution),
    }


def prompt_completion(record: Record) -> Fields:
    return {"conversation": _joined(record, _said(record, "completion"), train=True)}


def preference(record: Record) -> Fields:
    if record.get("prompt") is not None:
        prompt, chosen, rejected = record["prompt"], record.get("chosen"), record.get("rejected")
    else:
        prompt, chosen, rejected = _implicit_prompt(record)
    sides = [_completion(value, column, prompt) for column, value in (("chosen", chosen), ("rejected", rejected))]
    if sides[0] == sides[1]:
        raise BadRow("rejected", "is the same as chosen")
    return {"prompt": asked(record, prompt), "chosen": sides[0], "rejected": sides[1]}


def unpaired_preference(record: Record) -> Fields:
    """A completion that was disliked is kept as context only, so that preparing counts and drops it."""
    label = record.get("label")
    if not isinstance(label, bool):
        raise BadRow("label", f"is {kind(label)}, not a boolean")
    conversation = _joined(record, _said(record, "completion"), train=label)
    return {"conversation": conversation.model_copy(update={"metadata": {"label": label}})}


def stepwise(record: Record) -> Fields:
    """The steps are one answer; an answer with a wrong step is kept as context only, as for unpaired preference."""
    steps, labels = items(record, "completions"), items(record, "labels")
    if any(not isinstance(step, str) for step in steps):
        raise BadRow("completions", "has steps that are not text")
    if len(steps) != len(labels) or any(not isinstance(label, bool) for label in labels):
        raise BadRow("labels", f"must be {len(steps)} booleans, one for each step")
    conversation = _joined(record, "\n".join(steps), train=all(labels))
    return {"conversation": conversation.model_copy(update={"metadata": {"labels": labels}})}


def _said(record: Record, column: str) -> Any:
    return items(record, column) if isinstance(record.get(column), list) else text(record, column)


def asked(record: Record, prompt: Any) -> Conversation:
    """The prompt's messages; a text is what the user says."""
    if isinstance(prompt, list):
        turns = written(items({"prompt": prompt}, "prompt"), "prompt")
    else:
        turns = Turns("prompt")
        turns.user(text({"prompt": prompt}, "prompt"))
    return turns.prompt(offered(record.get("tools"), "tools"))


def _completion(value: Any, column: str, prompt: Any) -> tuple[Message, ...]:
    """The assistant's messages after the prompt, whose calls their results may answer."""
    if not isinstance(value, list):
        return (Message(role="assistant", channel="final", content=text({column: value}, column)),)
    before = prompt if isinstance(prompt, list) else []
    messages = written([*before, *items({column: value}, column)], column).finished()
    said = messages[len(written(before, column).messages) :]
    if not said or said[0].role != "assistant":
        raise BadRow(column, "does not begin with the assistant")
    return said


def _joined(record: Record, completion: Any, train: bool) -> Conversation:
    prompt = asked(record, record.get("prompt"))
    said = _completion(completion, "completion", record.get("prompt"))
    if not train:
        said = tuple(message.model_copy(update={"train": False}) for message in said)
    # What the assistant said in the prompt is context.
    before = tuple(
        message.model_copy(update={"train": False}) if message.role == "assistant" else message
        for message in prompt.messages
    )
    return prompt.model_copy(update={"messages": (*before, *said)})


def _implicit_prompt(record: Record) -> tuple[Any, Any, Any]:
    """What both sides begin with: whole messages, or the common text up to its last space."""
    chosen, rejected = _said(record, "chosen"), _said(record, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = chosen[: _shared(chosen, rejected)]
        cut = len(shared.rstrip(" ")) if shared.endswith(" ") else shared.rfind(" ")
        if cut <= 0:
            raise BadRow("chosen", "shares no beginning with rejected that could be the prompt")
        return chosen[:cut], chosen[cut:], rejected[cut:]
    if isinstance(chosen, list) and isinstance(rejected, list):
        cut = _shared(chosen, rejected)
        if cut == 0:
            raise BadRow("chosen", "shares no message with rejected that could be the prompt")
        return chosen[:cut], chosen[cut:], rejected[cut:]
    raise BadRow("rejected", f"is {kind(rejected)}, but chosen is {kind(chosen)}")


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How many elements both begin with."""
    pairs = zip(chosen, rejected, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))


PROMPT_ONLY = Format(
    columns=("prompt",),
    makes={"tasks": prompt_only},
    reads="TRL prompt-only, scored by `answer` or `solution` where there is one",
)
PROMPT_COMPLETION = Format(
    columns=("prompt", "completion"), makes={"conversations": prompt_completion}, reads="TRL prompt-completion"
)
PREFERENCE = Format(
    columns=("chosen", "rejected"), makes={"pairs": preference}, reads="TRL preference, with or without `prompt`"
)
UNPAIRED_PREFERENCE = Format(
    columns=("prompt", "completion", "label"),
    makes={"conversations": unpaired_preference},
    reads="TRL unpaired preference; what was disliked is no target",
)
STEPWISE = Format(
    columns=("prompt", "completions", "labels"),
    makes={"conversations": stepwise},
    reads="TRL stepwise supervision; an answer with a wrong step is no target",
)
