"""One row per language: how its syntax tree is had, and which places of it a mutant may change.

The kinds of mutants are the seed's (TUI): boundary, negated condition, removed body, changed return value, arithmetic,
boolean literal.
"""

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from posttrain.errors import InputError, MachineError
from posttrain.recipe.spelling import did_you_mean

if TYPE_CHECKING:
    from tree_sitter import Node, Parser

INSTALL = "pip install 'posttrain[code]'"


@dataclass(frozen=True)
class Mutant:
    """One change of one file. `start` and `end` are bytes of the right text, as are those of the function."""

    path: str
    kind: str
    function: str
    function_start: int
    function_end: int
    start: int
    end: int
    right: str
    wrong: str

    def applied(self, text: str) -> str:
        data = text.encode()
        return (data[: self.start] + self.wrong.encode() + data[self.end :]).decode()

    def function_of(self, text: str) -> tuple[str, str]:
        """The function as it is in the right text, and as the mutant has it."""
        data = text.encode()
        before, after = data[self.function_start : self.start], data[self.end : self.function_end]
        return (before + data[self.start : self.end] + after).decode(), (before + self.wrong.encode() + after).decode()


@dataclass(frozen=True)
class Syntax:
    grammar: tuple[str, str]
    """Module and function that give the tree-sitter language."""
    sources: str
    """Names of files that may be changed; tests are told from them by the toolchain's `protected`."""
    functions: tuple[str, ...]
    """Nodes with a name and a body."""
    operations: tuple[str, ...]
    """Nodes whose operator may be another one."""
    boundary: Mapping[str, str]
    equality: Mapping[str, str]
    arithmetic: Mapping[str, str]
    booleans: Mapping[str, str]
    conditions: tuple[str, ...]
    """Nodes with a field `condition`."""
    negation: str
    empty_body: str
    returns: tuple[str, ...]
    """Nodes whose only child is the value given back."""
    other_value: Callable[[str], str | None]
    """Text of a function's result type → a value of that type."""


BOUNDARY = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
EQUALITY = {"==": "!=", "!=": "==", "===": "!==", "!==": "==="}
ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*", "%": "*", "//": "*"}
ARITHMETIC |= {f"{one}=": f"{other}=" for one, other in ARITHMETIC.items()}
BOOLEANS = {"true": "false", "false": "true", "True": "False", "False": "True"}
SECOND = {"0": "1", '""': '"x"', "false": "true"}
"""Instead of a value that is given back already."""
GO_VALUES = {"string": '""', "bool": "false", "float64": "0", "float32": "0", "byte": "0", "rune": "0"}
TYPESCRIPT_VALUES = {"number": "0", "string": '""', "boolean": "false"}


def _go_value(kind: str) -> str | None:
    if re.fullmatch(r"u?int\d*", kind):
        return "0"
    return GO_VALUES.get(kind, "nil" if re.match(r"\*|\[\]|map\[|error$", kind) else None)


def _typescript_value(kind: str) -> str | None:
    kind = kind.lstrip(": ")
    return "[]" if kind.endswith("[]") else TYPESCRIPT_VALUES.get(kind)


def _rust_value(kind: str) -> str | None:
    if re.fullmatch(r"[iu](\d+|size)", kind):
        return "0"
    return {"bool": "false", "&str": '""', "&'static str": '""', "": None}.get(kind, "Default::default()")


SHARED = {"boundary": BOUNDARY, "equality": EQUALITY, "arithmetic": ARITHMETIC, "booleans": BOOLEANS}
SYNTAX: dict[str, Syntax] = {
    "python": Syntax(
        **SHARED,
        grammar=("tree_sitter_python", "language"),
        sources=r".*\.py",
        functions=("function_definition",),
        operations=("comparison_operator", "binary_operator", "augmented_assignment"),
        conditions=("if_statement", "elif_clause"),
        negation="not ({})",
        empty_body="pass",
        returns=("return_statement",),
        other_value=lambda kind: "None",
    ),
    "rust": Syntax(
        **SHARED,
        grammar=("tree_sitter_rust", "language"),
        sources=r".*\.rs",
        functions=("function_item",),
        operations=("binary_expression", "compound_assignment_expr"),
        conditions=("if_expression",),
        negation="!({})",
        empty_body="{ todo!() }",
        returns=("return_expression",),
        other_value=_rust_value,
    ),
    "typescript": Syntax(
        **SHARED,
        grammar=("tree_sitter_typescript", "language_typescript"),
        sources=r"(?!.*\.d\.ts).*\.ts",
        functions=("function_declaration", "method_definition", "function_expression"),
        operations=("binary_expression", "augmented_assignment_expression"),
        conditions=("if_statement", "ternary_expression"),
        negation="(!{})",
        empty_body='{ throw new Error("not written yet"); }',
        returns=("return_statement",),
        other_value=_typescript_value,
    ),
    "go": Syntax(
        **SHARED,
        grammar=("tree_sitter_go", "language"),
        sources=r".*\.go",
        functions=("function_declaration", "method_declaration"),
        operations=("binary_expression", "assignment_statement"),
        conditions=("if_statement",),
        negation="!({})",
        empty_body='{ panic("not written yet") }',
        returns=("return_statement",),
        other_value=_go_value,
    ),
}


def syntax_of(language: str) -> Syntax:
    if language not in SYNTAX:
        raise InputError(f"no language {language!r}{did_you_mean(language, SYNTAX)}; languages: {', '.join(SYNTAX)}")
    return SYNTAX[language]


@cache
def parser(language: str) -> "Parser":
    """MachineError where the grammar is not installed."""
    module, function = syntax_of(language).grammar
    try:
        from tree_sitter import Language, Parser

        return Parser(Language(getattr(importlib.import_module(module), function)()))
    except ImportError as error:
        raise MachineError(f"the syntax tree of {language} needs {module}: {INSTALL}") from error


