"""`xlam`: Salesforce/xlam-function-calling-60k (gated): a query, and its tools and calls as JSON text."""

import re
from typing import Any

from posttrain.chat.conversation import Tool
from posttrain.data.formats.calls import call_task
from posttrain.data.formats.format import BadRow, Fields, Format, Record, from_json, kind, text
from posttrain.data.formats.turns import Turns

TYPES = {
    "str": "string",
    "string": "string",
    "int": "integer",
    "integer": "integer",
    "float": "number",
    "number": "number",
    "bool": "boolean",
    "boolean": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "array": "array",
    "dict": "object",
    "object": "object",
}
"""Python's names, in which the set declares parameters, as JSON schema types; others are left out."""


def fields(record: Record) -> Fields:
    tools = from_json(text(record, "tools"), "tools")
    answers = from_json(text(record, "answers"), "answers")
    if not isinstance(tools, list):
        raise BadRow("tools", f"is {kind(tools)}, not a list")
    if not isinstance(answers, list) or not answers:
        raise BadRow("answers", f"is {kind(answers)} without a call")
    offered = tuple(_tool(tool) for tool in tools)
    turns = Turns("answers")
    turns.user(text(record, "query"))
    for answer in answers:
        if not isinstance(answer, dict) or not isinstance(answer.get("name"), str):
            raise BadRow("answers", "a call has no name")
        if answer["name"] not in {tool.name for tool in offered}:
            raise BadRow("answers", f"calls {answer['name']!r}, which is not among the tools")
        turns.call(answer["name"], answer.get("arguments"))
    return {"conversation": turns.conversation(offered)}


def _tool(tool: Any) -> Tool:
    if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
        raise BadRow("tools", "a tool has no name")
    parameters = tool.get("parameters") or {}
    if not isinstance(parameters, dict) or not all(isinstance(one, dict) for one in parameters.values()):
        raise BadRow("tools", f"the parameters of {tool['name']!r} are not an object of objects")
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _parameter(value) for name, value in parameters.items()},
        "required": [name for name, value in parameters.items() if _required(value)],
    }
    return Tool(name=tool["name"], description=tool.get("description") or "", parameters=schema)


def _required(parameter: dict[str, Any]) -> bool:
    return "optional" not in str(parameter.get("type", "")).lower() and "default" not in parameter


def _parameter(parameter: dict[str, Any]) -> dict[str, Any]:
    found = _type(str(parameter.get("type", "")))
    kept = {key: parameter[key] for key in ("description", "default") if parameter.get(key) not in (None, "")}
    return {**found, **kept}


def _type(declared: str) -> dict[str, Any]:
    """`List[int], optional` is an array of integers."""
    name = re.sub(r",\s*optional.*$", "", declared.strip(), flags=re.IGNORECASE)
    if wrapped := re.fullmatch(r"Optional\[(.*)\]", name, flags=re.IGNORECASE):
        name = wrapped[1]
    outer, _, inner = name.partition("[")
    known = TYPES.get(outer.strip().lower())
    if known is None:
        return {}
    inside = _type(inner.removesuffix("]")) if known == "array" and "," not in inner else {}
    return {"type": known, **({"items": inside} if inside else {})}


FORMAT = Format(
    columns=("query", "tools", "answers"),
    makes={"conversations": fields, "tasks": lambda record: call_task(fields(record))},
    reads="Salesforce/xlam-function-calling-60k (gated)",
)
