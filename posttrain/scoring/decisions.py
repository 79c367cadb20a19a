"""Decisions: the action a final message names in brackets, and what a table of action values says of it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.scoring.score import Score

ACTION = re.compile(r"\[(\d+)\]")


def named_action(final: str) -> int | None:
    """The last `[n]` of a final message."""
    named = ACTION.findall(final)
    # A number of many digits is no action of any table, and Python refuses to read the longest ones.
    return int(named[-1][:9]) if named else None


def score_decision(reference: Mapping[str, Any], final: str) -> Score:
    """An action's reward; none named, or one the table does not have, is unscorable.

    Parts: `reward`, `optimal` and, where the table has Q-values, `q_value` and `regret` against the best action.
    """
    rewards: Sequence[float] = reference["rewards"]
    action = named_action(final)
    if action is None:
        return Score(value=None, reason="no action such as [0] in the final message")
    if action >= len(rewards):
        return Score(value=None, reason=f"action {action} of {len(rewards)}, which count from 0")
    values: Sequence[float] = reference.get("q_values", rewards)
    parts = {"reward": rewards[action], "optimal": float(values[action] == max(values))}
    if "q_values" in reference:
        parts |= {"q_value": values[action], "regret": max(values) - values[action]}
    return Score(value=rewards[action], parts=parts, answer=str(action))
