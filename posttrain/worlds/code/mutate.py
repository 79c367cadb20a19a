"""Repair tasks from a source tree: its mutants that its own tests catch, each with the repair that is known.

Plan, then act: the mutants are listed first; then each is built, asked and tested in the sandbox, a verdict a line, so
that a second call goes on where the first was ended.
"""

import fcntl
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from posttrain.chat.coding_agent import PROMPT
from posttrain.chat.conversation import Conversation, Message
from posttrain.errors import DataError
from posttrain.host.cache import cache_folder
from posttrain.run.folder import digest_file, digest_json, write_json_atomic
from posttrain.run.journal import append_lines, read_lines
from posttrain.sandbox.slots import Pool
from posttrain.scoring import code
from posttrain.scoring.code import Check, Unknown, Values, opened
from posttrain.scoring.toolchains import found
from posttrain.worlds.code.checks import probes
from posttrain.worlds.code.environment import TOOLS, solution
from posttrain.worlds.code.syntax import Mutant, mutants, syntax_of
from posttrain.worlds.code.tree import Tree, patch_between, read_tree, sources
from posttrain.worlds.names import Split

CAUGHT = "caught"
DUPLICATE, NO_BUILD, HANGS, SURVIVES = "duplicates", "does not compile", "hangs", "survives its tests"
UNGRADED = "caught by no test that a grader can hold"
NO_TASK = (DUPLICATE, NO_BUILD, HANGS, SURVIVES, UNGRADED)
"""What becomes of a mutant that becomes no task."""
HELD_OUT = 8
"""One function in so many is held out, at least one where there are two."""
MOST_SHOWN, MOST_HIDDEN = 8, 16
"""Checks of one task; those that catch its mutant come first."""
SHOWN_ERROR = 1500
"""Characters of the failure that stand in the request."""
EXPLANATIONS = {
    "boundary": "The comparison in {function} is at the wrong boundary: {wrong} should be {right}.",
    "negated condition": "A condition in {function} is turned round: {wrong} should be {right}.",
    "removed body": "The body of {function} is missing.",
    "changed return value": "{function} gives back {wrong} where it should give back {right}.",
    "arithmetic": "The arithmetic in {function} is wrong: {wrong} should be {right}.",
    "boolean literal": "{function} says {wrong} where it should say {right}.",
}


@dataclass(frozen=True)
class Standing:
    """What the right tree says: checks from its tests, and the same with other literals, with the values it gives."""

    visible: tuple[Check, ...]
    varied: tuple[Check, ...]
    lint: bool
    tests: int
    """Test functions whose form could be carried over."""

    @property
    def all(self) -> tuple[Check, ...]:
        return (*self.visible, *self.varied)


@dataclass(frozen=True)
class Verdict:
    outcome: str
    error: str
    caught_by: tuple[int, ...]
    """Places in `Standing.all`."""


# ---------------------------------------------------------------- the right tree


def standing(tree: Tree, language: str, pool: Pool) -> Standing:
    """DataError where the tree has no tests, they fail as it is, or none of them has a form a grader can hold."""
    kept = probes(tree.files, language)
    with opened(pool, language, tree.files) as work:
        try:
            passed = work.suite()
        except Unknown as error:
            raise DataError(f"the tree's tests do not end: {error}") from error
        if not passed:
            raise DataError(f"the tree's tests fail as it is, so that they can catch nothing:\n{work.shown()}")
        lint = all([work.step(step) for step in work.chain.lint])
    if not kept:
        raise DataError(
            f"no test was found in {len(tree.files)} files that compares values without fixtures; a repair could not "
            f"be graded"
        )
    visible = _steady_values([probe.expression for probe in kept], tree, language, pool)
    varied = _steady_values([text for probe in kept for text in probe.varied], tree, language, pool)
    if not visible:
        raise DataError(f"none of {len(kept)} tests gives plain values, the same each time; a repair cannot be graded")
    return Standing(visible, varied, lint, len(kept))


def _steady_values(expressions: Sequence[str], tree: Tree, language: str, pool: Pool) -> tuple[Check, ...]:
    """The expressions that give a plain value, in two working folders the same one."""
    once, again = (_values(expressions, tree.files, language, pool) for _ in range(2))
    steady = (one == other and one is not None and "0x" not in one for one, other in zip(once, again, strict=True))
    return tuple(
        Check(expression, str(value)) for expression, value, kept in zip(expressions, once, steady, strict=True) if kept
    )


