"""The report as Markdown: the same content as the page, with whole digests and without figures."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from posttrain.report import words
from posttrain.report.comparison import Example, MetricRow
from posttrain.report.document import Document, LineageNode, said
from posttrain.report.read import Answer, PhaseRecord, listing, mapping, number
from posttrain.report.statistics import RESAMPLES, Comparison
from posttrain.report.training import cost


def markdown(content: Document) -> str:
    sections = (
        _headline, _phases, _gates, _levels, _training, _examples, _exports, _counts, _data, _lineage, _again,
    )  # fmt: skip
    return "\n".join(line for section in sections for line in section(content)).rstrip() + "\n"


def cell(text: object) -> str:
    """Text inside a table or a sentence: nothing in it is markup."""
    plain = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", plain).replace("\r", " ").replace("\n", " ")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield "| " + " | ".join(map(cell, head)) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(map(cell, row)) + " |"
    yield ""


def fenced(text: str) -> Iterator[str]:
    """A code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    yield from (fence + "text", text or "(empty)", fence, "")


def _headline(content: Document) -> Iterator[str]:
    found = content.found
    yield from (f"# {cell(content.run.name)}", "", f"{cell(content.exported)} {cell(content.outcome)}", "")
    if found.before and found.after:
        yield f"Before: {cell(found.before.model)} ({cell(found.before.phase)}). After: {cell(found.after.model)} "
        yield f"({cell(found.after.phase)}). The same cases on both sides, paired by id."
        yield ""
    if not content.headline:
        yield from ("No evaluation is complete, so there is nothing to compare yet.", "")
    for metric in content.headline:
        both = found.before is not None and found.after is not None
        levels = f"{metric.before} → {metric.after}" if both else metric.before if found.before else metric.after
        yield f"- **{cell(metric.dataset)} {cell(metric.title)}**: {levels}. {cell(metric.sentence)}"
    yield ""


def _phases(content: Document) -> Iterator[str]:
    yield from ("## Phases", "")
    yield from table(
        ("Phase", "Kind", "Started", "Time", "Status", "Resumed"),
        (
            (p.name, p.kind, words.moment(p.started), words.duration(p.seconds), p.status, p.resumes or words.NOTHING)
            for p in content.run.phases
        ),
    )
    if content.incidents:
        yield from ("What did not go straight on:", "")
        yield from table(("When", "Phase", "What"), ((i.time, i.phase, i.what) for i in content.incidents))


def _gates(content: Document) -> Iterator[str]:
    yield from ("## Gates", "")
    gates = [gate for phase in content.run.phases for gate in phase.gates]
    if not gates:
        yield from ("The recipe has no gates.", "")
        return
    yield from table(
        ("Phase", "Gate", "Reads", "Value", "Must be", "Verdict"),
        (
            (
                gate.phase,
                f"{gate.name} ({'hard' if gate.hard else 'soft'})",
                f"{gate.metric}, {gate.reduction}",
                words.plain(gate.value),
                words.bound(gate.comparison, gate.threshold),
                gate.verdict + (f": {gate.reason}" if gate.reason and gate.verdict != "passed" else ""),
            )
            for gate in gates
        ),
    )


def _levels(content: Document) -> Iterator[str]:
    yield from ("## Before and after", "")
    found = content.found
    if not found.tables:
        yield from ("No zero-shot evaluation is complete.", "")
    for dataset, rows in found.tables.items():
        yield from (f"### {cell(dataset)}", "")
        yield from table(
            ("Metric", "State", "Level (95 %)", "Cases", "Unscorable", "Gain of the phase", "Against base", "McNemar"),
            (line for row in rows for line in _level_lines(row)),
        )
    if found.tables:
        yield "Differences of shares are in points. Intervals of differences: BCa bootstrap of the mean paired"
        yield f"difference, seeded, {RESAMPLES:,} resamples; of levels: Wilson for shares, Student's t otherwise."
        yield ""
    if found.few_shot:
        yield from ("### With solved examples in the prompt (never a “before”)", "")
        yield from table(
            ("State", "Shots", "Metric", "Level (95 %)", "Cases"),
            (
                (c.evaluation.model, c.evaluation.shots, f"{row.dataset} {row.part}", _level(c, row), c.scored)
                for rows in found.few_shot_tables.values()
                for row in rows
                for c in row.cells
            ),
        )


def _level_lines(row: MetricRow) -> Iterator[Sequence[object]]:
    for c in row.cells:
        base = c.against_base
        tested = words.probability(base.mcnemar_p) if base and base.mcnemar_p is not None else words.NOTHING
        yield (
            row.part + (" (the score)" if row.is_score and row.part != "score" else ""),
            c.evaluation.model,
            _level(c, row),
            c.scored,
            c.unscorable,
            _change(c.against_previous, row.share),
            _change(base, row.share),
            tested,
        )


def _level(c: Any, row: MetricRow) -> str:
    return f"{words.amount(c.mean, row.share)} ({words.level_span(c.interval, row.share)})"


def _change(found: Comparison | None, share: bool) -> str:
    if found is None:
        return words.NOTHING
    if found.pairs == 0:
        return "no shared case"
    if found.unchanged:
        return "unchanged"
    return f"{words.gain(found.difference, share)} ({words.span(found.interval, share)}), {words.verdict(found)}"


