"""The worlds by name: what each can make, and how its tasks are played."""

import difflib
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from posttrain.errors import DataError
from posttrain.scoring.answers import score_answer
from posttrain.scoring.decisions import score_decision
from posttrain.worlds import (
    agent,
    alphabet,
    answers,
    calculator,
    calls,
    duel,
    identity,
    language,
    preferences,
    repair,
    reverse,
    spelling,
    sums,
    tes,
    tools,
    words,
)
from posttrain.worlds.code.environment import CodeEnvironment
from posttrain.worlds.environment import Environment
from posttrain.worlds.names import Split

Maker = Callable[[random.Random, Split], dict[str, Any]]

MAKERS: dict[tuple[str, str], Maker] = {
    ("language", "text"): language.document,
    ("words", "text"): words.document,
    ("tools", "conversations"): tools.conversation,
    ("tools", "tasks"): tools.task,
    ("agent", "conversations"): agent.conversation,
    ("repair", "tasks"): repair.task,
    ("preferences", "pairs"): preferences.pair,
    ("identity", "conversations"): identity.conversation,
    ("spelling", "conversations"): spelling.conversation,
    ("spelling", "tasks"): spelling.task,
    ("tes", "tasks"): tes.task,
    ("tes_small", "tasks"): tes.small_task,
    ("tes_small", "conversations"): tes.small_conversation,
    ("duel", "tasks"): duel.task,
    ("duel", "conversations"): duel.conversation,
    ("duel_traces", "tasks"): duel.trace_task,
    ("duel_traces", "conversations"): duel.trace_conversation,
    ("calculator", "tasks"): calculator.task,
    ("calculator", "conversations"): calculator.conversation,
    ("sums", "tasks"): sums.task,
    ("sums", "conversations"): sums.conversation,
    ("reverse", "tasks"): reverse.task,
    ("reverse", "conversations"): reverse.conversation,
    ("alphabet", "tasks"): alphabet.task,
    ("alphabet", "conversations"): alphabet.conversation,
}
ENVIRONMENTS: dict[str, Callable[[dict[str, Any]], Environment]] = {
    "tools": tools.ToolEnvironment,
    "repair": repair.RepairEnvironment,
    "code": CodeEnvironment,
    "answers": partial(answers.AnswerEnvironment, score_answer),
    "calculator": calculator.CalculatorEnvironment,
    "calls": calls.CallEnvironment,
    "decisions": partial(answers.AnswerEnvironment, score_decision),
    "spelling": spelling.SpellingEnvironment,
}


def _maker(world: str, content: str) -> Maker:
    if (world, content) in MAKERS:
        return MAKERS[world, content]
    known = sorted({name for name, _ in MAKERS})
    if world in known:
        makes = ", ".join(sorted(kind for name, kind in MAKERS if name == world))
        raise DataError(f"world {world!r} makes no {content}; it makes {makes}")
    near = difflib.get_close_matches(world, known, n=1)
    raise DataError(
        f"no world {world!r}; there are {', '.join(known)}" + (f". Did you mean {near[0]}?" if near else "")
    )


def row(world: str, content: str, split: Split, seed: int, index: int) -> dict[str, Any]:
    """Row `index`: a pure function of these five."""
    rng = random.Random(f"{world}/{content}/{split}/{seed}/{index}")
    return {"id": f"{world}-{split}-{seed}-{index}", **_maker(world, content)(rng, split)}


def rows(world: str, content: str, split: Split, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """The first `count` rows in the shape of `content` (`posttrain.data.rows`)."""
    _maker(world, content)
    return (row(world, content, split, seed, index) for index in range(count))


def start(task: dict[str, Any]) -> Environment:
    """A fresh environment for a task row."""
    if task["world"] not in ENVIRONMENTS:
        raise DataError(f"world {task['world']!r} has no tasks; {', '.join(ENVIRONMENTS)} have")
    return ENVIRONMENTS[task["world"]](task)
