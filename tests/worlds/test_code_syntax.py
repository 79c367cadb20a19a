"""Mutants and probes of small texts in four languages, told from the texts by hand."""

import pytest

from posttrain.errors import InputError
from posttrain.worlds.code.checks import probes, vary
from posttrain.worlds.code.syntax import SYNTAX, mutants
from posttrain.worlds.code.tree import patch_between

TEXTS = {
    "python": 'def f(a, b):\n    """Doc."""\n    if a < b:\n        return True\n    a += 1\n    return a == b\n',
    "rust": "fn f(a: i64, b: i64) -> bool {\n    if a < b {\n        return true;\n    }\n    c += 1;\n    a == b\n}\n",
    "typescript": "function f(a: number): boolean {\n  if (a < b) {\n    return true;\n  }\n  a += 1;\n"
    "  return a === b;\n}\n",
    "go": "package m\n\nfunc F(a, b int) bool {\n\tif a < b {\n\t\treturn true\n\t}\n\ta += 1\n\treturn a == b\n}\n",
}
BODIES = {
    "python": "pass",
    "rust": "{ todo!() }",
    "typescript": '{ throw new Error("not written yet"); }',
    "go": '{ panic("not written yet") }',
}
TRUTHS = {
    "python": ("True", "False"),
    "rust": ("true", "false"),
    "typescript": ("true", "false"),
    "go": ("true", "false"),
}
NEGATED = {"python": "not (a < b)", "rust": "!(a < b)", "typescript": "(!(a < b))", "go": "!(a < b)"}
EQUAL = {"typescript": ("===", "!==")}


@pytest.mark.parametrize("language", SYNTAX)
def test_every_operator_of_a_language(language: str) -> None:
    text = TEXTS[language]
    found = mutants("m", text, language)
    kinds = {(one.kind, one.right if one.kind != "removed body" else "", one.wrong) for one in found}
    true, false = TRUTHS.get(language, ("true", "false"))
    condition = "(a < b)" if language == "typescript" else "a < b"
    equal, unequal = EQUAL.get(language, ("==", "!="))
    returned = "None" if language == "python" else false
    assert kinds >= {
        ("boundary", "<", "<="),
        ("negated condition", condition, NEGATED[language]),
        ("negated condition", equal, unequal),
        ("arithmetic", "+=", "-="),
        ("boolean literal", true, false),
        ("changed return value", f"a {equal} b", returned),
        ("removed body", "", BODIES[language]),
    }
    assert len({one.applied(text) for one in found}) == len(found) and text not in {one.applied(text) for one in found}
    assert {one.function.lower() for one in found} == {"f"}


def test_tests_beside_the_code_are_not_changed() -> None:
    tests = "#[cfg(test)]\nmod tests {\n    #[test]\n    fn t() {\n        assert!(1 < 2);\n    }\n}\n"
    text = f"fn f() -> bool {{\n    true\n}}\n\n{tests}"
    assert {one.function for one in mutants("src/lib.rs", text, "rust")} == {"f"}


def test_a_language_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"no language 'pyton'.*python"):
        mutants("m", "", "pyton")


def test_a_test_becomes_the_list_of_what_it_looks_at() -> None:
    tree = {
        "tests/test_m.py": "import pytest\nfrom m import f\nLIMIT = 3\n\n\ndef test_f():\n    for a in (1, 2):\n"
        "        assert f(a) == a + LIMIT\n    with pytest.raises(ValueError):\n        f(-1)\n    assert not f(0)\n\n"
        "def test_with_fixture(tmp_path):\n    assert f(tmp_path)\n"
    }
    [probe] = probes(tree, "python")
    space = {"f": lambda a: a + 3 if a > 0 else int("x") if a < 0 else 0}
    lines = probe.expression.replace("from m import f\n", "").rsplit("\n", 1)
    exec(lines[0], space)
    assert eval(lines[1], space) == [4, 5, "ValueError", True]


def test_a_table_of_go_keeps_its_loop_and_loses_its_reports() -> None:
    body = (
        "func TestF(t *testing.T) {\n\tfor _, c := range cases() {\n\t\tt.Run(c.name, func(t *testing.T) {\n"
        '\t\t\tif got := F(c.in); got != c.want {\n\t\t\t\tt.Errorf("no")\n\t\t\t}\n\t\t})\n\t}\n}\n'
    )
    tree = {"go.mod": "module example.com/m\n", "sub/m_test.go": f'package m\n\nimport "testing"\n\n{body}'}
    [probe] = probes(tree, "go")
    assert (
        probe.expression.startswith('import . "example.com/m/sub"\nfunc() any {') and "testing" not in probe.expression
    )
    assert "{ got := F(c.in); seen = append(seen, any(got)); _ = any(c.want) }" in probe.expression
    assert "t.Run" not in probe.expression and "t.Errorf" not in probe.expression


def test_other_literals_keep_the_order_of_numbers() -> None:
    assert vary('f(1, 10, "az 9", "ab")', "python", 2, texts=True) == 'f(3, 12, "az 1", "cd")'
    assert vary('f(1, "ab")', "python", 1, texts=False) == 'f(2, "ab")'


def test_a_patch_is_whole_lines_that_are_there_once() -> None:
    before, after = "a\nx\nb\nx\nc\n", "a\nx\nb\ny\nc\n"
    patch = patch_between(before, after)
    assert before.count(patch["old"]) == 1 and before.replace(patch["old"], patch["new"]) == after
    removed = patch_between("def f():\n    pass\n", "def f():\n    a = 1\n    return a\n")
    assert removed == {"old": "    pass\n", "new": "    a = 1\n    return a\n"}
