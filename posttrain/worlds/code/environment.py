"""Coding repair on a source tree: read it, search it, patch it, run its tests; graded by values nobody wrote down."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.chat.conversation import Message, Tool, call, tool_result
from posttrain.errors import MachineError
from posttrain.run.folder import digest_json
from posttrain.sandbox.slots import Budget
from posttrain.scoring import code
from posttrain.scoring.calls import first_call
from posttrain.scoring.code import Check, Evaluation
from posttrain.scoring.score import Score
from posttrain.scoring.toolchains import TOOLCHAINS

COMMAND = Budget(wall_s=60, cpu_s=60, memory_bytes=2**31, open_files=1024)
LONGEST_FILE, MOST_HITS = 16_000, 50
CACHED = 2000


def _tool(name: str, description: str, *parameters: str) -> Tool:
    properties = {parameter: {"type": "string"} for parameter in parameters}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return Tool(name=name, description=description, parameters=schema)


TOOLS = (
    _tool("read_file", "show a file", "path"),
    _tool("apply_patch", "replace old, which must be in the file once, by new", "path", "old", "new"),
    _tool("run_tests", "run the tests"),
    _tool("repo_search", "lines that contain a text", "text"),
    _tool("run_command", "run a shell command in the folder; changes of its files are kept", "command"),
)
ARGUMENTS = {tool.name: set((tool.parameters or {})["required"]) for tool in TOOLS}


class CodeEnvironment:
    """Every command runs in a fresh working folder with the tree as it stands; a turn without a call ends the episode.

    Parts: those of `posttrain.scoring.code.score` (`format`: there were calls, all of them well-formed), `solved`,
    `iterations` (patches that were tried) and `diff_lines`.
    """

    def __init__(self, row: dict[str, Any]) -> None:
        self.reference = row["reference"]
        self.language: str = self.reference["language"]
        self.tree: dict[str, str] = self.reference["tree"]
        self.edits: dict[str, str] = {}
        self.well_formed: list[bool] = []
        self.iterations = 0

    @property
    def files(self) -> dict[str, str]:
        """The tree with the edits that may be made."""
        return code.merged(TOOLCHAINS[self.language], self.tree, self.edits)[0]

    def respond(self, messages: list[Message]) -> list[Message]:
        made = first_call(messages)
        if made is None:
            return []
        fault = _call_fault(made.tool, made.arguments)
        self.well_formed.append(fault is None)
        if fault is not None or made.arguments is None:
            return [tool_result(made.tool, f"error: {fault}")]
        return [tool_result(made.tool, ACTIONS[made.tool](self, **made.arguments))]

    def score(self) -> Score:
        key = digest_json(["score", self.reference, self.edits])
        checks = {part: [Check(*pair) for pair in self.reference[part]] for part in ("visible", "hidden")}
        found: Evaluation = remembered(
            key,
            lambda: code.evaluate(
                code.shared_pool(), self.language, self.tree, self.edits, checks["visible"], checks["hidden"]
            ),
            keep=lambda evaluation: evaluation.unknown is None,
        )
        scored = code.score(found, bool(self.well_formed) and all(self.well_formed))
        if scored.value is None:
            return scored
        more = {
            "solved": float(scored.parts["tests"] == 1.0),
            "iterations": float(self.iterations),
            "diff_lines": float(changed_lines(self.tree, self.files)),
        }
        return Score(scored.value, scored.parts | more)

    # ------------------------------------------------------------ the tools

    def read_file(self, path: str) -> str:
        if path not in self.files:
            return f"error: no file {path}; files: {', '.join(sorted(self.files))}"
        text = self.files[path]
        return text if len(text) <= LONGEST_FILE else f"{text[:LONGEST_FILE]}\n… ({len(text)} characters in all)"

    def apply_patch(self, path: str, old: str, new: str) -> str:
        self.iterations += 1
        if path not in self.files:
            return self.read_file(path)
        found = self.files[path].count(old) if old else 0
        if found != 1:
            return f"error: old is {found} times in {path}, not once"
        changed = self.files[path].replace(old, new)
        if code.merged(TOOLCHAINS[self.language], {}, {path: changed})[1]:
            return f"error: {path} belongs to the tests or to the tools' settings and stays as it is"
        self.edits[path] = changed
        return f"patched {path}"

    def run_tests(self) -> str:
        passed, said = suite(self.language, self.files)
        return f"tests {'passed' if passed else 'failed'}\n{said}"

    def repo_search(self, text: str) -> str:
        hits = [
            f"{path}:{number}: {line.strip()}"
            for path, whole in sorted(self.files.items())
            for number, line in enumerate(whole.splitlines(), 1)
            if text and text in line
        ]
        more = [f"… and {len(hits) - MOST_HITS} more"] if len(hits) > MOST_HITS else []
        return "\n".join(hits[:MOST_HITS] + more) or "nothing found"

    def run_command(self, command: str) -> str:
        try:
            with code.opened(code.shared_pool(), self.language, self.files) as work:
                done = work.run(("/bin/sh", "-c", command), COMMAND)
                after = work.session.read(sorted(self.files))
                said = work.shown()
        except MachineError as error:
            return f"error: {error}"
        for path, data in after.items():
            text = data.decode(errors="replace")
            if text != self.files[path]:
                self.edits[path] = text
        return f"{said}\n({f'ended by the sandbox: {done.limit}' if done.limit else f'exit code {done.exit}'})".strip()


ACTIONS: dict[str, Callable[..., str]] = {
    "read_file": CodeEnvironment.read_file,
    "apply_patch": CodeEnvironment.apply_patch,
    "run_tests": CodeEnvironment.run_tests,
    "repo_search": CodeEnvironment.repo_search,
    "run_command": CodeEnvironment.run_command,
}


def _call_fault(tool: str, arguments: dict[str, Any] | None) -> str | None:
    if tool not in ARGUMENTS:
        return f"no tool {tool}; tools: {', '.join(ARGUMENTS)}"
    if arguments is None:
        return "the arguments are no JSON object"
    if set(arguments) != ARGUMENTS[tool] or not all(isinstance(value, str) for value in arguments.values()):
        return f"{tool} takes {', '.join(sorted(ARGUMENTS[tool])) or 'no arguments'}, as text"
    return None


def changed_lines(before: Mapping[str, str], after: Mapping[str, str]) -> int:
    """Lines taken out and put in, over all files."""
    return sum(
        line[:1] in "+-" and line[:3] not in ("+++", "---")
        for path in before.keys() | after.keys()
        if before.get(path) != after.get(path)
        for line in difflib.unified_diff(before.get(path, "").split("\n"), after.get(path, "").split("\n"), n=0)
    )


def solution(reference: Mapping[str, Any], patch: Mapping[str, str], explanation: str) -> list[Message]:
    """The recorded repair as a turn, its result, and the answer."""
    return [
        Message(role="assistant", channel="analysis", content=explanation),
        call("apply_patch", dict(patch)),
        tool_result("apply_patch", f"patched {patch['path']}"),
        Message(role="assistant", channel="final", content=f"Repaired {patch['path']}. {explanation}"),
    ]


_answers: dict[str, Any] = {}


def remembered(key: str, make: Callable[[], Any], keep: Callable[[Any], bool] = lambda made: True) -> Any:
    """The same question is answered once per process: members of a group often stand at the same code."""
    try:
        return _answers[key]
    except KeyError:
        made = make()
    if keep(made):
        if len(_answers) >= CACHED:
            _answers.clear()
        _answers[key] = made
    return made


def suite(language: str, files: Mapping[str, str]) -> tuple[bool, str]:
    """The tree's own tests for a model to read; tests that hang have not passed."""
    try:
        key = digest_json(["suite", language, files])
        found: tuple[bool, str] = remembered(key, lambda: code.run_suite(code.shared_pool(), language, files))
        return found
    except MachineError as error:
        return False, f"error: {error}"
