"""Rows of the table that the terminal shows at the end of a run."""

from dataclasses import dataclass

from posttrain.report import words
from posttrain.report.read import PhaseRecord, mapping, number, read_run
from posttrain.run.folder import RunFolder


@dataclass(frozen=True)
class SummaryRow:
    phase: str
    kind: str
    status: str
    time: str
    key_metric: str
    """The number that says most about the phase, with its name; empty where there is none."""
    gates: str
    """Verdicts of the phase's gates; empty where it has none."""


def summary_rows(run: RunFolder) -> list[SummaryRow]:
    """One row per phase of the recipe, in order; also for a run that is not finished."""
    return [
        SummaryRow(
            phase=phase.name,
            kind=phase.kind,
            status=phase.status,
            time=words.duration(phase.seconds),
            key_metric=key_metric(phase),
            gates=gate_verdicts(phase),
        )
        for phase in read_run(run, answers=False).phases
    ]


def key_metric(phase: PhaseRecord) -> str:
    match phase.kind:
        case "sft":
            return _last(phase, "loss")
        case "preference":
            return _last(phase, "accuracy") or _last(phase, "loss")
        case "grpo":
            return _last(phase, "reward")
        case "evaluate":
            scores = [
                (name.removesuffix(".score"), value) for name, value in _metrics(phase) if name.endswith(".score")
            ]
            return ", ".join(f"{name} {value:.3f}" for name, value in scores if value is not None)
        case "prepare":
            rows = sum(number(value) or 0 for name, value in phase.counts.items() if name.endswith(".rows"))
            return f"{rows:,.0f} rows" if rows else ""
        case "merge":
            size = dict(_metrics(phase)).get("bytes")
            return words.size(size) if size else ""
        case "export":
            told = phase.details.get("chosen")
            model = mapping(told).get("model") or told
            return f"took {model}" if model else ""
    return ""


def _metrics(phase: PhaseRecord) -> list[tuple[str, float | None]]:
    return [(str(name), number(value)) for name, value in mapping(phase.result.get("metrics")).items()]


def _last(phase: PhaseRecord, metric: str) -> str:
    """The metric's mean over the last ten steps that have it."""
    values = [value for row in phase.metrics if (value := number(row.get(metric))) is not None][-10:]
    if not values:
        return ""
    name = metric.replace("_", " ")
    return f"{name} {sum(values) / len(values):.3f}" + (f" (mean of the last {len(values)})" if len(values) > 1 else "")


def gate_verdicts(phase: PhaseRecord) -> str:
    """What did not pass is named with its numbers; what passed is counted."""
    judged = [gate for gate in phase.gates if gate.verdict != "not judged"]
    told = [
        f"{gate.name} {gate.verdict} ({words.plain(gate.value)}, must be {words.bound(gate.comparison, gate.threshold)}"
        f"{'' if gate.hard else ', soft'})"
        for gate in judged
        if gate.verdict != "passed"
    ]
    passed = sum(gate.verdict == "passed" for gate in judged)
    return "; ".join(told + ([f"{passed} passed"] if passed else []))