def nodes(node: "Node", into: Callable[["Node"], bool] = lambda node: True) -> Iterator["Node"]:
    """The node and what is below it, in the text's order; nothing below a node that `into` refuses."""
    stack = [node]
    while stack:
        found = stack.pop()
        yield found
        if into(found):
            stack += reversed(found.children)


def text_of(node: "Node") -> str:
    return node.text.decode() if node.text is not None else ""


def is_rust_test(node: "Node") -> bool:
    """An item that is there for tests only."""
    before = node.prev_named_sibling
    while before is not None and before.type == "attribute_item":
        if re.match(r"#\[\s*(cfg\(\s*test\s*\)|test\b)", text_of(before)):
            return True
        before = before.prev_named_sibling
    return False


def mutants(path: str, text: str, language: str) -> list[Mutant]:
    """Every mutant of a file, in the text's order; no two of them give the same text."""
    row, data = syntax_of(language), text.encode()
    root = parser(language).parse(data).root_node
    found: list[Mutant] = []
    seen: set[tuple[int, int, str]] = set()
    for node in nodes(root, into=lambda one: not is_rust_test(one)):
        function = _function(node, row)
        if function is None or is_rust_test(node):
            continue
        for kind, operator in OPERATORS.items():
            for start, end, wrong in operator(node, row):
                right = data[start:end].decode()
                if wrong != right and (start, end, wrong) not in seen:
                    seen.add((start, end, wrong))
                    inside = function_name(function), function.start_byte, function.end_byte
                    found.append(Mutant(path, kind, *inside, start, end, right, wrong))
    return found


def _function(node: "Node", row: Syntax) -> "Node | None":
    """The innermost function that the node is, or is in."""
    at: Node | None = node
    while at is not None and at.type not in row.functions:
        at = at.parent
    return at


def function_name(function: "Node") -> str:
    name = function.child_by_field_name("name")
    return text_of(name) if name is not None else "a function"


# ---------------------------------------------------------------- operators: (node, row) → (start, end, new text)

Change = tuple[int, int, str]


def _swapped(node: "Node", row: Syntax, table: Mapping[str, str]) -> Iterator[Change]:
    if node.type in row.operations:
        for child in node.children:
            if not child.is_named and child.type in table:
                yield child.start_byte, child.end_byte, table[child.type]


def _boundary(node: "Node", row: Syntax) -> Iterator[Change]:
    return _swapped(node, row, row.boundary)


def _arithmetic(node: "Node", row: Syntax) -> Iterator[Change]:
    # Go's `+=` is a named node of its own text.
    if node.type in row.operations and (operator := node.child_by_field_name("operator")) is not None:
        if (sign := text_of(operator)) in row.arithmetic:
            yield operator.start_byte, operator.end_byte, row.arithmetic[sign]
        return
    yield from _swapped(node, row, row.arithmetic)


def _negated(node: "Node", row: Syntax) -> Iterator[Change]:
    """A condition, or an equality that is no condition."""
    if node.type in row.conditions and (condition := node.child_by_field_name("condition")) is not None:
        if "let_" not in condition.type:
            yield condition.start_byte, condition.end_byte, row.negation.format(text_of(condition))
        return
    above = node.parent
    if above is not None and above.type == "parenthesized_expression":
        above = above.parent
    if above is None or above.type not in row.conditions:
        yield from _swapped(node, row, row.equality)


def _removed_body(node: "Node", row: Syntax) -> Iterator[Change]:
    body = node.child_by_field_name("body") if node.type in row.functions else None
    if body is None:
        return
    statements = body.named_children
    start, end = body.start_byte, body.end_byte
    if row.empty_body == "pass":  # Python: what the function is for stays above it
        documented = bool(statements) and statements[0].type == "expression_statement"
        documented = documented and statements[0].named_children[0].type == "string"
        statements = statements[1:] if documented else statements
        if not statements:
            return
        start = statements[0].start_byte
    if statements:
        yield start, end, row.empty_body


def _returned(node: "Node", row: Syntax) -> Iterator[Change]:
    value = node.named_children[0] if node.type in row.returns and len(node.named_children) == 1 else None
    if value is None and row is SYNTAX["rust"] and node.parent is not None and node.parent.type == "block":
        # The value of a function's body is its last expression.
        above = node.parent.parent
        last = node.parent.named_children[-1] == node and not node.type.endswith(("_statement", "_item", "declaration"))
        value = node if last and above is not None and above.type == "function_item" else None
    function = _function(node, row)
    if value is None or function is None or (value.type == "expression_list" and len(value.named_children) > 1):
        return
    kind = function.child_by_field_name("result") or function.child_by_field_name("return_type")
    wrong = row.other_value(text_of(kind) if kind is not None else "")
    if wrong is not None:
        wrong = SECOND.get(wrong, wrong) if wrong == text_of(value) else wrong
        if wrong != row.booleans.get(text_of(value)):  # that is a boolean literal's
            yield value.start_byte, value.end_byte, wrong


def _boolean(node: "Node", row: Syntax) -> Iterator[Change]:
    if node.type in ("true", "false", "boolean_literal") and text_of(node) in row.booleans:
        yield node.start_byte, node.end_byte, row.booleans[text_of(node)]


OPERATORS: dict[str, Callable[["Node", Syntax], Iterator[Change]]] = {
    "boundary": _boundary,
    "negated condition": _negated,
    "boolean literal": _boolean,
    "removed body": _removed_body,
    "changed return value": _returned,
    "arithmetic": _arithmetic,
}
