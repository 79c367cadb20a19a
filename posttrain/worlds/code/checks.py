"""A tree's own tests as expressions whose value a grader can hold.

A test function becomes one expression: its body as it stands, in which every assertion hands over the value that it
looks at, and the list of these values at the end. What the value should be is not read from the test; it is what the
right tree gives. With other numbers and letters in it the expression is a test that nobody was shown.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.scoring import drivers
from posttrain.worlds.code.syntax import SYNTAX, is_rust_test, nodes, parser, text_of

if TYPE_CHECKING:
    from tree_sitter import Node


@dataclass(frozen=True)
class Probe:
    """A test function as an expression; `varied` are the same with other literals."""

    name: str
    expression: str
    varied: tuple[str, ...]


Edit = tuple[int, int, str]
SHIFTS = ((1, False), (2, True))
"""What is added to whole numbers, and whether texts are changed as well."""


def probes(tree: Mapping[str, str], language: str) -> list[Probe]:
    """Those of a tree's test functions whose form can be carried over. ScoringError where its package has no name."""
    found: list[Probe] = []
    for path, text in sorted(tree.items()):
        if re.fullmatch(SYNTAX[language].sources, path):
            found += _probes_of_file(path, text, language, PACKAGES[language](tree))
    return found


def _probes_of_file(path: str, text: str, language: str, package: str) -> list[Probe]:
    root, found = parser(language).parse(text.encode()).root_node, []
    for name, expression in READERS[language](root, path, package):
        varied = (vary(expression, language, shift, texts) for shift, texts in SHIFTS)
        found.append(Probe(name, expression, tuple(one for one in dict.fromkeys(varied) if one != expression)))
    return found


def edited(node: "Node", edits: Sequence[Edit]) -> str:
    """The node's text with parts of it replaced; an edit inside another one is left out."""
    data, at, parts = node.text or b"", node.start_byte, []
    for start, end, new in sorted(edits, key=lambda edit: (edit[0], -edit[1])):
        if start >= at:
            parts += [data[at - node.start_byte : start - node.start_byte], new.encode()]
            at = end
    return b"".join([*parts, data[at - node.start_byte :]]).decode()


# ---------------------------------------------------------------- other literals

INTEGERS = ("integer", "integer_literal", "int_literal", "number")
TEXTS = ("string_content", "interpreted_string_literal_content", "string_fragment")


def vary(expression: str, language: str, shift: int, texts: bool) -> str:
    """Whole numbers moved by `shift`, so that their order stays; digits of texts too, or letters where none are."""
    root = parser(language).parse(expression.encode()).root_node
    edits: list[Edit] = []
    for node in nodes(root):
        if node.type in INTEGERS and re.fullmatch(r"\d+", text_of(node)):
            edits.append((node.start_byte, node.end_byte, str(int(text_of(node)) + shift)))
        elif texts and node.type in TEXTS and not _is_import(node):
            edits.append((node.start_byte, node.end_byte, _other_text(text_of(node), shift)))
    return edited(root, edits)


def _is_import(node: "Node") -> bool:
    at: Node | None = node
    while at is not None and "import" not in at.type:
        at = at.parent
    return at is not None


def _other_text(text: str, shift: int) -> str:
    if re.search(r"\d", text):
        return re.sub(r"\d", lambda digit: str((int(digit[0]) + shift) % 10), text)
    return re.sub(r"(?<!\\)[a-z]", lambda letter: chr((ord(letter[0]) - 97 + shift) % 26 + 97), text)


# ---------------------------------------------------------------- Python

Read = Iterator[tuple[str, str]]
RAISING = """\
class Raising:
    def __enter__(self): return self
    def __exit__(self, kind, *rest):
        seen.append(kind and kind.__name__)
        return True
"""


def _python(root: "Node", path: str, package: str) -> Read:
    before = [
        text_of(node)
        for node in root.named_children
        if not _is_test_of_python(node) and "pytest" not in text_of(node) and node.type != "comment"
    ]
    for function in root.named_children:
        parameters, body = function.child_by_field_name("parameters"), function.child_by_field_name("body")
        if function.type != "function_definition" or not _is_test_of_python(function):
            continue
        if parameters is None or body is None or parameters.named_children:
            continue  # what a fixture gives is not in the test
        edits = [edit for node in nodes(body) for edit in _python_assertion(node)]
        if edits:
            raising = [RAISING] if any("Raising()" in new for _, _, new in edits) else []
            inner = edited(body, edits)
            lines = [*before, "seen = []", *raising, f"def posttrain_check():\n    {inner}\n    return seen"]
            yield _name(function), "\n".join([*lines, "posttrain_check()"])


