"""The messages of docs/troubleshooting.md are those of the code: each is an instance of a text that stands in it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
ENOUGH = 0.3
"""Share of a message's characters that must be the code's own; the rest is what it was filled with."""


def documented() -> list[str]:
    cells = (line.split(" | ")[0] for line in PAGE.splitlines() if line.startswith("| `"))
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


def texts(path: Path) -> Iterator[list[str]]:
    """The fixed parts of every string of a module, in order."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield [part.value for part in node.values if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield [part for part in re.split(r"\{[^}]*\}", node.value) if part]


FILES = [*(ROOT / "posttrain").rglob("*.py"), *Path(str(click.__file__)).parent.glob("*.py")]
TEMPLATES = [parts for path in FILES for parts in texts(path)]


def covered(message: str, parts: list[str], cut_off: bool) -> int:
    """Characters of the message that are the template's, 0 where it is no instance; either may end before the other."""
    at = count = 0
    for part in parts:
        part = part.split("\n")[0]
        found = message.find(part, at)
        if found >= 0:
            at, count = found + len(part), count + len(part)
            continue
        begun = next((size for size in range(len(part), 0, -1) if message.endswith(part[:size])), 0)
        return count + begun if cut_off or begun > 1 or at == len(message) else 0
    return count


def share(message: str) -> float:
    """Of the message, in the template that has most of it."""
    whole = re.sub(r"\s*(\.\.\.|…)[^a-z]*$", "", message)
    return max(covered(whole, parts, whole != message) for parts in TEMPLATES) / len(whole)


@pytest.mark.parametrize("message", documented())
def test_a_documented_message_is_the_codes_own(message: str) -> None:
    assert share(message) >= ENOUGH


@pytest.mark.parametrize(
    "wrong", ["the disc is replete: writing FILE failed", "run 'x' was made by a different cook", "there is no rum"]
)
def test_another_message_would_be_found_out(wrong: str) -> None:
    assert share(wrong) < ENOUGH
