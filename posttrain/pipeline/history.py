"""What the journal says about a run: the part of its state that no result file holds."""

from dataclasses import dataclass, field

from posttrain.run.journal import Journal


@dataclass
class History:
    started: dict[str, str] = field(default_factory=dict)
    """Fingerprint with which each phase was last begun; empty where the event has none."""
    redo: set[str] = field(default_factory=set)
    """Phases that were asked to be redone and have not been begun since."""
    accepted: set[tuple[str, str]] = field(default_factory=set)
    """(phase, gate) accepted by name since the phase was last begun from nothing."""
    completed: set[str] = field(default_factory=set)
    """Phases whose completion was noted since they were last begun or resumed."""
    finished: bool = False
    """The run was brought to its end, report included, and nothing began since."""


def read_history(journal: Journal) -> History:
    """Fold the events in order; what is no whole event, and what no phase can be known of, says nothing."""
    history = History()
    for event in journal.read():
        match event:
            case {"event": "phase_started", "phase": str(phase)}:
                history.started[phase] = str(event.get("fingerprint") or "")
                history.redo.discard(phase)
                history.completed.discard(phase)
                history.accepted = {pair for pair in history.accepted if pair[0] != phase}
                history.finished = False
            case {"event": "phase_resumed", "phase": str(phase)}:
                history.completed.discard(phase)
                history.finished = False
            case {"event": "redo_requested", "phases": [*phases]}:
                history.redo |= set(map(str, phases))
                history.finished = False
            case {"event": "accepted", "phase": str(phase), "gate": str(gate)}:
                history.accepted.add((phase, gate))
            case {"event": "phase_completed", "phase": str(phase)}:
                history.completed.add(phase)
            case {"event": "run_completed"}:
                history.finished = True
    return history