def _name(node: "Node") -> str:
    name = node.child_by_field_name("name")
    return text_of(name) if name is not None else ""


def _is_test_of_python(node: "Node") -> bool:
    if node.type == "decorated_definition":
        node = node.named_children[-1]
    return node.type in ("function_definition", "class_definition") and _name(node).lower().startswith("test")


def _python_assertion(node: "Node") -> Iterator[Edit]:
    if node.type == "assert_statement":
        yield node.start_byte, node.end_byte, f"seen.append({_looked_at(node.named_children[0])})"
    elif node.type == "with_item" and "pytest.raises" in text_of(node):
        yield node.start_byte, node.end_byte, "Raising()"


def _looked_at(tested: "Node") -> str:
    """The side of a comparison that is no literal, or whether the whole holds."""
    if tested.type == "comparison_operator" and len(tested.named_children) == 2:
        left, right = tested.named_children
        return text_of(left if _calls(left) or not _calls(right) else right)
    return f"bool({text_of(tested)})"


def _calls(node: "Node") -> bool:
    return any(one.type in ("call", "call_expression") for one in nodes(node))


# ---------------------------------------------------------------- Rust


def _rust(root: "Node", path: str, package: str) -> Read:
    """Tests beside the code and in `tests/`."""
    module = "::".join([package, *_rust_module(path)])
    for block in (root, *(node for node in nodes(root) if node.type == "mod_item" and is_rust_test(node))):
        inside = block.child_by_field_name("body") or block
        items = [node for node in inside.named_children if not is_rust_test(node)]
        kinds = ("use_declaration", "const_item", "static_item", "struct_item", "enum_item", "function_item")
        kept = ("use_declaration",) if inside is root and not path.startswith("tests/") else kinds
        before = [re.sub(r"\buse super::", f"use {module}::", text_of(one)) for one in items if one.type in kept]
        for function in inside.named_children:
            if (
                function.type == "function_item"
                and is_rust_test(function)
                and not function.child_by_field_name("return_type")
            ):
                yield from _rust_test(function, before)


def _rust_module(path: str) -> list[str]:
    parts = path.removesuffix(".rs").split("/")[1:]
    return [part for part in parts if part not in ("lib", "main", "mod")]


def _rust_test(function: "Node", before: list[str]) -> Read:
    body = function.child_by_field_name("body")
    attribute = function.prev_named_sibling
    if body is None or (attribute is not None and "should_panic" in text_of(attribute)):
        return
    edits: list[Edit] = []
    for node in nodes(body):
        macro = node.child_by_field_name("macro") if node.type == "macro_invocation" else None
        if macro is not None and text_of(macro) in ("assert", "assert_eq", "assert_ne"):
            tokens = next(one for one in node.children if one.type == "token_tree")
            edits.append((node.start_byte, node.end_byte, f'seen.push(format!("{{:?}}", {_first_argument(tokens)}))'))
    if edits:
        lines = [*before, "let mut seen: Vec<String> = Vec::new();", edited(body, edits), "seen"]
        yield _name(function), "{ " + "\n".join(lines) + " }"


def _first_argument(tokens: "Node") -> str:
    comma = next((one for one in tokens.children if one.type == ","), tokens.children[-1])
    data = tokens.text or b""
    return data[1 : comma.start_byte - tokens.start_byte].decode().strip()


# ---------------------------------------------------------------- Go


def _go(root: "Node", path: str, package: str) -> Read:
    """An `if` that reports is the assertion."""
    imports = [text_of(node) for node in nodes(root) if node.type == "import_spec"]
    kept = [text_of(one) for one in root.named_children if one.type in ("const_declaration", "type_declaration")]
    folder = "/".join(path.split("/")[:-1])
    own = f'import . "{package}{"/" + folder if folder else ""}"'
    for function in root.named_children:
        body = function.child_by_field_name("body")
        if function.type != "function_declaration" or not re.match(r"Test[A-Z_]", _name(function)) or body is None:
            continue
        edits = [edit for node in nodes(body) for edit in _go_edit(node)]
        if any("seen = " in new for _, _, new in edits):
            inner = edited(body, edits)
            used = [f"import {one}" for one in imports if re.search(rf"\b{_go_package(one)}\.", inner)]
            lines = [*kept, "var seen []any", inner, "return seen"]
            yield _name(function), "\n".join([own, *used, "func() any {", *lines, "}()"])