def _values(expressions: Sequence[str], files: Mapping[str, str], language: str, pool: Pool) -> list[str | None]:
    """Asked together; where one keeps the others from being built or reached, in halves."""
    if not expressions:
        return []
    with opened(pool, language, files) as work:
        try:
            got = work.values(expressions)
        except Unknown:
            got = Values(False, (None,) * len(expressions), None)
    if (got.builds and got.limit is None and not work.exhausted) or len(expressions) == 1:
        return [None if value is None else _unescaped(value) for value in got.found]
    half = len(expressions) // 2
    return _values(expressions[:half], files, language, pool) + _values(expressions[half:], files, language, pool)


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\\\", "\\") if "\\" in text else text


# ---------------------------------------------------------------- mutants of it


def plan(tree: Tree, language: str, split: Split | None, counts: Counter[str]) -> list[Mutant]:
    """Every mutant, the kinds in turn, in an order that depends on the tree alone. No two have one function alike."""
    by_kind: dict[str, list[tuple[str, Mutant]]] = defaultdict(list)
    seen: set[str] = set()
    every = [one for path in sources(tree.files, language) for one in mutants(path, tree.files[path], language)]
    held = _held_out({f"{one.path}:{one.function}" for one in every})
    for one in every:
        if split is not None and (f"{one.path}:{one.function}" in held) != (split == "heldout"):
            counts["of the other split"] += 1
            continue
        key = digest_json(one.function_of(tree.files[one.path]))
        if key in seen:
            counts[DUPLICATE] += 1
            continue
        seen.add(key)
        by_kind[one.kind].append((key, one))
    columns = ([one for _, one in sorted(column, key=lambda pair: pair[0])] for column in by_kind.values())
    return [one for row in zip_longest(*columns) for one in row if one is not None]


