"""What the report says, as plain data: the page and the Markdown text both show exactly this."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from posttrain.report import words
from posttrain.report.comparison import Evaluations, Examples, MetricRow, evaluations, examples
from posttrain.report.read import PhaseRecord, RunRecord, listing, mapping, number
from posttrain.report.statistics import Comparison
from posttrain.report.training import overfitting
from posttrain.run.folder import digest_json

NOTABLE = re.compile(r"drop|skip|unscor|truncat|without|aside|unreadable|repeated|ended_(length|format|turns)|one side")


@dataclass(frozen=True)
class HeadlineMetric:
    dataset: str
    title: str
    share: bool
    before: str
    after: str
    comparison: Comparison | None
    sentence: str


@dataclass(frozen=True)
class Count:
    place: str
    what: str
    value: float
    notable: bool
    """Something was lost or left out, and there was at least one."""


@dataclass(frozen=True)
class DatasetRecord:
    name: str
    content: str
    sources: str
    max_tokens: int | None
    digest: str | None
    counts: dict[str, float]
    used_by: tuple[str, ...]


@dataclass(frozen=True)
class LineageNode:
    """A model state or an export, with what it was made from and what was made from it."""

    name: str
    kind: str
    digests: tuple[tuple[str, str], ...]
    data: tuple[tuple[str, str | None], ...]
    """Datasets that went in, with their digests."""
    children: tuple["LineageNode", ...]


@dataclass(frozen=True)
class Incident:
    """Something that did not go straight on."""

    time: str
    phase: str
    what: str


@dataclass(frozen=True)
class Document:
    run: RunRecord
    outcome: str
    exported: str
    headline: tuple[HeadlineMetric, ...]
    found: Evaluations
    incidents: tuple[Incident, ...]
    examples: tuple[Examples, ...]
    exports: tuple[PhaseRecord, ...]
    counts: tuple[Count, ...]
    datasets: tuple[DatasetRecord, ...]
    lineage: LineageNode
    facts: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    """Titled tables of names and values: recipe flags, packages, hardware, code."""
    attempts: tuple[dict[str, str], ...]
    command: str
    """What to type to make this run again."""


def document(run: RunRecord) -> Document:
    found = evaluations(run)
    datasets = tuple(_datasets(run))
    return Document(
        run=run,
        outcome=outcome(run),
        exported=exported(run, found),
        headline=tuple(_headline(row, found) for row in found.headline),
        found=found,
        incidents=(*_incidents(run), *_warnings(run)),
        examples=examples(found),
        exports=tuple(phase for phase in run.phases if phase.kind == "export" and phase.complete),
        counts=tuple(_counts(run, found)),
        datasets=datasets,
        lineage=_lineage(run, {dataset.name: dataset.digest for dataset in datasets}),
        facts=tuple(_facts(run)),
        attempts=tuple(_attempt(attempt, run) for attempt in listing(run.manifest.get("attempts")) if mapping(attempt)),
        command=command(run),
    )


def outcome(run: RunRecord) -> str:
    """Where the run stands, in one sentence."""
    if not run.phases:
        return "The run has no readable recipe."
    spent = words.duration(sum(phase.seconds or 0.0 for phase in run.phases))
    done = sum(phase.complete for phase in run.phases)
    standing = f"{done} of {len(run.phases)} phases are complete after {spent}"
    for phase in run.phases:
        match phase.status:
            case "failed gate":
                names = ", ".join(gate.name for gate in phase.gates if gate.hard and gate.verdict == "failed")
                return f"A hard gate of phase {phase.name} did not pass ({names}); {standing}."
            case "failed":
                return f"Phase {phase.name} failed; {standing}."
            case "running":
                return f"Phase {phase.name} is running; {standing}."
            case "stopped":
                return f"The run was stopped in phase {phase.name} and can be resumed; {standing}."
            case "not run":
                ends = [
                    event.get("event") for event in run.events if event.get("event") in ("attempt_started", "failed")
                ]
                last = "The last attempt failed" if ends and ends[-1] == "failed" else "The run is not finished"
                return f"{last}, phase {phase.name} is next; {standing}."
    return f"All {done} phases are complete, in {spent} of work."


def exported(run: RunRecord, found: Evaluations) -> str:
    """Which model state left the run, and why that one."""
    exports = [phase for phase in run.phases if phase.kind == "export"]
    if found.chosen is None:
        return "Nothing has been exported yet." if exports else "The recipe exports nothing."
    spec = next(phase.spec for phase in exports if phase.name == found.chosen.export)
    candidates, metrics = listing(spec.get("candidates")), ", ".join(map(str, listing(spec.get("metrics"))))
    if len(candidates) < 2:
        return f"Exported: {found.chosen.model}, the only candidate."
    return f"Exported: {found.chosen.model}, the best of {len(candidates)} candidates by the mean of {metrics}."


def _headline(row: MetricRow, found: Evaluations) -> HeadlineMetric:
    cells = {cell.evaluation.phase: cell for cell in row.cells}
    first = cells.get(found.before.phase) if found.before else None
    last = cells.get(found.after.phase) if found.after else None
    shown = last or first
    comparison = last.against_base if last else None
    if comparison is not None:
        sentence = words.sentence(comparison, row.share)
    elif shown is None or shown.mean is None:
        sentence = "No case could be scored."
    else:
        side = "Not compared: the base was not evaluated on it" if last else "Only the base was evaluated so far"
        sentence = f"{side} (95 % interval {words.level_span(shown.interval, row.share)}, {shown.scored:,} cases)."
    return HeadlineMetric(
        dataset=row.dataset,
        title=row.part,
        share=row.share,
        before=words.amount(first.mean if first else None, row.share),
        after=words.amount(last.mean if last else None, row.share),
        comparison=comparison,
        sentence=sentence,
    )


def _counts(run: RunRecord, found: Evaluations) -> Iterator[Count]:
    for phase in run.phases:
        for what, raw in phase.counts.items():
            if (value := number(raw)) is not None:
                yield _count(phase.name, str(what), value)
    for phase in run.phases:
        for file, lines in phase.unreadable.items():
            yield _count(phase.name, f"unreadable lines of {file}", lines)
    for file, lines in run.unreadable.items():
        yield _count("run", f"unreadable lines of {file}", lines)
    for row in (row for table in found.tables.values() for row in table if row.is_score):
        for cell in row.cells:
            if (pairs := cell.against_base) is None:
                continue
            place = f"{cell.evaluation.phase} against base"
            yield from (
                _count(place, f"{row.dataset}: {what}", value)
                for what, value in (
                    ("ids on one side only", pairs.before_only + pairs.after_only),
                    ("unscorable on a side, left out on both", pairs.unscorable),
                    ("repeated ids", pairs.repeated),
                )
                if value
            )


def _count(place: str, what: str, value: float) -> Count:
    dataset, dot, kind = what.rpartition(".")
    shown = f"{dataset}: {kind.replace('_', ' ')}" if dot and " " not in what else what.replace("_", " ")
    return Count(place, shown, value, bool(value) and NOTABLE.search(what) is not None)


def _datasets(run: RunRecord) -> Iterator[DatasetRecord]:
    for phase in run.phases:
        if phase.kind != "prepare":
            continue
        told = mapping(phase.details.get("datasets"))
        for spec in map(mapping, listing(phase.spec.get("datasets"))):
            name = str(spec.get("name"))
            own = mapping(told.get(name))
            digest = own.get("digest") or output_digest(phase, f"data/{name}")
            counts = {
                key.removeprefix(f"{name}."): value for key, value in phase.counts.items() if key.startswith(f"{name}.")
            }
            counts |= mapping(own.get("counts"))
            yield DatasetRecord(
                name=name,
                content=str(spec.get("content")),
                sources="; ".join(_source(mapping(source)) for source in listing(spec.get("sources"))),
                max_tokens=spec.get("max_tokens"),
                digest=str(digest) if digest else None,
                counts={key: value for key, raw in counts.items() if (value := number(raw)) is not None},
                used_by=tuple(
                    user.name
                    for user in run.phases
                    if name in _datasets_of(user.spec) or name == mapping(user.spec.get("held_out")).get("dataset")
                ),
            )


def _source(source: dict[str, Any]) -> str:
    if source.get("kind") == "world":
        count = number(source.get("count")) or 0
        return f"world {source.get('world')}, {source.get('split')}, {count:,.0f} rows, seed {source.get('seed')}"
    return " ".join(str(value) for value in source.values())


def _datasets_of(spec: dict[str, Any]) -> set[str]:
    """What a phase's result was made from; held-out data only watched it being made."""
    if spec.get("kind") == "prepare":
        return set()
    names = [spec.get("dataset"), spec.get("verify_dataset"), *map(str, listing(spec.get("datasets")))]
    return {str(name) for name in names if name}