def _go_package(spec: str) -> str:
    name = spec.split(" ")[0] if " " in spec else spec
    return re.escape(name.strip('"').rsplit("/", 1)[-1])


REPORTS = re.compile(r"\bt\.(Error|Errorf|Fatal|Fatalf|Fail|FailNow)\(")


def _go_edit(node: "Node") -> Iterator[Edit]:
    text = text_of(node)
    if node.type == "if_statement" and node.child_by_field_name("alternative") is None:
        consequence = node.child_by_field_name("consequence")
        condition = node.child_by_field_name("condition")
        if consequence is None or condition is None or not _only_reports(consequence):
            return
        start = node.child_by_field_name("initializer")
        opening = text_of(start) + "; " if start is not None else ""
        yield node.start_byte, node.end_byte, "{ " + opening + _go_seen(condition) + " }"
    elif node.type == "expression_statement" and re.match(r"t\.(Helper|Parallel|Log|Logf)\(", text):
        yield node.start_byte, node.end_byte, ""
    elif node.type == "call_expression" and re.match(r"t\.Run\(", text):
        literal = next((one for one in nodes(node) if one.type == "func_literal"), None)
        inner = literal.child_by_field_name("body") if literal is not None else None
        if inner is not None:
            yield node.start_byte, inner.start_byte, "func() "
            yield inner.end_byte, node.end_byte, "()"


def _only_reports(block: "Node") -> bool:
    statements = [one for part in block.named_children for one in part.named_children] or block.named_children
    return bool(statements) and all(
        REPORTS.match(text_of(one)) or one.type in ("return_statement", "continue_statement") for one in statements
    )


def _go_seen(condition: "Node") -> str:
    left, right = condition.child_by_field_name("left"), condition.child_by_field_name("right")
    operator = condition.child_by_field_name("operator")
    if left is not None and right is not None and operator is not None and text_of(operator) in ("!=", "=="):
        return f"seen = append(seen, any({text_of(left)})); _ = any({text_of(right)})"
    return f"seen = append(seen, {text_of(condition)})"


# ---------------------------------------------------------------- TypeScript

CALLED = """(() => { try { (%s)(); return "none"; } catch (error) { return error?.constructor?.name; } })()"""


def _typescript(root: "Node", path: str, package: str) -> Read:
    before = [
        text_of(node) for node in root.named_children if node.type in ("lexical_declaration", "function_declaration")
    ]
    for call in nodes(root):
        function, given = call.child_by_field_name("function"), call.child_by_field_name("arguments")
        if call.type != "call_expression" or function is None or given is None:
            continue
        if text_of(function) not in ("test", "it") or len(given.named_children) != 2:
            continue
        body = given.named_children[1].child_by_field_name("body")
        if body is None or body.type != "statement_block" or text_of(given.named_children[1]).startswith("async"):
            continue
        edits = [edit for node in nodes(body) for edit in _typescript_edit(node)]
        if edits:
            lines = [*before, "const seen = [];", edited(body, edits), "return seen;"]
            yield text_of(given.named_children[0]).strip("\"'`"), "(() => { " + "\n".join(lines) + " })()"


def _typescript_edit(node: "Node") -> Iterator[Edit]:
    if node.type != "call_expression":
        return
    function, given = node.child_by_field_name("function"), node.child_by_field_name("arguments")
    if function is None or given is None:
        return
    name = text_of(function)
    expected = re.match(r"expect\(", name) and re.search(r"\)\.(not\.)?to\w+$", name)
    if expected:
        inner = next(one for one in nodes(function) if one.type == "call_expression")
        given, name = inner.child_by_field_name("arguments") or given, "toThrow" if "toThrow" in name else "expect"
    elif not re.fullmatch(r"assert(\.\w+)?", name):
        return
    if given.named_children:
        value = text_of(given.named_children[0])
        thrown = name in ("assert.throws", "toThrow")
        yield node.start_byte, node.end_byte, f"seen.push({CALLED % value if thrown else value})"


PACKAGES: dict[str, Callable[[Mapping[str, str]], str]] = {
    "python": lambda tree: "",
    "rust": drivers.crate,
    "typescript": lambda tree: "",
    "go": drivers.go_module,
}
"""What the tests call the tree by."""
READERS: dict[str, Callable[["Node", str, str], Read]] = {
    "python": _python,
    "rust": _rust,
    "typescript": _typescript,
    "go": _go,
}
