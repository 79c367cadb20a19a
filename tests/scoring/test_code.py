"""Scores of source trees: honest ones in four languages, hacks that earn nothing, parts, and what is refused."""

from collections.abc import Iterator

import pytest

from posttrain.errors import MachineError, ScoringError
from posttrain.sandbox.confine import LADDER
from posttrain.sandbox.slots import Budget, Pool
from posttrain.scoring import code, toolchains
from posttrain.scoring.code import Check, Evaluation, checks_from_asserts, evaluate, hack_rate, merged, run_suite, score
from posttrain.scoring.toolchains import TOOLCHAINS, Found, Step
from tests.sandbox.abuse import TREE_HACKS
from tests.sandbox.levels import need

PYTHON = {
    "m.py": "def add(a: int, b: int) -> int:\n    return a - b\n",
    "tests/test_m.py": "from m import add\n\n\ndef test_a() -> None:\n    assert add(1, 2) == 3\n",
}
VISIBLE, HIDDEN = (Check("add(1, 2)", "3"),), (Check("add(3, 4)", "7"), Check("add(5, 6)", "11"))
FIX = {"m.py": "def add(a: int, b: int) -> int:\n    return a + b\n"}
TREES = {
    "python": (PYTHON, FIX, "m.py"),
    "rust": (
        {
            "Cargo.toml": '[package]\nname = "small-one"\nversion = "0.1.0"\nedition = "2021"\n',
            "src/lib.rs": "pub fn add(a: i64, b: i64) -> i64 {\n    a - b\n}\n",
            "tests/adds.rs": "#[test]\nfn adds() {\n    assert_eq!(small_one::add(1, 2), 3);\n}\n",
        },
        {"src/lib.rs": "pub fn add(a: i64, b: i64) -> i64 {\n    a + b\n}\n"},
        "src/lib.rs",
    ),
    "typescript": (
        {
            "m.ts": "export function add(a: number, b: number): number {\n  return a - b;\n}\n",
            ".built/m.test.js": "import test from 'node:test';\nimport assert from 'node:assert';\n"
            "import { add } from './m.js';\ntest('adds', () => assert.equal(add(1, 2), 3));\n",
        },
        {"m.ts": "export function add(a: number, b: number): number {\n  return a + b;\n}\n"},
        "m.ts",
    ),
    "go": (
        {
            "go.mod": "module example.com/small\n\ngo 1.19\n",
            "m.go": "package small\n\n// Add adds.\nfunc Add(a, b int) int {\n\treturn a - b\n}\n",
            "m_test.go": 'package small\n\nimport "testing"\n\nfunc TestAdd(t *testing.T) {\n\tif Add(1, 2) != 3 {\n'
            '\t\tt.Fatal("wrong")\n\t}\n}\n',
        },
        {"m.go": "package small\n\n// Add adds.\nfunc Add(a, b int) int {\n\treturn a + b\n}\n"},
        "m.go",
    ),
}


@pytest.fixture(scope="module", params=LADDER)
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with Pool(need(request.param), 1) as made:
        yield made


@pytest.mark.parametrize("language", TOOLCHAINS)
def test_a_tree_in_each_language(pool: Pool, language: str) -> None:
    if lacks := toolchains.missing(language):
        pytest.skip(lacks)
    tree, fix, source = TREES[language]
    visible, hidden = VISIBLE, HIDDEN
    if language == "go":
        visible, hidden = (tuple(Check(c.expression.title(), c.expected) for c in s) for s in (visible, hidden))
    wrong = evaluate(pool, language, tree, {}, visible, hidden)
    assert (wrong.compiles, wrong.visible, wrong.hidden, wrong.unknown) == (True, (False,), (False, False), None)
    right = evaluate(pool, language, tree, fix, visible, hidden)
    assert (right.compiles, right.visible, right.hidden, right.lint) == (True, (True,), (True, True), True), right.said
    assert score(right, True).value == 1.0 and score(wrong, True).value == 0.1
    broken = evaluate(pool, language, tree, {source: "def func fn ((("}, visible, hidden)
    assert (broken.compiles, broken.unknown) == (False, None) and score(broken, True).value == -0.3
    assert not run_suite(pool, language, tree)[0] and run_suite(pool, language, {**tree, **fix})[0]


