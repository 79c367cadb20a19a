"""Which evaluations there are, how each state scores, and what changed between two of them, case by case."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from posttrain.report.read import Answer, PhaseRecord, RunRecord, listing, mapping
from posttrain.report.statistics import (
    Comparison,
    Interval,
    compare,
    is_binary,
    t_interval,
    wilson_interval,
)


@dataclass(frozen=True)
class Evaluation:
    phase: str
    model: str
    shots: int
    answers: dict[str, tuple[Answer, ...]]
    """By dataset, in the order they were asked."""

    @property
    def label(self) -> str:
        return self.model if self.shots == 0 else f"{self.model}, {self.shots} shots"


@dataclass(frozen=True)
class Cell:
    """One metric of one evaluated state."""

    evaluation: Evaluation
    mean: float | None
    scored: int
    unscorable: int
    interval: Interval | None
    """95 % interval of the level itself: Wilson for shares, Student's t otherwise."""
    against_base: Comparison | None
    against_previous: Comparison | None
    """The gain of what was done between the evaluation before it and this one."""


@dataclass(frozen=True)
class MetricRow:
    dataset: str
    part: str
    is_score: bool
    """The part's values are the dataset's score."""
    share: bool
    """Every value is 0 or 1."""
    cells: tuple[Cell, ...]

    @property
    def names(self) -> set[str]:
        return {self.part, "score"} if self.is_score else {self.part}


@dataclass(frozen=True)
class Chosen:
    """The state that an export took."""

    export: str
    model: str
    evaluation: str | None


@dataclass(frozen=True)
class Evaluations:
    zero_shot: tuple[Evaluation, ...]
    few_shot: tuple[Evaluation, ...]
    before: Evaluation | None
    after: Evaluation | None
    chosen: Chosen | None
    tables: dict[str, tuple[MetricRow, ...]]
    """By dataset: the metrics, each over the zero-shot evaluations in recipe order."""
    few_shot_tables: dict[str, tuple[MetricRow, ...]]
    headline: tuple[MetricRow, ...]
    """The metrics the export chose by, or each dataset's score; cells are before and after."""


@dataclass(frozen=True)
class Example:
    before: Answer
    after: Answer

    @property
    def difference(self) -> float:
        return (self.after.score or 0.0) - (self.before.score or 0.0)


@dataclass(frozen=True)
class Examples:
    dataset: str
    improved: tuple[Example, ...]
    worsened: tuple[Example, ...]
    num_improved: int
    num_worsened: int
    num_same: int
    num_reworded: int
    """Cases among the same-scored ones whose completion is another text."""


def evaluations(run: RunRecord) -> Evaluations:
    """Complete evaluations only: answers of an unfinished one are in no table."""
    found = [_evaluation(phase) for phase in run.phases if phase.kind == "evaluate" and phase.complete]
    zero_shot = tuple(entry for entry in found if entry.shots == 0)
    few_shot = tuple(entry for entry in found if entry.shots > 0)
    chosen = _chosen(run)
    before = next((entry for entry in zero_shot if entry.model == "base"), None)
    after = _after(zero_shot, before, chosen)
    wanted = _export_metrics(run)
    ends = tuple(entry for entry in (before, after) if entry is not None)
    return Evaluations(
        zero_shot=zero_shot,
        few_shot=few_shot,
        before=before,
        after=after,
        chosen=chosen,
        tables=_tables(zero_shot, before, wanted),
        few_shot_tables=_tables(few_shot, None, wanted),
        headline=_headline(_tables(ends, before, wanted), wanted),
    )


def between(before: Evaluation, after: Evaluation) -> Evaluations:
    """Two evaluations alone, each set compared with itself."""
    return Evaluations(
        zero_shot=(before, after),
        few_shot=(),
        before=before,
        after=after,
        chosen=None,
        tables=_tables((before, after), before, set()),
        few_shot_tables={},
        headline=(),
    )


def _evaluation(phase: PhaseRecord) -> Evaluation:
    answers: dict[str, list[Answer]] = {}
    for answer in phase.answers:
        answers.setdefault(answer.dataset, []).append(answer)
    return Evaluation(
        phase=phase.name,
        model=str(phase.spec.get("model")),
        shots=int(phase.spec.get("shots") or 0),
        answers={dataset: tuple(rows) for dataset, rows in answers.items()},
    )


def _chosen(run: RunRecord) -> Chosen | None:
    """What the last complete export says it took; the evaluation is named by its candidates."""
    for phase in reversed(run.phases):
        if phase.kind != "export" or not phase.complete:
            continue
        told = phase.details.get("chosen")
        model = str(mapping(told).get("model") or told or phase.state.get("phase") or "")
        if not model:
            continue
        spoken = mapping(told).get("evaluation")
        for candidate in listing(phase.spec.get("candidates")):
            if not spoken and mapping(candidate).get("model") == model:
                spoken = mapping(candidate).get("evaluation")
        return Chosen(phase.name, model, str(spoken) if spoken else None)
    return None


