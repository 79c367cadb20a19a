"""`code_act`: xingyaoww/code-act, where `<execute>` holds an action and the next user turn its observation."""

import re

from posttrain.chat.coding_agent import PROMPT
from posttrain.chat.conversation import Tool
from posttrain.data.formats.format import BadRow, Fields, Format, Record, items, kind
from posttrain.data.formats.turns import Turns

EXECUTE = Tool(
    name="execute",
    description="Run Python code in a session that keeps its state, and see what it prints.",
    parameters={"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
)
ACTION = re.compile(r"<execute>\s*(.*?)\s*</execute>", re.DOTALL)
THOUGHT = re.compile(r"<thought>\s*(.*?)\s*</thought>", re.DOTALL)
SOLUTION = re.compile(r"</?solution>")
OBSERVATION = "Observation:"


def fields(record: Record) -> Fields:
    """The action becomes a call and its observation the call's result; what is said beside it is thinking."""
    turns, waiting, acted = Turns("conversations"), False, False
    turns.system(PROMPT)
    for place, turn in enumerate(items(record, "conversations")):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise BadRow(f"conversations[{place}].content", f"is {kind(turn)} without text")
        role, said = turn.get("role"), turn["content"].strip()
        match role:
            case "system":
                pass  # It explains the tags, which the call replaces.
            case "user" if waiting:
                turns.result(said.removeprefix(OBSERVATION).strip())
                waiting = False
            case "user":
                turns.user(said)
            case "assistant":
                waiting = _assistant(turns, said, place)
                acted = acted or waiting
            case _:
                raise BadRow(f"conversations[{place}].role", f"is {role!r}; system, user and assistant are known")
    return {"conversation": turns.conversation((EXECUTE,) if acted else ())}


def _assistant(turns: Turns, said: str, place: int) -> bool:
    """Whether an observation follows."""
    actions = ACTION.findall(said)
    around = SOLUTION.sub("", THOUGHT.sub(r"\1", ACTION.sub("", said))).strip()
    if not actions:
        if not around:
            raise BadRow(f"conversations[{place}].content", "is empty")
        turns.assistant(around)
        return False
    turns.assistant(None, thinking=around)
    turns.call(EXECUTE.name, {"code": "\n".join(actions)})
    return True


FORMAT = Format(
    columns=("conversations",),
    makes={"conversations": fields},
    reads="xingyaoww/code-act, splits `codeact` and `general`",
)
