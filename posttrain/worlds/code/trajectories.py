"""Conversations and preference pairs from repair tasks: what the tools say in them is what they really said."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from posttrain.chat.conversation import Conversation, Message, call
from posttrain.run.folder import digest_json
from posttrain.scoring import code
from posttrain.scoring.code import Check
from posttrain.worlds.code.environment import CodeEnvironment, changed_lines, suite
from posttrain.worlds.code.syntax import mutants
from posttrain.worlds.code.tree import patch_between

AROUND = 3
"""Lines shown above and below a place that is looked at."""
MOST_WRONG = 2
"""Wrong solutions that a task's right one is ranked with."""

Patch = dict[str, str]


class Play:
    """A conversation in the making, with the environment that answers it."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task, self.reference = task, task["reference"]
        self.environment = CodeEnvironment(task)
        self.messages: list[Message] = []

    def act(self, thought: str | None, tool: str, train: bool = True, **arguments: str) -> str:
        """Call a tool; what it says. A call that is a mistake is shown and not trained on."""
        turn = [Message(role="assistant", channel="analysis", content=thought, train=train)] if thought else []
        turn.append(call(tool, arguments, train=train))
        replies = self.environment.respond(turn)
        self.messages += [*turn, *replies]
        return replies[0].content

    def answer(self, text: str) -> dict[str, Any]:
        self.messages.append(Message(role="assistant", channel="final", content=text))
        prompt = Conversation.model_validate(self.task["prompt"])
        return prompt.model_copy(update={"messages": (*prompt.messages, *self.messages)}).model_dump()

    @property
    def repaired(self) -> bool:
        return suite(self.environment.language, self.environment.files)[0]


Shape = Callable[[Play, random.Random], str]
"""Plays a task; the final answer."""


def _basic(play: Play, rng: random.Random) -> str:
    patch = play.reference["patch"]
    play.act(f"The failure leads to {play.reference['function']} in {patch['path']}.", "read_file", path=patch["path"])
    play.act(play.reference["explanation"], "apply_patch", **patch)
    play.act("See whether that repairs it.", "run_tests")
    return f"Repaired {patch['path']}: {play.reference['explanation']} The tests pass."


def _multi_step(play: Play, rng: random.Random) -> str:
    patch, function = play.reference["patch"], play.reference["function"]
    play.act("First see what fails.", "run_tests")
    play.act(f"Find {function}.", "repo_search", text=function)
    at = play.environment.files[patch["path"]].split(patch["old"])[0].count("\n") + 1
    first, last = max(1, at - AROUND), at + patch["old"].count("\n") + AROUND
    play.act("Look at that place.", "run_command", command=f"sed -n '{first},{last}p' '{patch['path']}'")
    play.act(play.reference["explanation"], "apply_patch", **patch)
    play.act("Run the tests again.", "run_tests")
    return f"{play.reference['explanation']} It is repaired in {patch['path']}, and the tests pass."


def _planning(play: Play, rng: random.Random) -> str:
    patch, function = play.reference["patch"], play.reference["function"]
    plan = (
        f"Plan: 1. read {patch['path']}, which the failure names; 2. compare {function} with what its test wants; "
        "3. change that place alone; 4. run all tests."
    )
    play.act(plan, "read_file", path=patch["path"])
    play.act(f"Steps 2 and 3. {play.reference['explanation']}", "apply_patch", **patch)
    play.act("Step 4.", "run_tests")
    return f"Done as planned: {play.reference['explanation']} One place in {patch['path']} is changed; all tests pass."


def _self_correction(play: Play, rng: random.Random) -> str:
    """A repair that is wrong, or one that does not fit the file; then the right one."""
    patch = play.reference["patch"]
    path, buggy = patch["path"], play.environment.files[patch["path"]]
    same_place = (one for one in _wrong_patches(play.task, rng) if one["old"] == patch["old"])
    wrong = next((one for one in same_place if not _passes(play, one)), None)
    if wrong is not None:
        play.act(f"{play.reference['function']} has to be changed.", "apply_patch", train=False, **wrong)
        play.act("Test it.", "run_tests")
        right = buggy.replace(patch["old"], patch["new"])
        undo = {"path": path, **patch_between(play.environment.files[path], right)}
        play.act(f"That was not it: tests fail still. {play.reference['explanation']}", "apply_patch", **undo)
    else:
        unlike = {**patch, "old": f"{patch['old'].rstrip()} \n"}
        play.act(play.reference["explanation"], "apply_patch", train=False, **unlike)
        play.act("The text is not like that; read the file.", "read_file", path=path)
        play.act(play.reference["explanation"], "apply_patch", **patch)
    play.act("Run the tests.", "run_tests")
    return f"My first change was wrong; now {path} is repaired. {play.reference['explanation']}"


SHAPES: dict[str, tuple[float, Shape]] = {
    "multi-step": (0.30, _multi_step),
    "planning": (0.20, _planning),
    "self-correction": (0.15, _self_correction),
    "basic": (0.35, _basic),
}
"""The seed's shares (TUI)."""


