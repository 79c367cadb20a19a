"""Small Python functions with a docstring that says what they do, inputs that probe them, and one-line mutations."""

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from posttrain.worlds.names import Split, name

Arguments = tuple[Any, ...]
Inputs = Callable[[random.Random, dict[str, Any]], list[Arguments]]


@dataclass(frozen=True)
class Family:
    """Templates over the slots {a} {b} (parameters), {t} {x} (locals) and the family's constants."""

    parameters: str
    """Which of a and b the function takes."""
    doc: str
    body: tuple[str, ...]
    slots: Callable[[random.Random], dict[str, Any]]
    inputs: Inputs
    names: tuple[tuple[str, ...], ...]
    """Choices of surface names, each in the order a, b, t, x (as far as used)."""


@dataclass(frozen=True)
class Program:
    head: str
    doc: str
    body: tuple[str, ...]
    """Lines with their indentation inside the function."""
    inputs: tuple[Arguments, ...]
    key: str
    """The program with its names replaced by position: what makes it the same program as another."""

    def code(self, body: tuple[str, ...] | None = None) -> str:
        lines = "".join(f"    {line}\n" for line in (self.body if body is None else body))
        return f'{self.head}\n    """{self.doc}"""\n{lines}'


@dataclass(frozen=True)
class Mutant:
    kind: str
    body: tuple[str, ...]
    wrong: str
    right: str
    """The changed line without its indentation, before and after the repair."""


COMPARE = {"above": ">", "at least": ">=", "below": "<", "at most": "<="}
JOIN = {"plus": "+", "minus": "-", "times": "*"}
NUMBERS = (("a", "b"), ("n", "m"), ("x", "y"), ("p", "q"))
LISTS = (("xs", "", "t", "x"), ("items", "", "s", "i"), ("ns", "", "r", "n"), ("xs", "", "s", "v"))
STRINGS = (("s", "t"), ("w", "s"), ("text", "s"))


def _comparison(rng: random.Random) -> dict[str, Any]:
    word = rng.choice(list(COMPARE))
    return {"cw": word, "c": COMPARE[word], "K": rng.randint(2, 20)}


def _two_comparisons(rng: random.Random) -> dict[str, Any]:
    word = rng.choice(list(COMPARE))
    joint = rng.choice(("and", "or"))
    return {**_comparison(rng), "dw": word, "d": COMPARE[word], "M": rng.randint(2, 20), "j": joint}


def _sum_product(rng: random.Random) -> dict[str, Any]:
    word = rng.choice(("plus", "minus"))
    return {"ow": word, "o": JOIN[word], "K": rng.randint(2, 20), "M": rng.randint(1, 20)}


def _operation(rng: random.Random) -> dict[str, Any]:
    word = rng.choice(list(JOIN))
    return {"ow": word, "o": JOIN[word], "K": rng.randint(2, 20)}


def _compare_operate(rng: random.Random) -> dict[str, Any]:
    return {**_operation(rng), **_comparison(rng)} | {"M": rng.randint(2, 20)}