@pytest.mark.parametrize("name", sorted(TREE_HACKS))
def test_a_hack_of_a_tree_earns_nothing(pool: Pool, name: str) -> None:
    if lacks := toolchains.missing("python"):
        pytest.skip(lacks)
    found = evaluate(pool, "python", PYTHON, TREE_HACKS[name], VISIBLE, HIDDEN)
    made = score(found, True)
    assert not any(found.hidden) and made.parts["tests"] == 0.0 and (made.value or 0.0) <= 0.1, found
    hacked = name == "hard-coded visible cases"
    assert found.visible == ((True,) if hacked else (False,)) and made.parts["hack"] == float(hacked)


def test_edits_of_tests_and_settings_are_refused_and_named() -> None:
    edits = {
        "python": (
            "tests/test_m.py",
            "a/test_x.py",
            "conftest.py",
            "a/conftest.py",
            "pyproject.toml",
            "/x",
            "../x",
            "a//b",
        ),
        "rust": ("Cargo.toml", "build.rs", ".cargo/config.toml", "tests/adds.rs"),
        "go": ("go.mod", "m_test.go", "a/b_test.go", "vendor/x.go"),
        "typescript": ("package.json", "tsconfig.json", "a.test.ts", "eslint.config.mjs", "node_modules/x/index.js"),
    }
    for language, names in edits.items():
        files, refused = merged(TOOLCHAINS[language], {}, {name: "" for name in (*names, "src/fine.txt")})
        assert sorted(refused) == sorted(names) and list(files) == ["src/fine.txt"]


def made(**changed: object) -> Evaluation:
    fields: dict[str, object] = {"compiles": True, "visible": (True,), "hidden": (True, True), "lint": True}
    return Evaluation(**{**fields, "refused": (), "said": "", **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("evaluation", "well_formed", "value", "tests"),
    [
        (made(), True, 1.0, 1.0),
        (made(lint=False), True, 0.7, 1.0),
        (made(hidden=(True, False)), True, 0.1, 0.5),
        (made(visible=(False,), hidden=()), True, 0.1, 0.0),
        (made(compiles=False, visible=(), hidden=(), lint=False), True, -0.3, 0.0),
        (made(), False, -1.0, 1.0),
    ],
)
def test_the_seed_scale(evaluation: Evaluation, well_formed: bool, value: float, tests: float) -> None:
    found = score(evaluation, well_formed)
    assert found.value == value and found.parts["tests"] == tests


def test_no_tests_and_no_verdict_are_unscorable() -> None:
    assert score(made(visible=(), hidden=()), True).value is None
    hung = score(made(unknown="cargo exceeded its wall time of 60 s"), True)
    assert hung.value is None and hung.reason == "cargo exceeded its wall time of 60 s"


def test_hack_rate_is_over_what_was_scored() -> None:
    scores = [score(one, True) for one in (made(), made(hidden=(False,)), made(visible=(False,), hidden=(False,)))]
    assert hack_rate([*scores, score(made(unknown="?"), True)]) == pytest.approx(1 / 3)
    assert hack_rate([]) is None


def test_asserts_become_checks_and_others_are_named() -> None:
    found = checks_from_asserts("assert f([1]) == {'a': 1}\nassert g()\nassert not g(2)\nassert f(1) is None")
    assert found == (
        Check("f([1])", "{'a': 1}"),
        Check("bool(g())", "True"),
        Check("bool(g(2))", "False"),
        Check("f(1)", "None"),
    )
    for tests, told in (("assert f() == g()", "line 1"), ("x = 1", "line 1"), ("assert (", "no Python")):
        with pytest.raises(ScoringError, match=told):
            checks_from_asserts(tests)


def test_a_missing_toolchain_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    toolchains._search.cache_clear()
    try:
        with pytest.raises(MachineError, match="go needs go: apt-get install golang-go"):
            toolchains.found("go")
        with pytest.raises(MachineError, match="rust needs cargo: apt-get install cargo"):
            toolchains.found("rust")
    finally:
        toolchains._search.cache_clear()


def test_a_toolchain_that_hangs_is_unknown(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    row = TOOLCHAINS["python"]
    slow = Step(("sleep", "60"), Budget(wall_s=0.5))
    monkeypatch.setitem(code.TOOLCHAINS, "python", type(row)(**{**vars(row), "compile": (slow,)}))
    monkeypatch.setattr(code, "found", lambda language: Found({}, (), (), {}))
    found = evaluate(pool, "python", PYTHON, FIX, VISIBLE, HIDDEN)
    assert found.unknown == "sleep exceeded its wall time of 0.5 s" and score(found, True).value is None
