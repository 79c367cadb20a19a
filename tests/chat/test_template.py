"""The Jinja template against our renderer, applied by transformers as a user of the exported folder would."""

import json
import random
from typing import Any

import pytest

from posttrain.chat.conversation import Conversation, Message, Tool, call, tool_result
from posttrain.chat.harmony import Harmony
from posttrain.chat.template import harmony_template
from posttrain.chat.tokenizer import Tokenizer
from tests.chat.conftest import CHAT
from tests.chat.conversations import KEYS


@pytest.fixture(scope="module")
def stock(toy_definition: str) -> Any:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer as Library

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Library.from_str(toy_definition), chat_template=harmony_template(CHAT)
    )


def as_stock_messages(ours: Conversation) -> list[dict[str, Any]]:
    """Analysis joins the message it precedes, as GPT-OSS's callers pass it."""
    made: list[dict[str, Any]] = []
    if ours.instructions is not None:
        made.append({"role": "developer", "content": ours.instructions})
    thinking: dict[str, str] = {}
    for message in ours.messages:
        if message.channel == "analysis":
            thinking = {"thinking": message.content}
        elif message.recipient:
            name = message.recipient.removeprefix("functions.")
            function = {"name": name, "arguments": json.loads(message.content)}
            made.append({"role": "assistant", "tool_calls": [{"type": "function", "function": function}], **thinking})
            thinking = {}
        else:
            made.append({"role": message.role, "content": message.content, **thinking})
            thinking = {}
    return made


def as_stock_tools(tools: tuple[Tool, ...]) -> list[dict[str, Any]] | None:
    return [{"type": "function", "function": tool.model_dump()} for tool in tools] or None


PROPERTIES: tuple[dict[str, Any], ...] = (
    {"type": "string", "description": "Where it is"},
    {"type": "string", "enum": ["one", "two"], "default": "one"},
    {"type": "string", "title": "Name", "default": "x", "nullable": True},
    {"type": "integer", "default": 3, "examples": ["4", "5"]},
    {"type": ["number", "null"], "default": None},
    {"type": "boolean", "default": False, "description": "Whether"},
    {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}, "default": [[1], [2, 3]]},
    {"type": "array"},
    {"description": "Anything"},
    {"oneOf": [{"type": "string", "description": "A key"}, {"type": "integer", "nullable": True, "default": 1}]},
    {"oneOf": [{"type": "number"}, {"type": "string", "description": "text"}], "description": "Either", "default": 0.5},
    {"type": "array", "items": {"oneOf": [{"type": "string"}, {"type": "number", "description": "n", "default": 2}]}},
)


def parameters(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    names = rng.sample(KEYS, rng.randint(0, 5))
    made: dict[str, Any] = {}
    for name in names:
        nested = depth < 2 and rng.random() < 0.25
        made[name] = parameters(rng, depth + 1) if nested else rng.choice(PROPERTIES)
    described = {"description": "All of it"} if rng.random() < 0.2 else {}
    return {"type": "object", "properties": made, "required": names[::2], **described}


def ordinary(seed: int) -> Conversation:
    """Sound schemas, one analysis per message, and no special tokens in the text."""
    rng = random.Random(seed)
    words = ("Tell", "me", "naïve", "日本", "x=1;", "a\nb", "  two", '"q"', "it's")

    def said() -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, 8)))

    tools = tuple(
        Tool(name=name, description=said(), parameters=parameters(rng))
        for name in rng.sample(["f", "get_weather", "apply_patch"], rng.randint(0, 3))
    )
    messages: list[Message] = []
    for _ in range(rng.randint(1, 3)):
        messages.append(Message(role="user", content=said()))
        for tool in rng.sample(tools, rng.randint(0, len(tools))):
            if rng.random() < 0.5:
                messages.append(Message(role="assistant", channel="analysis", content=said()))
            arguments = {rng.choice(KEYS): rng.choice((1, "zwölf", [True], {"a": None}))}
            messages += [call(tool.name, arguments), tool_result(tool.name, said())]
        if rng.random() < 0.5:
            messages.append(Message(role="assistant", channel="analysis", content=said()))
        messages.append(Message(role="assistant", channel="final", content=said()))
    return Conversation(messages=tuple(messages), tools=tools, instructions=said() if rng.random() < 0.5 else None)


def test_ordinary_conversations_have_our_text(stock: Any, harmony: Harmony) -> None:
    with_tools = 0
    for seed in range(300):
        ours = ordinary(seed)
        with_tools += bool(ours.tools)
        last = max(n for n, message in enumerate(ours.messages) if message.role in ("user", "tool"))
        asked = ours.model_copy(update={"messages": ours.messages[: last + 1]})
        for part, prompting in ((ours, False), (asked, True)):
            written = stock.apply_chat_template(
                as_stock_messages(part), as_stock_tools(part.tools), add_generation_prompt=prompting, tokenize=False
            )
            expected = harmony.prompt(part) if prompting else harmony.render(part).tokens
            assert written == harmony.text(expected), seed
    assert with_tools > 60


def test_the_template_gives_our_token_ids(stock: Any, harmony: Harmony) -> None:
    ours = ordinary(3)
    tokens = stock.apply_chat_template(as_stock_messages(ours), as_stock_tools(ours.tools), return_dict=False)
    assert tokens == harmony.render(ours).tokens


def test_identity_and_effort_can_be_given(stock: Any, toy: Tokenizer) -> None:
    chat = CHAT.model_copy(update={"identity": "You are Tiny.", "reasoning_effort": "high"})
    written = stock.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        tokenize=False,
        model_identity="You are Tiny.",
        reasoning_effort="high",
    )
    hello = Conversation(messages=(Message(role="user", content="Hi"),))
    assert written == toy.decode(Harmony(chat, toy).prompt(hello))


def test_a_tool_result_without_a_tool_is_refused(stock: Any) -> None:
    import jinja2

    with pytest.raises(jinja2.TemplateError, match="needs a name"):
        stock.apply_chat_template([{"role": "tool", "content": "3"}], tokenize=False)
