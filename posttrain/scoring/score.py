"""Score: what a scorer says about an episode or an answer."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """`value` None means unscorable, with the reason: left out of every mean, never counted as 0."""

    value: float | None
    parts: dict[str, float] = field(default_factory=dict)
    reason: str | None = None
    answer: str | None = None
    """What was answered, in a form equal for equal answers: what a majority vote counts. None has no vote."""
