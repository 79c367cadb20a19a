"""Repair tasks of source trees: made, graded, played and told; what cannot teach is left out and named."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from posttrain.chat.conversation import Conversation, Message, call
from posttrain.cli.main import main
from posttrain.errors import DataError
from posttrain.sandbox.slots import Budget
from posttrain.scoring import code, toolchains
from posttrain.scoring.toolchains import TOOLCHAINS, Found, Step
from posttrain.worlds.code import mutate, trajectories
from posttrain.worlds.code.environment import CodeEnvironment
from posttrain.worlds.code.tree import read_tree
from posttrain.worlds.registry import start

SOURCE = "def double(a: int) -> int:\n    return a + a\n\n\ndef half(a: int) -> int:\n    return a // 2\n"
TESTS = "from m import double, half\n\n\ndef test_m() -> None:\n    assert double(3) == 6\n    assert half(8) == 4\n"
READ = call("read_file", {"path": "m.py"})


def need(language: str) -> None:
    if lacks := toolchains.missing(language):
        pytest.skip(lacks)


def tree(folder: Path, **files: str) -> str:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return str(folder)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Tasks of the small Python tree, made once."""
    need("python")
    return list(mutate.tasks("shipped:python", "python", "train", limit=3))


def buggy(rows: list[dict[str, Any]], **changed: Any) -> dict[str, Any]:
    """A task whose reference is another one in part."""
    return {**rows[0], "reference": {**rows[0]["reference"], **changed}}


# ---------------------------------------------------------------- each language


@pytest.mark.parametrize("language", TOOLCHAINS)
def test_a_tree_is_mutated_caught_repaired_and_graded(language: str) -> None:
    need(language)
    counts: Counter[str] = Counter()
    [row] = mutate.tasks(f"shipped:{language}", language, "heldout", limit=1, counts=counts)
    reference, right = row["reference"], read_tree(f"shipped:{language}").files
    assert counts["caught"] == 1 and reference["error_message"][:500] in row["prompt"]["messages"][0]["content"]
    assert reference["tree"] != right and reference["buggy_code"] != reference["fixed_code"]
    untouched, repaired = start(row), start(row)
    untouched.respond([READ])
    assert untouched.score().value == 0.1 and untouched.score().parts["tests"] < 1
    solution = [Message(**message) for message in row["solution"]]
    assert repaired.respond(solution[:2]) == [solution[2]]
    assert isinstance(repaired, CodeEnvironment) and repaired.files == right
    parts = repaired.score().parts
    assert (parts["tests"], parts["compiles"], parts["lint"], parts["solved"], parts["iterations"]) == (1, 1, 1, 1, 1)
    assert repaired.score().value == 1.0
    assert repaired.respond(solution[3:]) == []
    shown, kept = (len(reference[part]) for part in ("visible", "hidden"))
    assert kept > shown > 0


# ---------------------------------------------------------------- making tasks


def test_a_second_call_goes_on_where_the_first_was_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("python")
    repo = tree(tmp_path, m__py=SOURCE, test_m__py=TESTS)
    judged: list[str] = []
    real = mutate.judge

    def judge(mutant: Any, *rest: Any) -> Any:
        judged.append(mutate._mutant_id(mutant))
        return real(mutant, *rest)

    monkeypatch.setattr(mutate, "judge", judge)
    first = list(mutate.tasks(repo, "python", limit=2))
    before = len(judged)
    [verdicts] = Path(mutate.cache_folder()).glob("mutants/*/verdicts.jsonl")
    verdicts.write_bytes(verdicts.read_bytes()[:-5])  # a kill in the middle of a line
    every, counts = [], Counter[str]()
    every = list(mutate.tasks(repo, "python", counts=counts))
    assert every[:2] == first and len(judged) > before
    assert len(judged) - len(set(judged)) == 1, "only the torn verdict is asked for again"
    ids = {row["id"] for row in every}
    assert len(ids) == len(every) == counts["caught"]
    judged.clear()
    assert [row["id"] for row in mutate.tasks(repo, "python")] == [row["id"] for row in every] and judged == []


def test_a_heldout_function_has_no_mutant_in_training() -> None:
    found = read_tree("shipped:python")
    functions = {
        split: {one.function for one in mutate.plan(found, "python", split, Counter())}
        for split in ("train", "heldout")
    }
    assert functions["train"] and functions["heldout"] and not functions["train"] & functions["heldout"]


