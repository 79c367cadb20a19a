"""What a set of rows looks like: lengths, turns, tools, duplicates. Rows are the JSON values that are stored."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

JsonRow = dict[str, Any]
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def messages_of(row: JsonRow) -> Iterator[dict[str, Any]]:
    """Every message of a row, those of its prompt first."""
    for conversation in conversations_of(row):
        yield from conversation["messages"]
    for side in ("chosen", "rejected", "solution"):
        yield from row.get(side) or ()


def conversations_of(row: JsonRow) -> Iterator[dict[str, Any]]:
    for field in ("conversation", "prompt"):
        if isinstance(row.get(field), dict):
            yield row[field]


def text_of(row: JsonRow) -> str:
    """All that is said in a row."""
    return row["text"] if "text" in row else "\n".join(message["content"] for message in messages_of(row))


def identity(row: JsonRow) -> str:
    """Digest of a row without its id and metadata: equal for duplicates."""
    bare = {name: value for name, value in row.items() if name != "id"}
    for field in ("conversation", "prompt"):
        if isinstance(bare.get(field), dict):
            bare[field] = {name: value for name, value in bare[field].items() if name != "metadata"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


MEASURES: dict[str, Callable[[JsonRow], int]] = {
    "characters": lambda row: len(text_of(row)),
    "messages": lambda row: sum(1 for _ in messages_of(row)),
    "user_turns": lambda row: sum(message["role"] == "user" for message in messages_of(row)),
    "calls": lambda row: sum(message.get("recipient") is not None for message in messages_of(row)),
    "tools_offered": lambda row: sum(len(conversation.get("tools") or ()) for conversation in conversations_of(row)),
}


class Statistics:
    """Collects over rows, one at a time."""

    def __init__(self) -> None:
        self.measured: dict[str, list[int]] = {name: [] for name in MEASURES}
        self.tools: Counter[str] = Counter()
        self.identities: Counter[str] = Counter()

    def add(self, row: JsonRow) -> None:
        for name, measure in MEASURES.items():
            self.measured[name].append(measure(row))
        called = (message["recipient"] for message in messages_of(row) if message.get("recipient"))
        self.tools.update(recipient.removeprefix("functions.") for recipient in called)
        self.identities[identity(row)] += 1

    def summary(self) -> dict[str, Any]:
        """JSON: per measure its least, mean, quantiles and most; tools by calls; rows that repeat an earlier one."""
        return {
            "rows": len(self.measured["characters"]),
            **{name: spread(values) for name, values in self.measured.items()},
            "most_called": dict(sorted(self.tools.items(), key=lambda pair: (-pair[1], pair[0]))[:20]),
            "duplicates": sum(count - 1 for count in self.identities.values()),
        }


def spread(values: Iterable[int]) -> dict[str, float]:
    """A quantile is the smallest value that so large a share of the values does not exceed."""
    ordered = sorted(values)
    if not ordered:
        return {}
    quantiles = {name: ordered[max(0, -int(-share * len(ordered) // 1) - 1)] for name, share in QUANTILES.items()}
    mean = round(sum(ordered) / len(ordered), 3)
    return {"min": ordered[0], "mean": mean, **quantiles, "max": ordered[-1], "total": sum(ordered)}


def histogram(values: Iterable[int], most_bins: int) -> list[tuple[int, int, int]]:
    """(from, up to and with, count) of bins of one round width."""
    ordered = sorted(values)
    if not ordered:
        return []
    width = _round_up((ordered[-1] - ordered[0] + 1) / most_bins)
    first = ordered[0] // width
    counts = Counter(value // width - first for value in ordered)
    return [((first + at) * width, (first + at + 1) * width - 1, counts[at]) for at in range(max(counts) + 1)]


def _round_up(width: float) -> int:
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step >= width:
                return factor * step
        step *= 10