def _range(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(1, 15)
    return {"K": low, "M": low + rng.randint(3, 15)}


def _extreme(rng: random.Random) -> dict[str, Any]:
    word = rng.choice(("larger", "smaller"))
    return {**_sum_product(rng), "ew": word, "e": {"larger": "max", "smaller": "min"}[word]}


def _flag(rng: random.Random) -> dict[str, Any]:
    some = rng.random() < 0.5
    return {**_comparison(rng), "qw": "some" if some else "no", "y": some, "n": not some}


def _letters(rng: random.Random) -> dict[str, Any]:
    return {"K": rng.randint(1, 4), "M": rng.randint(2, 9)}


def _around(rng: random.Random, slots: dict[str, Any]) -> int:
    """A number at or beside one of the constants, where boundary faults show."""
    constant: int = slots[rng.choice([k for k in ("K", "M") if k in slots])]
    return constant + rng.choice((-2, -1, 0, 0, 0, 1, 2))


def _one(rng: random.Random, slots: dict[str, Any]) -> list[Arguments]:
    return [(_around(rng, slots),) for _ in range(12)] + [(rng.randint(0, 25),) for _ in range(4)]


def _two(rng: random.Random, slots: dict[str, Any]) -> list[Arguments]:
    return [(_around(rng, slots), rng.choice((_around(rng, slots), rng.randint(1, 25)))) for _ in range(18)]


def _list(rng: random.Random, slots: dict[str, Any]) -> list[Arguments]:
    def items() -> list[int]:
        return [rng.choice((_around(rng, slots), rng.randint(0, 25))) for _ in range(rng.randint(2, 3))]

    return [(items(),) for _ in range(16)]


def _word(rng: random.Random, slots: dict[str, Any]) -> list[Arguments]:
    return [(name(rng, slots["split"]),) for _ in range(10)]


FAMILIES: dict[str, Family] = {
    "linear": Family("a", "{a} times {K} {ow} {M}", ("return {a} * {K} {o} {M}",), _sum_product, _one, NUMBERS),
    "pair": Family("ab", "{a} {ow} {b} times {K}", ("return {a} {o} {b} * {K}",), _sum_product, _two, NUMBERS),
    "grouped": Family(
        "ab", "the sum of {a} and {b}, {ow} {K}", ("return ({a} + {b}) {o} {K}",), _operation, _two, NUMBERS
    ),
    "extreme": Family(
        "ab", "the {ew} of {a} and {b}, {ow} {K}", ("return {e}({a}, {b}) {o} {K}",), _extreme, _two, NUMBERS
    ),
    "branch": Family(
        "ab",
        "{b} if {a} is {cw} {K}, else {b} {ow} {M}",
        ("if {a} {c} {K}:", "    return {b}", "return {b} {o} {M}"),
        _compare_operate,
        _two,
        NUMBERS,
    ),
    "both": Family(
        "ab",
        "is {a} {cw} {K} {j} {b} {dw} {M}",
        ("return {a} {c} {K} {j} {b} {d} {M}",),
        _two_comparisons,
        _two,
        NUMBERS,
    ),
    "clamp": Family(
        "a", "{a}, but at least {K} and at most {M}", ("return max({K}, min({a}, {M}))",), _range, _one, NUMBERS
    ),
    "span": Family(
        "ab",
        "{a} times {K} if {b} is {cw} {M}, else {K}",
        ("if {b} {c} {M}:", "    return {a} * {K}", "return {K}"),
        _compare_operate,
        _two,
        NUMBERS,
    ),
    "range": Family(
        "a",
        "the sum from {K} to {a}, {a} included, plus {M}",
        ("return sum(range({K}, {a} + 1)) + {M}",),
        _range,
        lambda rng, slots: [(slots["K"] + rng.randint(1, 9),) for _ in range(16)],
        NUMBERS,
    ),
    "filter": Family(
        "a", "the items of {a} {cw} {K}", ("return [{x} for {x} in {a} if {x} {c} {K}]",), _comparison, _list, LISTS
    ),
    "map": Family("a", "each item of {a} {ow} {K}", ("return [{x} {o} {K} for {x} in {a}]",), _operation, _list, LISTS),
    "mapped": Family(
        "a",
        "each item of {a} times {K} {ow} {M}",
        ("return [{x} * {K} {o} {M} for {x} in {a}]",),
        _sum_product,
        _list,
        LISTS,
    ),
    "total": Family(
        "a",
        "the sum of the items of {a} {cw} {K}, plus {M}",
        ("{t} = {M}", "for {x} in {a}:", "    if {x} {c} {K}:", "        {t} += {x}", "return {t}"),
        _compare_operate,
        _list,
        LISTS,
    ),
    "count": Family(
        "a",
        "{M} plus the count of items of {a} {cw} {K}",
        ("{t} = {M}", "for {x} in {a}:", "    if {x} {c} {K}:", "        {t} += 1", "return {t}"),
        _compare_operate,
        _list,
        LISTS,
    ),
    "first": Family(
        "a",
        "the first item of {a} {cw} {K}, else {M}",
        ("for {x} in {a}:", "    if {x} {c} {K}:", "        return {x}", "return {M}"),
        _compare_operate,
        _list,
        tuple((a, "", x, x) for a, _, _, x in LISTS),
    ),
    "flag": Family(
        "a",
        "is {qw} item of {a} {cw} {K}",
        ("for {x} in {a}:", "    if {x} {c} {K}:", "        return {y}", "return {n}"),
        _flag,
        _list,
        tuple((a, "", x, x) for a, _, _, x in LISTS),
    ),
    "whether": Family(
        "a",
        "is {qw} item of {a} {cw} {K}",
        ("return any({x} {c} {K} for {x} in {a}) is {y}",),
        _flag,
        _list,
        LISTS,
    ),
    "scaled": Family(
        "a", "the sum of {a} times {K} {ow} {M}", ("return sum({a}) * {K} {o} {M}",), _sum_product, _list, LISTS
    ),
    "head": Family(
        "a", "the first {K} letters of {a}, {M} times", ("return {a}[:{K}] * {M}",), _letters, _word, STRINGS
    ),
    "rest": Family(
        "a", "{a} without its first {K} letters, {M} times", ("return {a}[{K}:] * {M}",), _letters, _word, STRINGS
    ),
    "tail": Family(
        "a", "the last {K} letters of {a}, {M} times", ("return {a}[-{K}:] * {M}",), _letters, _word, STRINGS
    ),
}


def split_of(key: str) -> Split:
    """One program in five is held out."""
    return "heldout" if zlib.crc32(b"program:" + key.encode()) % 5 == 0 else "train"


def _fill(family: Family, surface: tuple[str, ...], slots: dict[str, Any]) -> tuple[str, str, tuple[str, ...]]:
    filled = slots | dict(zip("abtx", (*surface, "", "", "")[:4], strict=True))
    head = f"def f({', '.join(filled[p] for p in family.parameters)}):"
    return head, family.doc.format(**filled), tuple(line.format(**filled) for line in family.body)


def draw(rng: random.Random, split: Split) -> Program:
    """A random program of `split`."""
    while True:
        family = FAMILIES[rng.choice(list(FAMILIES))]
        slots = family.slots(rng) | {"split": split}
        head, _, body = _fill(family, ("v0", "v1", "v2", "v3"), slots)
        key = "\n".join((head, *body))
        if split_of(key) != split:
            continue
        head, doc, body = _fill(family, rng.choice(family.names), slots)
        return Program(head, doc, body, tuple(_different(family.inputs(rng, slots))), key)


def _different(inputs: list[Arguments]) -> list[Arguments]:
    return list({repr(arguments): arguments for arguments in inputs}.values())


# ---------------------------------------------------------------- mutations

_NUMBER = re.compile(r"\b\d+\b")
_BOUNDARY = {" > ": " >= ", " >= ": " > ", " < ": " <= ", " <= ": " < "}
_ARITHMETIC = {" + ": " - ", " - ": " + ", " * ": " + ", " += ": " -= "}
_NEGATED = {" > ": " <= ", " >= ": " < ", " < ": " >= ", " <= ": " > "}


def mutants(program: Program, rng: random.Random) -> list[Mutant]:
    """Every one-line change this file knows of, in a fixed order; constants change by a drawn amount."""
    found = []
    for index, line in enumerate(program.body):
        text = line.lstrip()
        changed = [(kind, new) for kind, new in _changes(text, rng) if new != text]
        for kind, new in changed:
            indent = line[: len(line) - len(text)]
            body = (*program.body[:index], indent + new, *program.body[index + 1 :])
            if "\n".join(body).count(new) == 1:
                found.append(Mutant(kind, body, wrong=new, right=text))
    return found


def _changes(text: str, rng: random.Random) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for kind, table in (("boundary", _BOUNDARY), ("negated condition", _NEGATED), ("arithmetic", _ARITHMETIC)):
        for old, new in table.items():
            for at in (m.start() for m in re.finditer(re.escape(old), text)):
                found.append((kind, text[:at] + new + text[at + len(old) :]))
    for match in _NUMBER.finditer(text):
        value = int(match.group())
        other = max(0, value + rng.choice((-3, -2, -1, 1, 2, 3)))
        kind = "boundary" if "range" in text or ":]" in text or "[:" in text else "constant"
        found.append((kind, text[: match.start()] + str(other) + text[match.end() :]))
    for old, new in (("max(", "min("), ("min(", "max("), (" and ", " or "), (" or ", " and ")):
        if text.count(old) == 1 and not ("max(" in text and "min(" in text):
            found.append(("operator", text.replace(old, new)))
    for old, new in (("True", "False"), ("False", "True")):
        if old in text:
            found.append(("boolean", text.replace(old, new)))
    if text.startswith("return ") or " += " in text:
        found.append(("missing body", "pass"))
    return found


# ---------------------------------------------------------------- running trusted programs


def load(code: str) -> Callable[..., Any]:
    """The function of a program made by this file. Code that a model wrote goes through `posttrain.sandbox`."""
    space: dict[str, Any] = {}
    exec(compile(code, "<program>", "exec"), space)
    return space["f"]  # type: ignore[no-any-return]


def outcome(function: Callable[..., Any], arguments: Arguments) -> str:
    """The value's text, or the name of the fault that a mutant runs into."""
    try:
        return repr(function(*arguments))
    except (TypeError, ValueError, NameError) as fault:
        return type(fault).__name__


def shown(arguments: Arguments) -> str:
    return f"f({', '.join(map(repr, arguments))})"