def _training(content: Document) -> Iterator[str]:
    yield from ("## Training", "")
    rows = [
        (phase.name, phase.kind, metric, len(values), *(said(metric, v) for v in (values[0], _mean(values[-10:]))))
        for phase in content.run.phases
        for metric in _numbers(phase)
        if (values := [v for step in phase.metrics if (v := number(step.get(metric))) is not None])
    ]
    if rows:
        yield from table(("Phase", "Kind", "Metric", "Steps", "First", "Mean of the last ten"), rows)
    else:
        yield from ("No training step was recorded.", "")
    for phase in content.run.phases:
        if told := cost(phase):
            yield from (f"- {cell(phase.name)}: {cell(told)}", "")


def _numbers(phase: PhaseRecord) -> list[str]:
    names = dict.fromkeys(name for row in phase.metrics for name in row)
    return [name for name in names if name not in ("step", "seconds", "tokens", "target_tokens")]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _examples(content: Document) -> Iterator[str]:
    yield from ("## Examples", "")
    if not content.examples:
        yield from ("There is no evaluation of the base and of a later state on the same cases.", "")
    for group in content.examples:
        yield from (f"### {cell(group.dataset)}", "")
        if not group.num_improved and not group.num_worsened:
            yield f"Nothing changed: all {group.num_same} cases score as before, "
            yield from (f"{group.num_reworded} of them in other words.", "")
            continue
        yield f"{group.num_improved} better, {group.num_worsened} worse, {group.num_same} with the same score "
        yield f"({group.num_reworded} of them in other words). Shown are those that moved most; among equals the choice"
        yield from ("is by a digest of the id.", "")
        for title, cases in (("Improved", group.improved), ("Worsened", group.worsened)):
            for case in cases:
                yield from example_lines(title, case)


def example_lines(title: str, case: Example) -> Iterator[str]:
    scores = f"{words.plain(case.before.score)} → {words.plain(case.after.score)}"
    yield from (f"#### {title}: {cell(case.before.id)}, score {scores}", "", "Prompt:", "")
    yield from fenced(case.before.prompt)
    for side, answer in (("Before", case.before), ("After", case.after)):
        yield from (f"{side} ({cell(_parts(answer))}):", "")
        yield from fenced(answer.completion)


def _parts(answer: Answer) -> str:
    told = [
        f"score {words.plain(answer.score)}",
        *(f"{part} {words.plain(value)}" for part, value in answer.parts.items()),
    ]
    return ", ".join(told + ([answer.reason] if answer.reason else []))


def _exports(content: Document) -> Iterator[str]:
    yield from ("## Exports", "")
    if not content.exports:
        yield from ("Nothing has been exported.", "")
    for phase in content.exports:
        for title in ("candidates", "verification"):
            rows = [row for row in listing(phase.details.get(title)) if mapping(row)]
            if not rows and title == "verification":
                yield from (f"{cell(phase.name)} is **unverified**: it recorded no comparison.", "")
            if rows:
                names = list(dict.fromkeys(name for row in rows for name in row))
                yield from (f"### {cell(phase.name)}: {title}", "")
                yield from table(
                    [name.replace("_", " ") for name in names],
                    ([said(name, row.get(name)) for name in names] for row in rows),
                )
        for note in listing(phase.result.get("notes")):
            yield from (f"- {cell(note)}", "")


def _counts(content: Document) -> Iterator[str]:
    yield from ("## Counts", "")
    rows = [
        (count.place, count.what, words.plain(count.value), "lost" if count.notable else "") for count in content.counts
    ]
    yield from table(("Where", "What", "Number", ""), rows) if rows else ("Nothing has been counted yet.", "")
    for phase in content.run.phases:
        for note in listing(phase.result.get("notes")) if phase.kind != "export" else []:
            yield from (f"- {cell(phase.name)}: {cell(note)}", "")


def _data(content: Document) -> Iterator[str]:
    yield from ("## Data", "")
    if not content.datasets:
        yield from ("The recipe prepares no data.", "")
        return
    yield from table(
        ("Dataset", "Content", "Made from", "Counts", "Digest", "Used by"),
        (
            (
                d.name,
                d.content,
                d.sources,
                ", ".join(f"{what} {words.plain(value)}" for what, value in d.counts.items()) or "not prepared",
                d.digest or words.NOTHING,
                ", ".join(d.used_by),
            )
            for d in content.datasets
        ),
    )


def _lineage(content: Document) -> Iterator[str]:
    yield from ("## Lineage", "", *_node(content.lineage, 0), "")


def _node(node: LineageNode, depth: int) -> Iterator[str]:
    made = "".join(f"; {what} {digest}" for what, digest in node.digests)
    used = "".join(f"; from data {name} {digest or 'without digest'}" for name, digest in node.data)
    yield f"{'  ' * depth}- **{cell(node.name)}** ({cell(node.kind)}){cell(made)}{cell(used)}"
    for child in node.children:
        yield from _node(child, depth + 1)


def _again(content: Document) -> Iterator[str]:
    yield from ("## Run it again", "")
    yield from fenced(content.command)
    for title, rows in content.facts:
        yield from (f"### {title}", "")
        yield from table(("", ""), rows)
    if content.attempts:
        yield from ("### Attempts", "")
        yield from table(
            ("#", "Started", "Took", "Outcome", "Execution"), (tuple(a.values()) for a in content.attempts)
        )
