"""Answers in words: equal, contained, or how alike."""

import re
from difflib import SequenceMatcher

FENCED = re.compile(r"^```[^\n`]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def exact(said: str, wanted: str) -> float:
    """Equal but for white space around it."""
    return float(said.strip() == wanted.strip())


def contains(said: str, wanted: str) -> float:
    """The wanted text stands in the answer; an empty one stands nowhere."""
    return float(bool(wanted.strip()) and wanted.strip() in said)


def similarity(said: str, wanted: str) -> float:
    """Ratcliff and Obershelp's share of matching characters: 1 only where both are equal."""
    return SequenceMatcher(None, said.strip(), wanted.strip(), autojunk=False).ratio()


def fenced_code(said: str) -> str | None:
    """The last code block between lines of three backticks; None where there is none."""
    blocks = FENCED.findall(said)
    return blocks[-1] if blocks else None
