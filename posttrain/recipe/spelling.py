"""Nearest spellings for names that were not found."""

import difflib
from collections.abc import Iterable


def nearest(wrong: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """At most `count` of the allowed names that look like `wrong`, best first."""
    return difflib.get_close_matches(wrong, list(allowed), n=count, cutoff=0.5)


def did_you_mean(wrong: str, allowed: Iterable[str]) -> str:
    """` (did you mean a, b?)`, or nothing when no name comes close."""
    found = nearest(wrong, allowed)
    return f" (did you mean {', '.join(found)}?)" if found else ""