def _lineage(run: RunRecord, digests: dict[str, str | None]) -> LineageNode:
    """The tree of model states from the base, by what each phase says it was made from."""
    parents: dict[str, list[PhaseRecord]] = {}
    chosen = exported_states(run)
    for phase in run.phases:
        parent = chosen.get(phase.name) if phase.kind == "export" else phase.spec.get("model")
        if parent and phase.complete and phase.kind in ("sft", "preference", "grpo", "merge", "export"):
            parents.setdefault(str(parent), []).append(phase)

    def node(phase: PhaseRecord) -> LineageNode:
        used = () if phase.kind == "export" else tuple((n, digests.get(n)) for n in sorted(_datasets_of(phase.spec)))
        below = () if phase.kind == "export" else tuple(map(node, parents.get(phase.name, ())))
        return LineageNode(phase.name, phase.kind, tuple(_made(phase)), used, below)

    base = mapping(run.recipe.get("base"))
    states = (phase.state for phase in run.phases if phase.state)
    digest = run.manifest.get("model_digest") or next((state.get("base_digest") for state in states), None)
    return LineageNode(
        name=str(base.get("path") or base.get("kind") or "base"),
        kind="base",
        digests=(("base", str(digest)),) if digest else (),
        data=(),
        children=tuple(map(node, parents.get("base", ()))),
    )


