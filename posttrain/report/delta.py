"""What changed between two evaluations: paired by id, by set, category and difficulty, and case by case."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from posttrain.errors import InputError
from posttrain.report import words
from posttrain.report.baselines import Kept
from posttrain.report.comparison import Evaluations, Example, Examples, MetricRow, between, examples
from posttrain.report.read import Answer, mapping
from posttrain.report.statistics import Comparison, compare, is_binary
from posttrain.report.text import cell, example_lines, table

REGRESSION = 0.05
"""A score that is worse by more than this share of what it was, with an interval that excludes 0, fails the gate."""
SHOWN_CHANGES = 200
SHOWN_EXAMPLES = 5


@dataclass(frozen=True)
class Group:
    dataset: str
    by: str
    value: str
    share: bool
    comparison: Comparison


@dataclass(frozen=True)
class Delta:
    before: Kept
    after: Kept
    tables: dict[str, tuple[MetricRow, ...]]
    """By set; the cells are before and after, compared by `against_base`."""
    groups: tuple[Group, ...]
    changes: dict[str, tuple[Example, ...]]
    """By set: every case whose score changed, in the order it was asked."""
    examples: tuple[Examples, ...]
    notes: tuple[str, ...]

    def scores(self) -> Iterator[tuple[MetricRow, Comparison]]:
        for rows in self.tables.values():
            for row in rows:
                if row.is_score and (found := row.cells[-1].against_base) is not None:
                    yield row, found


def delta(before: Kept, after: Kept) -> Delta:
    """InputError where both have no set in common."""
    sets = [name for name in before.evaluation.answers if name in after.evaluation.answers]
    if not sets:
        raise InputError(
            f"{before.name} and {after.name} have no set in common: the one answers "
            f"{', '.join(before.evaluation.answers)}, the other {', '.join(after.evaluation.answers)}"
        )
    found = between(before.evaluation, after.evaluation)
    return Delta(
        before=before,
        after=after,
        tables={name: found.tables[name] for name in sets},
        groups=tuple(group for name in sets for group in _groups(name, found)),
        changes={name: tuple(_changes(name, found)) for name in sets},
        examples=tuple(examples(found, SHOWN_EXAMPLES)),
        notes=tuple(_notes(before, after, found)),
    )


def _groups(dataset: str, found: Evaluations) -> Iterator[Group]:
    assert found.before is not None and found.after is not None
    before, after = found.before.answers[dataset], found.after.answers[dataset]
    for by in ("category", "difficulty"):
        for value in dict.fromkeys(getattr(answer, by) for answer in before):
            if value is None:
                continue
            sides = [[(a.id, a.score) for a in side if getattr(a, by) == value] for side in (before, after)]
            scores = [score for side in sides for _, score in side if score is not None]
            yield Group(dataset, by, value, is_binary(np.array(scores)), compare(*sides))


def _changes(dataset: str, found: Evaluations) -> Iterator[Example]:
    assert found.before is not None and found.after is not None
    later = {answer.id: answer for answer in found.after.answers[dataset]}
    for answer in {answer.id: answer for answer in found.before.answers[dataset]}.values():
        other = later.get(answer.id)
        if other is not None and None not in (answer.score, other.score) and answer.score != other.score:
            yield Example(answer, other)


def _notes(before: Kept, after: Kept, found: Evaluations) -> Iterator[str]:
    for setting in ("set", "sampling", "vote", "seed", "chat", "precision"):
        first, second = before.record.get(setting), after.record.get(setting)
        if first != second and first is not None and second is not None:
            yield f"The {setting} differs: {_short(first)} before, {_short(second)} after."
    for kept in (before, after):
        if kept.unreadable:
            yield f"{kept.unreadable} lines of {kept.name} could not be read."
    only = {*before.evaluation.answers} ^ {*after.evaluation.answers}
    if only:
        yield f"On one side only, and not compared: {', '.join(sorted(only))}."
    for rows in found.tables.values():
        for row in rows:
            against = row.cells[-1].against_base
            if row.is_score and against is not None:
                for what, count in (
                    ("cases are on one side only", against.before_only + against.after_only),
                    ("cases are unscorable on a side and left out on both", against.unscorable),
                    ("ids come twice; the last one counts", against.repeated),
                ):
                    if count:
                        yield f"{row.dataset}: {count} {what}."


def _short(value: Any) -> str:
    shown = {name: part for name, part in mapping(value).items() if name != "digest"} or value
    text = ", ".join(f"{k} {v}" for k, v in shown.items()) if isinstance(shown, dict) else str(shown)
    digest = mapping(value).get("digest")
    return f"{text} ({words.short(digest)})" if digest else text


# ---------------------------------------------------------------- the gate


def regressions(found: Delta, share: float = REGRESSION) -> list[str]:
    """A sentence for each set whose score fell by more than `share` of what it was, its interval below 0."""
    worse = []
    for row, pairs in found.scores():
        loss = relative_loss(pairs)
        if loss > share and pairs.interval is not None and pairs.interval.below_zero:
            levels = f"{words.amount(pairs.before_mean, row.share)} → {words.amount(pairs.after_mean, row.share)}"
            worse.append(
                f"{row.dataset} {row.part}: {levels}, worse by {100 * loss:.1f} % of what it was (95 % interval of the "
                f"difference {words.span(pairs.interval, row.share)})"
            )
    return worse


def relative_loss(pairs: Comparison) -> float:
    if not pairs.pairs or pairs.difference >= 0:
        return 0.0
    return -pairs.difference / abs(pairs.before_mean) if pairs.before_mean else math.inf


# ---------------------------------------------------------------- what is shown


def markdown(found: Delta) -> str:
    return "\n".join(_lines(found)).rstrip() + "\n"


def _lines(found: Delta) -> Iterator[str]:
    yield from (f"# {cell(found.before.name)} → {cell(found.after.name)}", "")
    for row, pairs in found.scores():
        levels = f"{words.amount(pairs.before_mean, row.share)} → {words.amount(pairs.after_mean, row.share)}"
        yield f"- **{cell(row.dataset)} {cell(row.part)}**: {levels}. {cell(words.sentence(pairs, row.share))}"
    yield ""
    for note in found.notes:
        yield f"- {cell(note)}"
    yield from (("",) if found.notes else ())
    yield from ("## Metrics", "")
    yield from table(
        ("Set", "Metric", "Before", "After", "Difference", "95 % interval", "Cases", "Better / worse", "McNemar"),
        (
            (row.dataset, row.part + _score(row), *_comparison(row.share, against))
            for rows in found.tables.values()
            for row in rows
            if (against := row.cells[-1].against_base) is not None
        ),
    )
    if found.groups:
        yield from ("## By category and difficulty", "")
        yield from table(
            ("Set", "By", "", "Before", "After", "Difference", "95 % interval", "Cases", "Better / worse", "McNemar"),
            (
                (group.dataset, group.by, group.value, *_comparison(group.share, group.comparison))
                for group in found.groups
            ),
        )
    yield from _changed(found)
    yield "Differences of shares are in points. Intervals: BCa bootstrap of the mean paired difference, seeded."


def _score(row: MetricRow) -> str:
    return " (the score)" if row.is_score and row.part != "score" else ""


def _comparison(share: bool, pairs: Comparison) -> tuple[object, ...]:
    if pairs.pairs == 0:
        return (words.NOTHING, words.NOTHING, "no shared case", words.NOTHING, 0, words.NOTHING, words.NOTHING)
    return (
        words.amount(pairs.before_mean, share),
        words.amount(pairs.after_mean, share),
        "unchanged" if pairs.unchanged else words.gain(pairs.difference, share),
        words.NOTHING if pairs.unchanged else words.span(pairs.interval, share),
        pairs.pairs,
        f"{pairs.improved} / {pairs.worsened}",
        words.NOTHING if pairs.mcnemar_p is None else words.probability(pairs.mcnemar_p),
    )


def _changed(found: Delta) -> Iterator[str]:
    yield from ("## Cases that changed", "")
    for dataset, changes in found.changes.items():
        if not changes:
            yield from (f"{cell(dataset)}: no case has another score than before.", "")
            continue
        yield from table(
            ("Set", "Case", "Category", "Difficulty", "Before", "After"),
            (
                (dataset, c.before.id, c.before.category, c.before.difficulty, *map(_points, (c.before, c.after)))
                for c in changes[:SHOWN_CHANGES]
            ),
        )
        if len(changes) > SHOWN_CHANGES:
            yield from (f"{len(changes) - SHOWN_CHANGES} more are in the JSON output.", "")
    for group in found.examples:
        for title, cases in (("Improved", group.improved), ("Worsened", group.worsened)):
            for case in cases:
                yield from example_lines(f"{title}: {group.dataset}", case)


def _points(answer: Answer) -> str:
    return words.plain(answer.score)


def as_json(found: Delta, worse: Iterable[str]) -> dict[str, Any]:
    """The same content, with every change; numbers that are not finite are null."""

    def plain(pairs: Comparison) -> dict[str, Any]:
        told = {**asdict(pairs), "verdict": words.verdict(pairs)}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in told.items()}

    return {
        "before": {"name": found.before.name, **found.before.record},
        "after": {"name": found.after.name, **found.after.record},
        "metrics": [
            {"set": row.dataset, "metric": row.part, "is_score": row.is_score, **plain(pairs)}
            for rows in found.tables.values()
            for row in rows
            if (pairs := row.cells[-1].against_base) is not None
        ],
        "groups": [
            {"set": group.dataset, "by": group.by, "value": group.value, **plain(group.comparison)}
            for group in found.groups
        ],
        "changes": [
            {"set": dataset, "id": case.before.id, "before": case.before.score, "after": case.after.score}
            for dataset, cases in found.changes.items()
            for case in cases
        ],
        "notes": list(found.notes),
        "regressions": list(worse),
    }
