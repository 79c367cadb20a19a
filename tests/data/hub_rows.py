"""A copy of the hub with as many rows as wanted of every set that `tui` reads, in the sets' true schemas."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.data.sources import HUB

Rows = Callable[[int], dict[str, Any]]
PLACES = ("Rome", "Oslo", "Lima", "Bern", "Kyiv", "Baku")


def write_hub(folder: Path, rows: int, without: tuple[str, ...] = ()) -> Path:
    """`without` names repositories that are left out, as a gated one would be."""
    for name, make in FILES.items():
        repo = "/".join(name.split("/")[:2])
        if repo in without:
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HUB / repo / "README.md", folder / repo / "README.md")
        path.write_text("".join(json.dumps(make(number)) + "\n" for number in range(rows)))
    return folder


def _asked(number: int) -> tuple[str, str, int]:
    place = PLACES[number % len(PLACES)]
    return f"Weather in {place} on day {number}?", place, number


def _tool(name: str) -> dict[str, Any]:
    properties = {"place": {"type": "string"}, "day": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties, "required": ["place", "day"]}
    return {"type": "function", "function": {"name": name, "description": "Weather.", "parameters": parameters}}


def _hermes(number: int) -> dict[str, Any]:
    asked, place, day = _asked(number)
    call = json.dumps({"name": "weather", "arguments": {"place": place, "day": day}})
    turns = [("system", "Use tools."), ("human", asked), ("gpt", f"<tool_call>\n{call}\n</tool_call>")]
    conversations = [{"from": speaker, "value": value} for speaker, value in turns]
    return {"id": f"h{number}", "conversations": conversations, "tools": json.dumps([_tool("weather")])}


def _xlam(number: int) -> dict[str, Any]:
    asked, place, day = _asked(number)
    parameters = {"place": {"description": "Where.", "type": "str"}, "day": {"description": "When.", "type": "int"}}
    tool = {"name": "weather", "description": "Weather.", "parameters": parameters}
    call = {"name": "weather", "arguments": {"place": place, "day": day}}
    return {"id": number, "query": asked, "answers": json.dumps([call]), "tools": json.dumps([tool])}


def _glaive(number: int) -> dict[str, Any]:
    asked, place, _ = _asked(number)
    tool = json.dumps(_tool("weather")["function"], indent=4)
    chat = f"USER: {asked}\n\n\nASSISTANT: It rains in {place}. <|endoftext|>\n\n\n"
    return {"system": f"SYSTEM: You have access to the following functions -\n{tool}\n", "chat": chat}


def _code_act(number: int) -> dict[str, Any]:
    asked, place, _ = _asked(number)
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"It is dry in {place}."}]
    return {"id": f"c{number}", "conversations": turns}


def _commit(number: int) -> dict[str, Any]:
    facts = {
        "commit": f"{number:04x}",
        "old_file": "a",
        "new_file": "a",
        "lang": "x",
        "license": "mit",
        "repos": "me/x",
    }
    edit = {"old_contents": f"n = {number}\n", "new_contents": f"n = {number + 1}\n", "subject": "Count on"}
    return facts | edit | {"message": "Count on"}


def _edit(number: int) -> dict[str, Any]:
    return _commit(number) | {"instruction": "Add one.", "ndiff": "- +", "content": "<before>"}


def _preferred(number: int) -> dict[str, Any]:
    asked, place, _ = _asked(number)
    opening = f"\n\nHuman: {asked}\n\nAssistant:"
    return {"chosen": f"{opening} It rains in {place}.", "rejected": f"{opening} Who knows."}


def _feedback(number: int) -> dict[str, Any]:
    asked, place, _ = _asked(number)
    return {"query": asked, "answer": f"In {place} it rains. " * 6, "resource": "own", "lang": "python"}


FILES: dict[str, Rows] = {
    "glaiveai/glaive-function-calling-v2/glaive-function-calling-v2.jsonl": _glaive,
    "Salesforce/xlam-function-calling-60k/xlam_function_calling_60k.jsonl": _xlam,
    "NousResearch/hermes-function-calling-v1/func-calling-singleturn.json": _hermes,
    "NousResearch/hermes-function-calling-v1/func-calling.json": lambda number: _hermes(1000 + number),
    "NousResearch/hermes-function-calling-v1/json-mode-singleturn.json": _hermes,
    "xingyaoww/code-act/data/codeact.jsonl": _code_act,
    "xingyaoww/code-act/data/general.jsonl": lambda number: _code_act(1000 + number),
    **{
        f"bigcode/commitpackft/data/{language}/data.jsonl": _commit
        for language in ("python", "javascript", "go", "rust", "java", "typescript")
    },
    "nuprl/EditPackFT/data/train.jsonl": _edit,
    "Anthropic/hh-rlhf/train.jsonl": _preferred,
    "Anthropic/hh-rlhf/test.jsonl": lambda number: _preferred(1000 + number),
    "m-a-p/CodeFeedback-Filtered-Instruction/CodeFeedback-Filtered-Instruction.jsonl": _feedback,
}