def exported_states(run: RunRecord) -> dict[str, str]:
    """Export phase → the model state that it took."""
    taken = {}
    for phase in run.phases:
        if phase.kind == "export" and phase.complete:
            told = phase.details.get("chosen")
            taken[phase.name] = str(mapping(told).get("model") or told or phase.state.get("phase") or "")
    return taken


def _made(phase: PhaseRecord) -> Iterator[tuple[str, str]]:
    """What a phase made, by digest: an adapter or a model folder, or one entry per exported file."""
    if phase.kind == "export":
        paths = [str(mapping(output).get("path")) for output in listing(phase.result.get("outputs"))]
        for name in dict.fromkeys(path.split("/")[1] for path in paths if path.startswith("exports/")):
            yield name, output_digest(phase, f"exports/{name}") or ""
    elif phase.state.get("adapter_digest"):
        yield "adapter", str(phase.state["adapter_digest"])
    elif phase.state.get("base_digest"):
        yield "merged" if phase.kind == "merge" else "model", str(phase.state["base_digest"])


def output_digest(phase: PhaseRecord, folder: str) -> str | None:
    """Digest of an output folder, as `digest_folder` gives it, from the digests of its files in the result."""
    outputs = {str(out.get("path")): out.get("sha256") for out in map(mapping, listing(phase.result.get("outputs")))}
    if folder in outputs:
        return str(outputs[folder])
    inside = {
        path.removeprefix(f"{folder}/"): digest for path, digest in outputs.items() if path.startswith(f"{folder}/")
    }
    in_order = sorted(inside, key=lambda path: path.split("/"))
    return digest_json([[path, inside[path]] for path in in_order]) if inside else None


