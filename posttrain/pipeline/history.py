"""What the journal says about a run: the part of its state that no result file holds."""

from dataclasses import dataclass, field

from posttrain.run.journal import Journal


@dataclass
class History:
    started: dict[str, str] = field(default_factory=dict)
    """Fingerprint with which each phase was last begun."""
    redo: set[str] = field(default_factory=set)
    """Phases that were asked to be redone and have not been begun since."""
    accepted: set[tuple[str, str]] = field(default_factory=set)
    """(phase, gate) accepted by name since the phase was last begun from nothing."""
    completed: set[str] = field(default_factory=set)
    """Phases whose completion was noted since they were last begun or resumed."""
    finished: bool = False
    """The run was brought to its end, report included, and nothing began since."""


def read_history(journal: Journal) -> History:
    """Fold the events in order; torn lines are skipped by the journal."""
    history = History()
    for event in journal.read():
        match event.get("event"):
            case "phase_started":
                phase = event["phase"]
                history.started[phase] = event["fingerprint"]
                history.redo.discard(phase)
                history.completed.discard(phase)
                history.accepted = {pair for pair in history.accepted if pair[0] != phase}
                history.finished = False
            case "phase_resumed":
                history.completed.discard(event["phase"])
                history.finished = False
            case "redo_requested":
                history.redo |= set(event["phases"])
                history.finished = False
            case "accepted":
                history.accepted.add((event["phase"], event["gate"]))
            case "phase_completed":
                history.completed.add(event["phase"])
            case "run_completed":
                history.finished = True
    return history
