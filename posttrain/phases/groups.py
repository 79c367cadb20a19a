"""Which tasks a step rolls out, and which of its groups it trains on: pure functions of recipe, step and episodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.order import Samples
from posttrain.engine.objectives import group_advantages
from posttrain.errors import PhaseFault
from posttrain.recipe.types import EpisodeFilters, GrpoPhase, Sampling, Stage

Group = list[dict[str, Any]]
TRUNCATED, TOO_SHORT, DUPLICATE = "truncated", "too short", "duplicate"
"""Reasons for which an episode is masked."""


@dataclass
class Curriculum:
    """Tasks of every step. `prompt_tokens` are those of each task's prompt, asked only where there are stages."""

    phase: GrpoPhase
    order: Samples
    tasks: Sequence[dict[str, Any]]
    prompt_tokens: Sequence[int]

    def __post_init__(self) -> None:
        self._open = [self._tasks_of(stage) for stage in self.phase.curriculum]

    def _tasks_of(self, stage: Stage) -> frozenset[int]:
        found = frozenset(
            number
            for number, (task, length) in enumerate(zip(self.tasks, self.prompt_tokens, strict=True))
            if length <= stage.max_prompt_tokens and (stage.tiers is None or task.get("tier") in stage.tiers)
        )
        if not found:
            raise PhaseFault(
                f"{self.phase.name}.curriculum, from step {stage.from_step}: none of {len(self.tasks)} tasks has a "
                f"prompt of at most {stage.max_prompt_tokens} tokens (the shortest has {min(self.prompt_tokens)}) and "
                f"a tier of {stage.tiers or 'any'}"
            )
        return found

    def _stage(self, step: int) -> int | None:
        begun = [place for place, stage in enumerate(self.phase.curriculum) if stage.from_step <= step]
        return begun[-1] if begun else None

    def of_step(self, step: int) -> list[int]:
        """Task numbers of the step's groups, spare ones included."""
        groups = self.phase.groups_per_step + self.phase.spare_groups
        place = self._stage(step)
        if place is None:
            return self.order.of_step(step, groups)
        return self.order.of_step(step - self.phase.curriculum[place].from_step + 1, groups, self._open[place])

    def sampling(self, step: int) -> Sampling:
        place = self._stage(step)
        turns = self.phase.sampling.max_turns if place is None else self.phase.curriculum[place].max_turns
        return self.phase.sampling.model_copy(update={"max_turns": turns})


def mask(group: Group, filters: EpisodeFilters) -> None:
    """Take the score from members that the filters leave out, and say why."""
    seen: set[tuple[int, ...]] = set()
    for episode in group:
        tokens = tuple(episode["tokens"])
        again = tokens in seen
        seen.add(tokens)
        if episode["score"] is None:
            continue
        reason = None
        if episode["ended"] == "length" and filters.overlong == "masked":
            reason = TRUNCATED
        elif sum(episode["sampled"]) < filters.at_least_tokens:
            reason = TOO_SHORT
        elif again and filters.duplicates == "masked":
            reason = DUPLICATE
        if reason is not None:
            episode["score"], episode["reason"] = None, reason


def spread(group: Group) -> bool:
    """Whether a group's scores differ."""
    return any(group_advantages([episode["score"] for episode in group]))


def chosen(groups: Sequence[Group], wanted: int) -> list[int]:
    """The first groups with spread; where they are too few, the first of the others fill up."""
    first = sorted(range(len(groups)), key=lambda number: not spread(groups[number]))[:wanted]
    return sorted(first)
