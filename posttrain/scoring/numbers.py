"""Numbers in answers, read as GSM8K marks them or wherever the last one stands."""

import re

NUMBER = r"-?[\d,]*\.?\d+"
MARKED = re.compile(rf"####\s*\$?({NUMBER})")
ANY = re.compile(rf"(?<![\w.,]){NUMBER}")


def marked_number(text: str) -> float | None:
    """The number behind the last `####`; thousands may have commas."""
    return _last(MARKED, text)


def last_number(text: str) -> float | None:
    """The last number of a text; thousands may have commas."""
    return _last(ANY, text)


def _last(pattern: re.Pattern[str], text: str) -> float | None:
    found = pattern.findall(text)
    return float(found[-1].replace(",", "")) if found else None