def _after(zero_shot: tuple[Evaluation, ...], before: Evaluation | None, chosen: Chosen | None) -> Evaluation | None:
    if chosen is not None:
        for entry in zero_shot:
            if entry.phase == chosen.evaluation and entry is not before:
                return entry
    return next((entry for entry in reversed(zero_shot) if entry is not before), None)


def _tables(
    entries: tuple[Evaluation, ...], base: Evaluation | None, wanted: set[str]
) -> dict[str, tuple[MetricRow, ...]]:
    datasets = list(dict.fromkeys(dataset for entry in entries for dataset in entry.answers))
    return {
        dataset: tuple(
            _metric_row(dataset, part, is_score, entries, base) for part, is_score in _parts(dataset, entries, wanted)
        )
        for dataset in datasets
    }


def _export_metrics(run: RunRecord) -> set[str]:
    """The metrics by which the recipe chooses what to export, as `dataset.part`."""
    exports = [phase for phase in run.phases if phase.kind == "export"]
    return {str(name) for phase in exports for name in listing(phase.spec.get("metrics"))}


def _parts(dataset: str, entries: Iterable[Evaluation], wanted: set[str]) -> list[tuple[str, bool]]:
    """Score first; a part that has the score's values in every answer stands for it, if it is the only one that has
    them or the one the export chooses by."""
    answers = [answer for entry in entries for answer in entry.answers.get(dataset, ())]
    parts = list(dict.fromkeys(part for answer in answers for part in answer.parts))
    scored = [answer for answer in answers if answer.score is not None]
    twins = [part for part in parts if scored and all(answer.parts.get(part) == answer.score for answer in scored)]
    twins = [part for part in twins if len(twins) == 1 or f"{dataset}.{part}" in wanted]
    if not twins:
        return [("score", True), *((part, False) for part in parts)]
    return [(twins[0], True), *((part, False) for part in parts if part != twins[0])]


def _metric_row(
    dataset: str, part: str, is_score: bool, entries: tuple[Evaluation, ...], base: Evaluation | None
) -> MetricRow:
    asked = [entry for entry in entries if dataset in entry.answers]
    columns = {entry.phase: [(a.id, a.value(part)) for a in entry.answers[dataset]] for entry in asked}
    values = {phase: np.array([value for _, value in column if value is not None]) for phase, column in columns.items()}
    share = all(is_binary(column) for column in values.values())
    cells = []
    for place, entry in enumerate(asked):
        column, scored = columns[entry.phase], values[entry.phase]
        previous = asked[place - 1] if place else None
        compared_to_base = base is not None and entry is not base and base.phase in columns
        cells.append(
            Cell(
                evaluation=entry,
                mean=float(scored.mean()) if len(scored) else None,
                scored=len(scored),
                unscorable=len(column) - len(scored),
                interval=wilson_interval(float(scored.sum()), len(scored)) if share else t_interval(scored),
                against_base=compare(columns[base.phase], column) if compared_to_base and base else None,
                against_previous=compare(columns[previous.phase], column) if previous else None,
            )
        )
    return MetricRow(dataset, part, is_score, share, tuple(cells))


def _headline(tables: dict[str, tuple[MetricRow, ...]], wanted: set[str]) -> tuple[MetricRow, ...]:
    """The metrics the export chooses by; for datasets without one, the score."""
    rows = [row for table in tables.values() for row in table]
    named = [
        row
        for row in rows
        if f"{row.dataset}.{row.part}" in wanted or (row.is_score and f"{row.dataset}.score" in wanted)
    ]
    covered = {row.dataset for row in named}
    return tuple(named + [row for row in rows if row.is_score and row.dataset not in covered])


def examples(found: Evaluations, most: int = 5) -> tuple[Examples, ...]:
    """The cases whose score moved most, per dataset; among equals, those with the smallest digest of their id."""
    if found.before is None or found.after is None:
        return ()
    picked = []
    for dataset, answers in found.before.answers.items():
        later = {answer.id: answer for answer in found.after.answers.get(dataset, ())}
        cases = [
            Example(answer, later[answer.id])
            for answer in {answer.id: answer for answer in answers}.values()
            if answer.id in later and answer.score is not None and later[answer.id].score is not None
        ]
        if not cases:
            continue
        cases.sort(key=lambda case: hashlib.sha256(case.before.id.encode()).digest())
        improved = sorted((case for case in cases if case.difference > 0), key=lambda case: -case.difference)
        worsened = sorted((case for case in cases if case.difference < 0), key=lambda case: case.difference)
        same = [case for case in cases if case.difference == 0]
        picked.append(
            Examples(
                dataset=dataset,
                improved=tuple(improved[:most]),
                worsened=tuple(worsened[:most]),
                num_improved=len(improved),
                num_worsened=len(worsened),
                num_same=len(same),
                num_reworded=sum(case.before.completion != case.after.completion for case in same),
            )
        )
    return tuple(picked)
