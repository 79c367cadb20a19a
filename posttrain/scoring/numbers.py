"""Numbers in answers, read as GSM8K marks them."""

import re

MARKED = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)")


def marked_number(text: str) -> float | None:
    """The number behind the last `####`; thousands may have commas."""
    found = MARKED.findall(text)
    return float(found[-1].replace(",", "")) if found else None
