"""`decision_table`: a prompt, and the reward of each action it asks about, as `posttrain data add` writes them."""

import math
import re
from typing import Any

from posttrain.chat.conversation import Conversation
from posttrain.data.formats.format import BadRow, Fields, Format, Record, text
from posttrain.data.formats.turns import Turns, answer
from posttrain.scoring.boltzmann import boltzmann

SPEAKER = re.compile(r"^\s*(system|user):\s*", re.IGNORECASE)
REWARD = re.compile(r"reward_action_(\d+)")
Q_VALUE = re.compile(r"q_action_(\d+)")
KEPT = ("timestep", "timestamp")


def fields(record: Record) -> Fields:
    rewards = action_values(record, REWARD)
    best = max(range(len(rewards)), key=rewards.__getitem__)
    _check_optimal(record, rewards)
    reference: dict[str, Any] = {"rewards": rewards}
    if any(Q_VALUE.fullmatch(name) for name in record):
        reference["q_values"] = action_values(record, Q_VALUE)
    metadata = {name: record[name] for name in KEPT if record.get(name) not in (None, "")}
    return {
        "world": "decisions",
        "prompt": prompt(text(record, "prompt")).model_copy(update={"metadata": metadata}),
        "reference": reference,
        "solution": (answer(f"[{best}]"),),
    }


def with_rewards(record: Record, tau: float) -> dict[str, Any]:
    """The record with a Boltzmann reward for each of its Q-values; one that has rewards is refused."""
    if any(REWARD.fullmatch(name) and value not in (None, "") for name, value in record.items()):
        raise BadRow("reward_action_0", "is there already; leave tau away to take the table's own rewards")
    rewards = boltzmann(action_values(record, Q_VALUE), tau)
    return {**record, **{f"reward_action_{action}": reward for action, reward in enumerate(rewards)}}


def _check_optimal(record: Record, rewards: list[float]) -> None:
    """The table's own best action must be one of the best paid."""
    named = record.get("optimal_action")
    if named in (None, ""):
        return
    try:
        action = int(float(str(named)))
        best = rewards[action] == max(rewards) and action >= 0
    except (ValueError, IndexError, OverflowError):
        raise BadRow("optimal_action", f"is {named!r}; there are the actions 0 to {len(rewards) - 1}") from None
    if not best:
        raise BadRow("optimal_action", f"is {action}, but action {rewards.index(max(rewards))} has the highest reward")


def prompt(written: str) -> Conversation:
    """A line that starts with `system:` or `user:` switches the role, others go on with it; the first is the user's."""
    turns, role, lines = Turns("prompt"), "user", list[str]()

    def close() -> None:
        said = "\n".join(lines).strip()
        lines.clear()
        if said:
            turns.system(said) if role == "system" else turns.user(said)

    for line in written.strip().splitlines():
        if switch := SPEAKER.match(line):
            close()
            role, line = switch[1].lower(), line[switch.end() :]
        lines.append(line)
    close()
    return turns.prompt()


def action_values(record: Record, column: re.Pattern[str]) -> list[float]:
    """One number per action, from the columns that the pattern numbers from 0 on."""
    found = {int(match[1]): name for name in record if (match := column.fullmatch(name))}
    if sorted(found) != list(range(len(found))) or len(found) < 2:
        pattern = column.pattern.replace(r"(\d+)", "N")
        raise BadRow(pattern, f"needs columns numbered 0, 1, … without a gap; there are {sorted(found)}")
    values = []
    for place in range(len(found)):
        try:
            value = float(record[found[place]])
        except (TypeError, ValueError):
            raise BadRow(found[place], f"is {record[found[place]]!r}, not a number") from None
        if not math.isfinite(value):
            raise BadRow(found[place], f"is {value}, not finite")
        values.append(value)
    return values


FORMAT = Format(
    columns=("prompt", "reward_action_0"),
    makes={"tasks": fields},
    reads="TES tables with rewards; from Q-values they are made by `DecisionTableSource` and `data add --tau`",
)
