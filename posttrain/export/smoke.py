"""The smoke test of a merged model: is what it writes text at all?"""

import re
from collections import Counter
from collections.abc import Sequence

SPECIAL = re.compile(r"<\|[a-z_]+\|>")
LOOKED_AT = 200
"""Distinct characters are counted in so many first characters."""
MINIMUM_DISTINCT = 8
MINIMUM_LETTER_SHARE = 0.3
REPEATS_REFUSED = 5


def text_metrics(text: str) -> dict[str, float]:
    """Length, distinct characters at the start, share of letters, and how often the commonest 2- or 3-gram of words
    occurs."""
    text = SPECIAL.sub(" ", text).strip()
    words = text.split()
    grams = Counter(tuple(words[start : start + size]) for size in (2, 3) for start in range(len(words) - size + 1))
    return {
        "smoke_characters": float(len(text)),
        "smoke_distinct_characters": float(len(set(text[:LOOKED_AT]))),
        "smoke_letter_share": sum(character.isalpha() for character in text) / max(len(text), 1),
        "smoke_repeats": float(max(grams.values(), default=0)),
    }


def smoke_metrics(texts: Sequence[str]) -> dict[str, float]:
    """The worst of each metric over the texts, and `smoke_ok`: 1 if every text passes every limit."""
    rows = [text_metrics(text) for text in texts]
    worst = {name: min(row[name] for row in rows) for name in rows[0] if name != "smoke_repeats"}
    worst["smoke_repeats"] = max(row["smoke_repeats"] for row in rows)
    passed = (
        worst["smoke_characters"] > 0
        and worst["smoke_distinct_characters"] >= MINIMUM_DISTINCT
        and worst["smoke_letter_share"] >= MINIMUM_LETTER_SHARE
        and worst["smoke_repeats"] < REPEATS_REFUSED
    )
    return {**worst, "smoke_ok": float(passed)}