def _held_out(functions: set[str]) -> set[str]:
    order = sorted(functions, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return set(order[: max(len(order) // HELD_OUT, int(len(order) > 1))])


def judge(mutant: Mutant, tree: Tree, right: Standing, language: str, pool: Pool) -> Verdict:
    """Build it, ask every check, run the suite, in this order: the cheaper first."""
    files = {**tree.files, mutant.path: mutant.applied(tree.files[mutant.path])}
    with opened(pool, language, files) as work:
        try:
            got = work.values([check.expression for check in right.all])
            if not got.builds:
                return Verdict(NO_BUILD, "", ())
            if got.limit is not None or work.exhausted:
                return Verdict(HANGS, "", ())
            pairs = zip(got.found, right.all, strict=True)
            caught = tuple(i for i, (value, check) in enumerate(pairs) if value != code.escaped(check.expected))
            work.said.clear()
            if work.suite():
                return Verdict(SURVIVES, "", ())
            if work.exhausted:
                return Verdict(HANGS, "", ())
            if not any(place < len(right.visible) for place in caught):
                return Verdict(UNGRADED, "", ())
            return Verdict(CAUGHT, work.shown(), caught)
        except Unknown:
            return Verdict(HANGS, "", ())


def task(mutant: Mutant, verdict: Verdict, tree: Tree, right: Standing, language: str) -> dict[str, Any]:
    """The row: the tree with its fault, what to say about it, and the checks; those that catch it come first."""
    fixed = tree.files[mutant.path]
    buggy = mutant.applied(fixed)
    patch = {"path": mutant.path, **patch_between(buggy, fixed)}
    right_function, wrong_function = mutant.function_of(fixed)
    words = {name: f"`{' '.join(text.split())}`" for name, text in (("right", mutant.right), ("wrong", mutant.wrong))}
    explanation = EXPLANATIONS[mutant.kind].format(function=mutant.function, **words)
    places = sorted(range(len(right.all)), key=lambda place: place not in verdict.caught_by)
    checks = [[check.expression, check.expected] for check in right.all]
    visible = [checks[place] for place in places if place < len(right.visible)][:MOST_SHOWN]
    varied = [checks[place] for place in places if place >= len(right.visible)][:MOST_HIDDEN]
    reference = {
        "language": language,
        "tree": {**tree.files, mutant.path: buggy},
        "visible": visible,
        "hidden": [*visible, *varied],
        "kind": mutant.kind,
        "function": mutant.function,
        "buggy_code": wrong_function,
        "fixed_code": right_function,
        "error_message": verdict.error,
        "explanation": explanation,
        "patch": patch,
    }
    said = verdict.error if len(verdict.error) <= SHOWN_ERROR else f"{verdict.error[:SHOWN_ERROR]}\n…"
    names = ", ".join(islice(sorted(tree.files), 40))
    request = f"The tests of this {language} project fail. Repair its code.\n\nFiles: {names}\n\n{said}"
    prompt = Conversation(messages=(Message(role="user", content=request),), tools=TOOLS, instructions=PROMPT)
    return {
        "id": f"code-{tree.digest[:12]}-{_mutant_id(mutant)}",
        "world": "code",
        "prompt": prompt.model_dump(),
        "reference": reference,
        "solution": [message.model_dump() for message in solution(reference, patch, explanation)],
    }


def _mutant_id(mutant: Mutant) -> str:
    return digest_json([mutant.path, mutant.start, mutant.end, mutant.wrong])[:12]


# ---------------------------------------------------------------- all of it


def tasks(
    repo: str,
    language: str,
    split: Split | None = None,
    limit: int | None = None,
    counts: Counter[str] | None = None,
    advance: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[dict[str, Any]]:
    """Tasks of a tree, at most `limit`; `counts` is told of all that became none. Verdicts are kept in the cache."""
    counts = Counter() if counts is None else counts
    found(language)
    tree = read_tree(repo)
    syntax_of(language)
    counts.update(tree.left_out)
    with _kept(tree, language) as folder:
        right = _standing_kept(folder, tree, language)
        if not right.lint:
            counts["linters are not content with the tree itself"] += 1
        listed = plan(tree, language, split, counts)
        made = 0
        for number, (mutant, verdict) in enumerate(_judged(listed, folder, tree, right, language), 1):
            counts[verdict.outcome] += 1
            advance(number, len(listed))
            if verdict.outcome == CAUGHT:
                made += 1
                yield task(mutant, verdict, tree, right, language)
            if made == limit:
                return


def dropped(counts: Counter[str]) -> int:
    """Mutants, and tasks, that became nothing."""
    return sum(count for reason, count in counts.items() if reason in NO_TASK or reason.startswith("dropped"))


def _judged(
    listed: Sequence[Mutant], folder: Path, tree: Tree, right: Standing, language: str
) -> Iterator[tuple[Mutant, Verdict]]:
    """In the plan's order, two at a time; each verdict is on disk before it is given."""
    verdicts = folder / "verdicts.jsonl"
    known = {
        row["mutant"]: Verdict(row["outcome"], row["error"], tuple(row["caught_by"])) for row in read_lines(verdicts)
    }
    pool, slots = code.shared_pool(), 2
    with ThreadPoolExecutor(slots) as threads:
        for at in range(0, len(listed), slots):
            pair = listed[at : at + slots]
            new = [one for one in pair if _mutant_id(one) not in known]
            for one, verdict in zip(
                new, threads.map(lambda one: judge(one, tree, right, language, pool), new), strict=True
            ):
                known[_mutant_id(one)] = verdict
                append_lines(verdicts, [{"mutant": _mutant_id(one), **verdict.__dict__}], sync=True)
            yield from ((one, known[_mutant_id(one)]) for one in pair)


@contextmanager
def _kept(tree: Tree, language: str) -> Iterator[Path]:
    """The cache's folder for this content and this code; another process that uses it is waited for."""
    folder = cache_folder() / "mutants" / digest_json([tree.digest, language, _code_digest()])
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(lock)


@cache
def _code_digest() -> str:
    rooms = (Path(__file__).parent, Path(code.__file__).parent)
    return digest_json([digest_file(path) for room in rooms for path in sorted(room.glob("*.py"))])


def _standing_kept(folder: Path, tree: Tree, language: str) -> Standing:
    path = folder / "standing.json"
    if path.exists():
        stored = json.loads(path.read_text())
        visible, varied = (tuple(Check(*pair) for pair in stored[part]) for part in ("visible", "varied"))
        return Standing(visible, varied, stored["lint"], stored["tests"])
    right = standing(tree, language, code.shared_pool())
    checks_as_pairs = {
        part: [[check.expression, check.expected] for check in getattr(right, part)] for part in ("visible", "varied")
    }
    write_json_atomic(path, {**checks_as_pairs, "lint": right.lint, "tests": right.tests})
    return right