def _wrong_patches(task: dict[str, Any], rng: random.Random) -> list[Patch]:
    """Patches of the fault to other mutants of the same function, those of the same lines first."""
    reference = task["reference"]
    patch = reference["patch"]
    buggy = reference["tree"][patch["path"]]
    right = buggy.replace(patch["old"], patch["new"])
    found = []
    for mutant in mutants(patch["path"], right, reference["language"]):
        other = mutant.applied(right)
        if mutant.function == reference["function"] and other != buggy:
            found.append({"path": patch["path"], **patch_between(buggy, other)})
    rng.shuffle(found)
    return sorted(found, key=lambda one: one["old"] != patch["old"])[:MOST_WRONG]


def _passes(play: Play, patch: Patch) -> bool:
    path = patch["path"]
    files = play.environment.files
    return suite(play.environment.language, {**files, path: files[path].replace(patch["old"], patch["new"])})[0]


def fault_of(task: dict[str, Any]) -> str | None:
    """Why a task cannot teach: no tests, tests that pass on its buggy code, tests that fail on its fixed code."""
    reference = task["reference"]
    if not reference.get("visible"):
        return "has no tests"
    patch, tree = reference["patch"], reference["tree"]
    fixed = {**tree, patch["path"]: tree[patch["path"]].replace(patch["old"], patch["new"])}
    if suite(reference["language"], tree)[0]:
        return "its tests pass on the buggy code"
    if not suite(reference["language"], fixed)[0]:
        return "its tests fail on the fixed code"
    return None


def _sound(tasks: Iterable[dict[str, Any]], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        if (fault := fault_of(task)) is None:
            yield task
        else:
            counts[f"dropped: {fault}"] += 1


def shape_of(number: int) -> str:
    """The shape of task `number`: of any first n, each shape has its share of n, give or take one."""
    given: Counter[str] = Counter()
    for place in range(number % 20 + 1):
        chosen = max(SHAPES, key=lambda name: SHAPES[name][0] * (place + 1) - given[name])
        given[chosen] += 1
    return chosen


def conversations(
    tasks: Iterable[dict[str, Any]], seed: int, counts: Counter[str] | None = None
) -> Iterator[dict[str, Any]]:
    """A trajectory per task; one whose repair does not pass is dropped and counted."""
    counts = Counter() if counts is None else counts
    for number, task in enumerate(_sound(tasks, counts)):
        name = shape_of(number)
        play = Play(task)
        final = SHAPES[name][1](play, random.Random(f"{seed}/{task['id']}"))
        if not play.repaired:
            counts[f"dropped: {name} does not end in passing tests"] += 1
            continue
        counts[name] += 1
        conversation = play.answer(final)
        conversation["metadata"] = {"shape": name, "task": task["id"], "kind": play.reference["kind"]}
        yield {"id": f"{task['id']}-{name}", "conversation": conversation}


def pairs(tasks: Iterable[dict[str, Any]], seed: int, counts: Counter[str] | None = None) -> Iterator[dict[str, Any]]:
    """A task's solutions, each really graded: the best ranked is chosen, the worst rejected."""
    counts = Counter() if counts is None else counts
    for task in _sound(tasks, counts):
        patch = task["reference"]["patch"]
        options = [patch, *_wrong_patches(task, random.Random(f"{seed}/{task['id']}"))]
        # Of equals the recorded repair is the better one.
        ranked = sorted((rank, -place) for place, option in enumerate(options) if (rank := _rank(task, option)))
        if len(ranked) < 2 or ranked[0][0] == ranked[-1][0]:
            counts["dropped: no solution ranks below another"] += 1
            continue
        counts["pairs"] += 1
        yield _pair(task, options[-ranked[-1][1]], options[-ranked[0][1]])


def _rank(task: dict[str, Any], patch: Patch) -> float | None:
    reference = task["reference"]
    tree = reference["tree"]
    edits = {patch["path"]: tree[patch["path"]].replace(patch["old"], patch["new"])}
    visible, hidden = ([Check(*pair) for pair in reference[part]] for part in ("visible", "hidden"))
    graded = code.evaluate(code.shared_pool(), reference["language"], tree, edits, visible, hidden)
    return None if graded.unknown is not None else code.rank(graded, changed_lines(tree, tree | edits))


def _pair(task: dict[str, Any], better: Patch, worse: Patch) -> dict[str, Any]:
    """Both continue the same look at the file."""
    play = Play(task)
    play.act(None, "read_file", path=better["path"])
    prompt = task["prompt"]
    seen = [message.model_dump() for message in play.messages]
    return {
        "id": f"{task['id']}-pair-{digest_json(worse)[:6]}",
        "prompt": {**prompt, "messages": [*prompt["messages"], *seen]},
        "chosen": [call("apply_patch", better).model_dump()],
        "rejected": [call("apply_patch", worse).model_dump()],
    }
