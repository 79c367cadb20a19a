"""`decision_table`: a prompt, and the reward of each action it asks about, as `posttrain data add` writes them."""

import math
import re

from posttrain.chat.conversation import Conversation
from posttrain.data.formats.format import BadRow, Fields, Format, Record, text
from posttrain.data.formats.turns import Turns, answer

SPEAKER = re.compile(r"^\s*(system|user):\s*", re.IGNORECASE)
REWARD = re.compile(r"reward_action_(\d+)")


def fields(record: Record) -> Fields:
    rewards = action_values(record, REWARD)
    best = max(range(len(rewards)), key=rewards.__getitem__)
    return {
        "world": "decisions",
        "prompt": prompt(text(record, "prompt")),
        "reference": {"rewards": rewards},
        "solution": (answer(f"[{best}]"),),
    }


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
    reads="TES tables with rewards; `posttrain data add TABLE.csv --tau 0.05` adds them from Q-values",
)
