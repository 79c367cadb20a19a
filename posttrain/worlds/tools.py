"""Tool world: choose among offered tools, copy arguments never seen before, answer from the tool's result."""

import json
import random
from typing import Any

from posttrain.chat.conversation import Conversation, Message, Tool, call, tool_result
from posttrain.scoring.calls import final_text, first_call
from posttrain.scoring.score import Score
from posttrain.worlds.names import Split, name, names

VERBS = (
    "send", "find", "open", "book", "order", "check", "cancel", "count", "print", "track", "start", "stop", "sell",
    "rent", "fix", "call", "pay", "plan", "store", "load", "share", "mark", "clean", "close",
)  # fmt: skip
PHRASES: dict[str, tuple[str, ...]] = {
    "person": ("for {}", "for person {}", "person {}"),
    "city": ("in {}", "in city {}", "city {}"),
    "item": ("with {}", "with item {}", "item {}"),
    "code": ("code {}", "with code {}"),
    "count": ("{} times", "count {}"),
    "day": ("on day {}", "day {}"),
}
INTEGERS = frozenset({"count", "day"})
REQUESTS = (
    "Please {verb} the {noun} {args}.",
    "Can you {verb} the {noun} {args}?",
    "I want to {verb} the {noun} {args}.",
    "I need you to {verb} a {noun} {args}.",
    "We have to {verb} the {noun} {args}.",
    "Hello, {verb} the {noun} {args}, thanks.",
    "My task: {verb} {noun} {args}.",
    "Today we {verb} the {noun} {args}.",
    "About the {noun}: {verb} it {args}.",
    "It is time to {verb} this {noun} {args}.",
    "Could you {verb} one {noun} {args} now?",
    "The {noun} {args}: please {verb} it.",
)
INSTRUCTIONS = (None, None, "Use the tools.", "Be brief.", "Use one tool.")
STATUS = ("done", "ok", "ready", "set")
ANSWERS = ("Done, the id is {}.", "The id is {}.", "Ready: {}.", "It is done. The id is {}.")


def offered_tool(verb: str, noun: str, parameters: list[str]) -> Tool:
    properties = {p: {"type": "integer" if p in INTEGERS else "string"} for p in parameters}
    return Tool(
        name=f"{verb}_{noun}",
        description=f"{verb} a {noun}",
        parameters={"type": "object", "properties": properties, "required": list(parameters)},
    )


def argument(rng: random.Random, parameter: str, split: Split) -> str | int:
    match parameter:
        case "count":
            return rng.randint(2, 99)
        case "day":
            return rng.randint(1, 28)
        case "code":
            return f"{rng.randint(1000, 9999)}"
        case _:
            return name(rng, split)


def _parameters(rng: random.Random) -> list[str]:
    return rng.sample(list(PHRASES), rng.choice((1, 2, 2, 3)))


def _offer(rng: random.Random, split: Split, verb: str, noun: str, parameters: list[str]) -> list[Tool]:
    """The right tool among one to three others, each sharing its verb or its noun."""
    tools = [offered_tool(verb, noun, parameters)]
    other_nouns = iter(names(rng, split, 4))
    other_verbs = iter(rng.sample([v for v in VERBS if v != verb], 3))
    for _ in range(rng.randint(1, 3)):
        pair = (verb, next(other_nouns)) if rng.random() < 0.5 else (next(other_verbs), noun)
        tools.append(offered_tool(*pair, _parameters(rng)))
    rng.shuffle(tools)
    return tools


def task(rng: random.Random, split: Split) -> dict[str, Any]:
    verb, noun, parameters = rng.choice(VERBS), name(rng, split), _parameters(rng)
    tools = _offer(rng, split, verb, noun, parameters)
    arguments = {p: argument(rng, p, split) for p in parameters}
    spoken = [rng.choice(PHRASES[p]).format(value) for p, value in arguments.items()]
    rng.shuffle(spoken)
    request = rng.choice(REQUESTS).format(verb=verb, noun=noun, args=" ".join(spoken))
    prompt = Conversation(
        messages=(Message(role="user", content=request),), tools=tuple(tools), instructions=rng.choice(INSTRUCTIONS)
    )
    identity = f"{name(rng, split)}-{rng.randint(10, 99)}"
    result = json.dumps({"id": identity, "status": rng.choice(STATUS)}, separators=(",", ":"))
    tool = f"{verb}_{noun}"
    solution = [
        Message(role="assistant", channel="analysis", content=f"Use {tool}."),
        call(tool, arguments),
        tool_result(tool, result),
        Message(role="assistant", channel="final", content=rng.choice(ANSWERS).format(identity)),
    ]
    return {
        "world": "tools",
        "prompt": prompt.model_dump(),
        "reference": {"tool": tool, "arguments": arguments, "result": result, "id": identity},
        "solution": [message.model_dump() for message in solution],
    }


def conversation(rng: random.Random, split: Split) -> dict[str, Any]:
    row = task(rng, split)
    prompt = row["prompt"]
    return {"conversation": {**prompt, "messages": [*prompt["messages"], *row["solution"]]}}


class ToolEnvironment:
    """Answers the right call with the task's result and any other with an error; a turn without a call ends it.

    Only the first call is graded as `exact`: an error message never turns a miss into a hit.
    """

    def __init__(self, row: dict[str, Any]) -> None:
        self.reference = row["reference"]
        self.spoken: list[Message] = []

    def respond(self, messages: list[Message]) -> list[Message]:
        self.spoken += messages
        made = first_call(messages)
        if made is None:
            return []
        if made.arguments is None:
            reply = '{"error":"bad json"}'
        elif made.tool != self.reference["tool"]:
            reply = '{"error":"wrong tool"}'
        elif not made.matches_arguments(self.reference["arguments"]):
            reply = '{"error":"wrong arguments"}'
        else:
            reply = self.reference["result"]
        return [tool_result(made.tool, reply)]

    def score(self) -> Score:
        made = first_call(self.spoken)
        parts = {"format": 0.0, "tool": 0.0, "arguments": 0.0, "exact": 0.0}
        if made is not None:
            parts["format"] = float(made.arguments is not None)
            parts["tool"] = float(made.tool == self.reference["tool"])
            parts["arguments"] = float(made.matches_arguments(self.reference["arguments"]))
            parts["exact"] = parts["tool"] * parts["arguments"]
        parts["answer"] = float(self.reference["id"] in final_text(self.spoken))
        return Score(value=parts["exact"], parts=parts, reason=None)