def _incidents(run: RunRecord) -> Iterator[Incident]:
    for event in run.events:
        what = None
        match event.get("event"):
            case "accepted":
                what = f"gate {event.get('gate')} accepted by name"
            case "redo_requested":
                what = f"asked to be done again: {', '.join(map(str, listing(event.get('phases'))))}"
            case "checkpoint_set_aside":
                what = str(event.get("message"))
            case "discarded":
                what = f"{event.get('path')} discarded: {event.get('reason')}"
            case "phase_resumed":
                what = "resumed"
            case "failed" | "stopped" | "gate_failed" as kind:
                what = f"attempt {event.get('attempt')} {kind.replace('_', ' ')}: {event.get('message')}"
        if what is not None:
            yield Incident(words.moment(number(event.get("time"))), str(event.get("phase") or words.NOTHING), what)


def _warnings(run: RunRecord) -> Iterator[Incident]:
    for phase in run.phases:
        if found := overfitting(phase):
            yield Incident(f"step {found.step}", phase.name, found.what)


def _facts(run: RunRecord) -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    manifest = run.manifest
    code = mapping(manifest.get("git"))
    identity = {
        "recipe": run.recipe.get("name"),
        "recipe digest": manifest.get("recipe_digest"),
        "seed": run.recipe.get("seed"),
        "run id": manifest.get("run_id"),
        "base digest": manifest.get("model_digest"),
        "commit": f"{code.get('commit')}{', with local changes' if code.get('dirty') else ''}" if code else None,
    }
    for title, table in (
        ("Identity", identity),
        ("Recipe flags", mapping(run.recipe.get("flags"))),
        ("Packages", mapping(manifest.get("packages"))),
        ("Hardware", mapping(manifest.get("hardware"))),
    ):
        rows = tuple(
            (str(key).replace("_", " "), said(key, value)) for key, value in table.items() if value is not None
        )
        if rows:
            yield title, rows


def said(key: str, value: Any) -> str:
    """A value of a JSON file in words."""
    if key.endswith("_bytes") and (amount := number(value)) is not None:
        return words.size(amount)
    if value is None:
        return words.NOTHING
    if (shown := number(value)) is not None:
        return words.plain(shown) if isinstance(value, float) else str(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {said(name, inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(said("", inner) for inner in value)
    return "yes" if value is True else "no" if value is False else str(value)


def _attempt(attempt: dict[str, Any], run: RunRecord) -> dict[str, str]:
    """The journal knows an attempt's end before the manifest does: the report is written inside the attempt."""
    ends = {"run_completed": "completed", "stopped": "stopped", "failed": "failed", "gate_failed": "gate_failed"}
    own = [
        event for event in run.events if event.get("attempt") == attempt.get("number") and event.get("event") in ends
    ]
    end = own[-1] if own else {}
    started, finished = number(attempt.get("started")), number(attempt.get("finished")) or number(end.get("time"))
    took = finished - started if started is not None and finished is not None else None
    outcome = attempt.get("outcome") or ends.get(str(end.get("event"))) or "ended without a word, or still running"
    return {
        "number": str(attempt.get("number", words.NOTHING)),
        "started": words.moment(started),
        "took": words.duration(took),
        "outcome": str(outcome).replace("_", " "),
        "execution": said("", mapping(attempt.get("execution"))).replace("_", " "),
    }


def command(run: RunRecord) -> str:
    """The command that makes this run again from its recipe and flags."""
    told = ["posttrain", "run", str(run.manifest.get("source") or run.recipe.get("name") or "RECIPE")]
    for flag, value in mapping(run.recipe.get("flags")).items():
        spelled = flag.replace("_", "-")
        if isinstance(value, bool):
            told.append(f"--{spelled}" if value else f"--no-{spelled}")
        elif value is not None:
            told.append(f"--{spelled}={value}")
    return " ".join([*(_quoted(word) for word in told), f"--name={run.name}-again"])


def _quoted(word: str) -> str:
    return word if re.fullmatch(r"[\w./:=+-]+", word) else "'" + word.replace("'", "'\\''") + "'"
