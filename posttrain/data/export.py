"""Registered rows in the shapes that other tools read: OpenAI messages, RT's three, and TRL's."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from posttrain.chat.conversation import Conversation, Message
from posttrain.chat.gemma import numbered_text, tunix_sft_text
from posttrain.data.rows import SHAPES, ConversationRow, PairRow, Row, TaskRow, TextRow
from posttrain.errors import ChatFormatError, DataError

Exported = dict[str, Any]


def exported(row: dict[str, Any], content: str, shape: str) -> Iterator[Exported]:
    """The row's records in this shape; most have one. DataError where the content cannot have the shape."""
    makers = EXPORTS.get(shape)
    if makers is None:
        raise DataError(f"there is no export format {shape!r}; there are {', '.join(EXPORTS)}")
    if content not in makers:
        fitting = [name for name, contents in EXPORTS.items() if content in contents]
        raise DataError(f"{content} cannot be exported as {shape}; they can as {', '.join(fitting)}")
    yield from makers[content](SHAPES[content].model_validate(row))


# ---------------------------------------------------------------- OpenAI messages


def openai_messages(conversation: Conversation, more: tuple[Message, ...] = ()) -> list[Exported]:
    """Messages with `thinking` and `tool_calls`; a turn's analysis joins the message that follows it."""
    written: list[Exported] = []
    if conversation.instructions is not None:
        written.append({"role": "system", "content": conversation.instructions})
    calls, answered = 0, 0
    open_message: Exported | None = None
    for message in (*conversation.messages, *more):
        if message.role == "assistant":
            if open_message is None or not _joins(open_message, message):
                open_message = {"role": "assistant"}
                written.append(open_message)
            if message.recipient is not None:
                _add_call(open_message, message, f"call_{calls}")
                calls += 1
            elif message.channel == "analysis":
                before = open_message.get("thinking")
                open_message["thinking"] = message.content if before is None else f"{before}\n\n{message.content}"
            else:
                open_message["content"] = message.content
            if not message.train:
                open_message["train"] = False
            continue
        open_message = None
        if message.role == "tool":
            name = (message.sender or "").removeprefix("functions.")
            identity = {"tool_call_id": f"call_{answered}"} if answered < calls else {}
            answered += 1
            written.append({"role": "tool", "name": name, **identity, "content": message.content})
        else:
            written.append({"role": message.role, "content": message.content})
    return written


def _joins(open_message: Exported, message: Message) -> bool:
    """Whether thinking, a text and calls, in this order, are still one message."""
    if open_message.get("train", True) != message.train:
        return False
    if message.recipient is not None:
        return True
    return "tool_calls" not in open_message and "content" not in open_message


def _add_call(open_message: Exported, message: Message, identity: str) -> None:
    name = (message.recipient or "").removeprefix("functions.")
    function = {"name": name, "arguments": message.content}
    open_message.setdefault("tool_calls", []).append({"id": identity, "type": "function", "function": function})


def openai_tools(conversation: Conversation) -> Exported:
    """The `tools` column, where there are some."""
    tools = [{"type": "function", "function": tool.model_dump()} for tool in conversation.tools]
    return {"tools": tools} if tools else {}


def _messages(row: Row) -> Iterator[Exported]:
    assert isinstance(row, ConversationRow)
    yield {"messages": openai_messages(row.conversation), **openai_tools(row.conversation)}


# ---------------------------------------------------------------- TRL


def _text(row: Row) -> Iterator[Exported]:
    assert isinstance(row, TextRow)
    yield {"text": row.text}


def _prompt_completion(row: Row) -> Iterator[Exported]:
    """The last turn is the completion."""
    assert isinstance(row, ConversationRow)
    written = openai_messages(row.conversation)
    cut = max((place + 1 for place, message in enumerate(written) if message["role"] == "user"), default=0)
    if written[cut:]:
        yield {"prompt": written[:cut], "completion": written[cut:], **openai_tools(row.conversation)}


def _preference(row: Row) -> Iterator[Exported]:
    assert isinstance(row, PairRow)
    sides = {side: _completion(row.prompt, getattr(row, side)) for side in ("chosen", "rejected")}
    yield {"prompt": openai_messages(row.prompt), **sides, **openai_tools(row.prompt)}