@pytest.mark.parametrize(
    ("tests", "told"),
    [
        (None, "no tests? ran|no test was found|fail as it is"),
        ("from m import double\n\n\ndef test_m() -> None:\n    assert double(3) == 7\n", "tests fail as it is"),
        (
            "from m import half\n\n\ndef test_m(tmp_path: object) -> None:\n    assert half(8) == 4\n",
            "no test was found",
        ),
    ],
)
def test_a_tree_whose_tests_are_of_no_use_is_refused(tmp_path: Path, tests: str | None, told: str) -> None:
    need("python")
    repo = tree(tmp_path, m__py=SOURCE, **({} if tests is None else {"test_m__py": tests}))
    with pytest.raises(DataError, match=told):
        list(mutate.tasks(repo, "python"))


def test_a_mutant_that_its_tests_miss_is_counted(tmp_path: Path) -> None:
    need("python")
    only = "from m import double\n\n\ndef test_m() -> None:\n    assert double(0) == 0\n"
    counts: Counter[str] = Counter()
    made = list(mutate.tasks(tree(tmp_path, m__py=SOURCE, test_m__py=only), "python", counts=counts))
    assert {row["reference"]["function"] for row in made} == {"double"}
    assert counts["survives its tests"] == 4, counts  # half: its body, its value, its operator; double: a - a is 0 too


def test_no_folder_and_too_much_text_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_tree(str(tmp_path / "none"))
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.bin").write_bytes(b"\xff\x00")
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    found = read_tree(str(tmp_path))
    assert set(found.files) == {"a.py"} and found.left_out == {"binary files": 1, "links": 1}
    monkeypatch.setattr("posttrain.worlds.code.tree.MOST_BYTES", 3)
    with pytest.raises(DataError, match="6 characters of text, at most 3 are allowed"):
        read_tree(str(tmp_path))


# ---------------------------------------------------------------- playing them


def test_what_the_tools_say(rows: list[dict[str, Any]]) -> None:
    environment = CodeEnvironment(rows[0])
    patch = rows[0]["reference"]["patch"]

    def say(tool: str, **arguments: str) -> str:
        return environment.respond([call(tool, arguments)])[0].content

    assert say("run_tests").startswith("tests failed\n") and say("read_file", path="spans.py").startswith('"""Spans')
    assert say("read_file", path="x.py") == "error: no file x.py; files: spans.py, tests/test_spans.py"
    assert "spans.py:4: def clamp" in say("repo_search", text="def clamp")
    assert say("repo_search", text="nowhere at all") == "nothing found"
    assert say("apply_patch", path="spans.py", old="zzz", new="") == "error: old is 0 times in spans.py, not once"
    told = say("apply_patch", path="tests/test_spans.py", old="import clamp", new="import  clamp")
    assert told.startswith("error: tests/test_spans.py belongs to the tests")
    assert say("run_command", command="echo a; sed -i 's/Spans of/Spans  of/' spans.py; exit 3") == "a\n(exit code 3)"
    assert environment.files["spans.py"].startswith('"""Spans  of')
    assert say("apply_patch", **patch) == "patched spans.py" and say("run_tests").startswith("tests passed\n")
    score = environment.score()
    assert score.value == 1.0 and score.parts["iterations"] == 3 and score.parts["diff_lines"] > 2


def test_a_call_with_bad_json_is_an_observation_and_the_worst_reward(rows: list[dict[str, Any]]) -> None:
    bad = Message(role="assistant", channel="commentary", recipient="functions.read_file", content='{"path": ')
    for made, told in (
        (bad, "error: the arguments are no JSON object"),
        (call("delete_all", {}), "error: no tool delete_all; tools: read_file, apply_patch"),
        (call("read_file", {"file": "spans.py"}), "error: read_file takes path, as text"),
        (call("read_file", {"path": 1}), "error: read_file takes path, as text"),
    ):
        environment = CodeEnvironment(rows[0])
        assert environment.respond([made])[0].content.startswith(told)
        assert environment.score().value == -1.0 and environment.score().parts["format"] == 0.0


def test_a_task_without_tests_is_unscorable_and_teaches_nothing(rows: list[dict[str, Any]]) -> None:
    row = buggy(rows, visible=[], hidden=[])
    environment = CodeEnvironment(row)
    environment.respond([READ])
    assert (environment.score().value, environment.score().reason) == (None, "the task has no tests")
    counts: Counter[str] = Counter()
    assert list(trajectories.conversations([row], 0, counts)) == [] and counts == {"dropped: has no tests": 1}


def test_tests_that_cannot_tell_right_from_wrong_are_named(rows: list[dict[str, Any]]) -> None:
    reference = rows[0]["reference"]
    right = {**reference["tree"], **read_tree("shipped:python").files}
    harmless = {"path": "spans.py", "old": '"""Spans', "new": '"""  Spans'}
    broken = {"path": "spans.py", "old": reference["patch"]["old"], "new": "    raise ValueError\n"}
    cases = {
        "its tests pass on the buggy code": buggy(rows, tree=right, patch=harmless),
        "its tests fail on the fixed code": buggy(rows, patch=broken),
    }
    for told, row in cases.items():
        counts: Counter[str] = Counter()
        assert trajectories.fault_of(row) == told
        assert list(trajectories.pairs([row], 0, counts)) == [] and counts == {f"dropped: {told}": 1}
    assert trajectories.fault_of(rows[0]) is None


