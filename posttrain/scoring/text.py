"""Answers in words: equal, contained, or how alike."""

from difflib import SequenceMatcher


def exact(said: str, wanted: str) -> float:
    """Equal but for white space around it."""
    return float(said.strip() == wanted.strip())


def contains(said: str, wanted: str) -> float:
    """The wanted text stands in the answer; an empty one stands nowhere."""
    return float(bool(wanted.strip()) and wanted.strip() in said)


def similarity(said: str, wanted: str) -> float:
    """Ratcliff and Obershelp's share of matching characters: 1 only where both are equal."""
    return SequenceMatcher(None, said.strip(), wanted.strip(), autojunk=False).ratio()