def _unpaired_preference(row: Row) -> Iterator[Exported]:
    assert isinstance(row, PairRow)
    for side, label in (("chosen", True), ("rejected", False)):
        completion = _completion(row.prompt, getattr(row, side))
        prompt = openai_messages(row.prompt)
        yield {"prompt": prompt, "completion": completion, "label": label, **openai_tools(row.prompt)}


def _completion(prompt: Conversation, said: tuple[Message, ...]) -> list[Exported]:
    """Written behind the prompt, so that calls are numbered on; the prompt ends in another role."""
    return openai_messages(prompt, said)[len(openai_messages(prompt)) :]


def _prompt_only(row: Row) -> Iterator[Exported]:
    assert isinstance(row, TaskRow)
    yield {"prompt": openai_messages(row.prompt), **openai_tools(row.prompt), "reference": row.reference}


# ---------------------------------------------------------------- RT


def _trace(row: Row) -> Iterator[Exported]:
    """A trace as it was read, or one whose steps are what was thought, called and returned."""
    assert isinstance(row, ConversationRow)
    kept = row.conversation.metadata.get("trace")
    steps = kept["steps"] if kept else _steps(row.conversation.messages)
    yield {
        "trace_version": kept["trace_version"] if kept else "1.0",
        "prompt": _asked(row.conversation),
        "final_answer": _answered(row),
        "steps": steps,
        "meta": kept["meta"] if kept else {"source": "posttrain", "id": row.id},
    }


def _steps(messages: tuple[Message, ...]) -> list[Exported]:
    kinds = [(_step_type(message), message.content) for message in messages]
    found = [(kind, content) for kind, content in kinds if kind is not None]
    # A trace has at least one step.
    found = found or [("answer", messages[-1].content)]
    return [{"i": place, "type": kind, "content": content} for place, (kind, content) in enumerate(found, 1)]


def _step_type(message: Message) -> str | None:
    if message.role == "tool":
        return "tool_result"
    if message.role != "assistant" or message.channel == "final":
        return None
    return "tool_call" if message.recipient else "thought" if message.channel == "analysis" else "message"


def _asked(conversation: Conversation) -> str:
    """What the system and the users say, in front of each other."""
    users = [message.content for message in conversation.messages if message.role == "user"]
    return "\n\n".join([conversation.instructions, *users] if conversation.instructions else users)


def _answered(row: ConversationRow) -> str:
    finals = [message.content for message in row.conversation.messages if message.channel == "final"]
    if not finals:
        raise DataError(f"row {row.id!r} has no final answer, which a trace needs")
    return finals[-1]


def _tunix_sft(row: Row) -> Iterator[Exported]:
    """Gemma's turns as text: what is asked, then numbered reasoning and the answer."""
    assert isinstance(row, ConversationRow)
    trace = next(_trace(row))
    try:
        prompts = tunix_sft_text(row.conversation)
    except ChatFormatError as error:
        raise DataError(f"row {row.id!r} cannot be exported as tunix_sft: {error}") from error
    yield {"id": row.id, "prompts": prompts, "final_answer": trace["final_answer"], "metadata": trace["meta"]}


def _training_example(row: Row) -> Iterator[Exported]:
    """As `tunix_sft`, with prompt and response apart and without Gemma's marks."""
    trace = next(_trace(row))
    response = numbered_text([step["content"] for step in trace["steps"]], trace["final_answer"])
    yield {"id": row.id, "prompt": trace["prompt"], "response": response, "metadata": trace["meta"]}


def _rows(row: Row) -> Iterator[Exported]:
    yield json.loads(row.model_dump_json())


EXPORTS: dict[str, dict[str, Callable[[Row], Iterator[Exported]]]] = {
    "rows": dict.fromkeys(SHAPES, _rows),
    "messages": {"conversations": _messages},
    "trace": {"conversations": _trace},
    "tunix_sft": {"conversations": _tunix_sft},
    "training_example": {"conversations": _training_example},
    "text": {"text": _text},
    "prompt_completion": {"conversations": _prompt_completion},
    "preference": {"pairs": _preference},
    "unpaired_preference": {"pairs": _unpaired_preference},
    "prompt_only": {"tasks": _prompt_only},
}
"""By name, and by the content of the rows that can have it; the last five are TRL's, whose sixth is `messages`."""
