"""Seeded conversations of every shape that Harmony can hold."""

import json
import random
from typing import Any

from posttrain.chat.conversation import BuiltinTool, Channel, Conversation, Effort, Message, Namespace, Tool

SPECIALS = ("<|end|>", "<|start|>assistant", "<|call|>", "<|message|>", "<|endoftext|>", "<|reserved_200013|>")
PIECES = (
    *("the", " quick", "Über", "naïve ", "日本語", "🙂", "e\u0301", "\u200b", "\ufffd", "I'll", "DON'T", "x_1", "0"),
    *("1234567", "\n", "\n\n", "\r\n", "  ", "\t", " ", "...", "{", "}", '"', "'", "\\", "//", "🇩🇪", "\x00"),
    *("def f(x):\n    return x", " | ", "to=functions.f", "null", "<|", "|>", "µ", "ﬁ", "ß", "١٢٣", "क्षि"),
    *SPECIALS,
)
EFFORTS: tuple[Effort, ...] = ("low", "medium", "high")
KEYS = ("path", "count", "limit", "flag", "items", "mode", "where", "größe", "a b")


def text(rng: random.Random, most: int = 12) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, most)))


def scalar(rng: random.Random) -> Any:
    numbers = (0, -3, 7, 1.0, 0.1, 1e-5, 2.5e-5, -1e-5, 1e-7, 1.5e16, 1e15, 1e100, 2**63, 2**70, -(2**70), -0.0)
    return rng.choice((*numbers, True, False, None, "plain", 'quo"ted', "ä\n\x01\x7f"))


def default(rng: random.Random) -> Any:
    return rng.choice((scalar(rng), [scalar(rng), [scalar(rng)]], {"k": scalar(rng), "ü": [], "o": {}}))


def schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A JSON schema, mostly sound and sometimes odd."""
    kinds = ["string", "integer", "number", "boolean", "enum", "list", "odd"]
    kinds += ["object", "array", "choice"] * 2 if depth < 3 else []
    kind = rng.choice(kinds)
    made: dict[str, Any] = {"type": kind}
    match kind:
        case "object":
            made = object_schema(rng, depth + 1)
        case "array":
            made = {"type": "array"} | ({"items": schema(rng, depth + 1)} if rng.random() < 0.8 else {})
        case "enum":
            made = {"type": "string", "enum": rng.sample(["a", "b c", 'q"', "ß", 4], rng.randint(0, 4))}
        case "list":
            made = {"type": rng.sample(["string", "integer", "null", "number", "object", 3], rng.randint(0, 3))}
        case "choice":
            made = {"oneOf": [schema(rng, depth + 1) for _ in range(rng.randint(0, 3))]}
            if made["oneOf"] and rng.random() < 0.3:
                made["description"] = made["oneOf"][0].get("description", "same")
        case "odd":
            made = rng.choice(
                (
                    {},
                    {"type": "null"},
                    {"type": 3},
                    {"anyOf": [{"type": "string"}]},
                    {"$ref": "#/x"},
                    {"enum": ["x", "y"]},
                    {"oneOf": "none"},
                    {"type": "integer", "enum": [1, 2]},
                )
            )
            made = dict(made)
    notes = (("description", text(rng, 5)), ("title", text(rng, 3)), ("nullable", rng.random() < 0.8))
    made |= {key: value for key, value in notes if rng.random() < 0.25}
    if rng.random() < 0.2:
        made["default"] = default(rng)
    if rng.random() < 0.1:
        made["examples"] = [rng.choice(("one", 'tw"o', 3)) for _ in range(rng.randint(0, 3))]
    return made


def object_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "object"}
    if rng.random() < 0.9:
        names = rng.sample(KEYS, rng.randint(0, 4))
        made["properties"] = {name: schema(rng, depth) for name in names}
        if rng.random() < 0.7:
            made["required"] = rng.sample(names, rng.randint(0, len(names)))
    return made


def tools(rng: random.Random) -> tuple[Tool, ...]:
    names = rng.sample(["f", "get_weather", "apply_patch", "v2.search", "run-tests"], rng.randint(1, 4))
    return tuple(
        Tool(
            name=name,
            description=text(rng, 8),
            parameters=rng.choices((object_schema(rng, 0), schema(rng), None), (85, 10, 5))[0],
        )
        for name in names
    )


def namespaces(rng: random.Random) -> tuple[Namespace, ...]:
    names = rng.sample(["calendar", "Mail", "zoo-1", "a_b"], rng.randint(1, 2))
    described = (None, text(rng, 4), "One line.\nAnd another.")
    return tuple(
        Namespace(name=name, description=rng.choice(described), tools=tools(rng) if rng.random() < 0.8 else ())
        for name in names
    )


def recipients(offered: Conversation) -> list[str]:
    """Everything that can be called."""
    spaces = [("functions", offered.tools), *((space.name, space.tools) for space in offered.namespaces)]
    builtin = {"python": ["python"], "browser": ["browser.search", "browser.open"]}
    return [
        *(f"{name}.{tool.name}" for name, declared in spaces for tool in declared),
        *(recipient for name in offered.builtin_tools for recipient in builtin[name]),
    ]


def called(rng: random.Random, recipient: str) -> list[Message]:
    """A call and its result."""
    arguments = json.dumps({rng.choice(KEYS): scalar(rng)}) if rng.random() < 0.8 else text(rng)
    builtin = recipient.split(".")[0] in ("python", "browser")
    channel: Channel = "analysis" if builtin and rng.random() < 0.7 else "commentary"
    # A built-in tool that was called in the chain of thought answers there.
    answer = channel if builtin and (channel == "commentary" or rng.random() < 0.5) else None
    return [
        Message(role="assistant", channel=channel, recipient=recipient, content=arguments),
        Message(role="tool", sender=recipient, channel=answer, content=text(rng)),
    ]


def turn(rng: random.Random, callable_tools: list[str]) -> list[Message]:
    """One assistant turn that ends in a final or in a call."""
    said: list[Message] = []

    def think() -> None:
        if rng.random() < 0.6:
            said.append(Message(role="assistant", channel="analysis", content=text(rng)))
        if rng.random() < 0.2:
            said.append(Message(role="assistant", channel="commentary", content=text(rng, 4)))

    for _ in range(rng.randint(0, 3) if callable_tools else 0):
        think()
        said += called(rng, rng.choice(callable_tools))
    if said and said[-1].role == "tool" and rng.random() < 0.2:
        return said[:-1]
    think()
    return [*said, Message(role="assistant", channel="final", content=text(rng))]


def conversation(seed: int) -> Conversation:
    rng = random.Random(seed)
    builtin: tuple[BuiltinTool, ...] = ("browser", "python")
    offered = Conversation(
        messages=(),
        tools=tools(rng) if rng.random() < 0.7 else (),
        namespaces=namespaces(rng) if rng.random() < 0.2 else (),
        builtin_tools=tuple(rng.sample(builtin, rng.randint(1, 2))) if rng.random() < 0.3 else (),
        instructions=text(rng) if rng.random() < 0.5 else None,
        reasoning_effort=rng.choice((None, *EFFORTS)),
    )
    messages: list[Message] = []
    for _ in range(rng.randint(1, 3)):
        messages += [Message(role="user", content=text(rng)) for _ in range(1 if rng.random() < 0.9 else 2)]
        messages += turn(rng, recipients(offered))
    return offered.model_copy(update={"messages": tuple(messages)})