def test_a_toolchain_that_hangs(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    chain = TOOLCHAINS["python"]
    slow = (Step(("sleep", "60"), Budget(wall_s=0.5)),)
    changed = type(chain)(**{**vars(chain), "compile": slow, "suite": slow})
    monkeypatch.setitem(code.TOOLCHAINS, "python", changed)
    monkeypatch.setattr(code, "found", lambda language: Found({}, (), (), {}))
    row = buggy(rows, error_message="another task, so that no answer is remembered")
    row["reference"]["tree"] = {**row["reference"]["tree"], "other.py": ""}
    environment = CodeEnvironment(row)
    said = environment.respond([call("run_tests", {})])[0].content
    assert said == "tests failed\nerror: sleep exceeded its wall time of 0.5 s"
    assert environment.score().value is None and "wall time" in str(environment.score().reason)


def test_a_mutant_that_hangs_is_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("python")
    source = "def count(a: int) -> int:\n    found = 0\n    while found < a:\n        found += 1\n    return found\n"
    tests = "from m import count\n\n\ndef test_m() -> None:\n    assert count(3) == 3\n"
    chain = TOOLCHAINS["python"]
    quick = type(chain)(**{**vars(chain), "run": Budget(wall_s=20, cpu_s=1)})
    monkeypatch.setitem(code.TOOLCHAINS, "python", quick)
    counts: Counter[str] = Counter()
    made = list(mutate.tasks(tree(tmp_path, m__py=source, test_m__py=tests), "python", counts=counts))
    assert counts["hangs"] == 1 and len(made) == counts["caught"] == 3, counts  # found -= 1 never ends


# ---------------------------------------------------------------- what they become


def test_the_shapes_have_the_seed_shares() -> None:
    given = Counter(trajectories.shape_of(number) for number in range(200))
    assert given == {"multi-step": 60, "planning": 40, "self-correction": 30, "basic": 70}


def test_a_mistake_is_shown_and_not_learned(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectories, "shape_of", lambda number: "self-correction")
    made = [Conversation.model_validate(row["conversation"]) for row in trajectories.conversations(rows, 0)]
    assert len(made) == len(rows)
    for row, conversation in zip(rows, made, strict=True):
        said = conversation.messages[1:]
        patches = [message for message in said if message.recipient == "functions.apply_patch"]
        assert [message.train for message in patches] == [False, True]
        results = [message.content for message in said if message.role == "tool"]
        assert results[-1].startswith("tests passed\n")
        # Played again, the tools say the same.
        environment = CodeEnvironment(row)
        turns = [message for message in said if message.recipient is not None]
        assert [environment.respond([turn])[0].content for turn in turns] == results


def test_the_better_solution_of_a_pair_passes_and_the_other_does_not(rows: list[dict[str, Any]]) -> None:
    for pair in trajectories.pairs(rows[:1], 0):
        [row] = [one for one in rows if pair["id"].startswith(one["id"])]
        verdicts = []
        for side in ("chosen", "rejected"):
            environment = CodeEnvironment(row)
            environment.respond([Message(**message) for message in pair[side]])
            verdicts.append(environment.score().parts["solved"])
        assert verdicts == [1.0, 0.0]
        assert pair["prompt"]["messages"][-1]["sender"] == "functions.read_file"
        break
    else:
        pytest.fail("no pair was made")


def test_the_commands(tmp_path: Path) -> None:
    need("python")
    repo = tmp_path / "repo"
    repo.mkdir()
    tree(repo, m__py=SOURCE, test_m__py=TESTS)
    tasks, conversations = tmp_path / "tasks.jsonl", tmp_path / "conversations.jsonl"

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["data", *words])
        return done.exit_code, done.output

    wanted = ("mutate", str(repo), "--language", "python", "--limit", "1", "--output", str(tasks))
    status, said = run(*wanted)
    assert status == 0 and "1 tasks written" in said, said
    assert run(*wanted)[0] == 2, "an existing file is not overwritten"
    status, said = run("trajectories", str(tasks), "--output", str(conversations))
    assert status == 0 and "1 conversations written" in said, said
    [row] = map(json.loads, conversations.read_text().splitlines())
    assert row["conversation"]["metadata"]["shape"] == trajectories.shape_of(0)
    assert run("trajectories", str(conversations), "--output", str(tmp_path / "x"))[0] == 2
    assert run("trajectories", str(tasks))[0] == 2
