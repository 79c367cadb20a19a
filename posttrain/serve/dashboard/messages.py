"""A transcript's text as its messages, for the eye: who speaks, in which channel, and what."""

import re
from typing import NamedTuple

from posttrain.report.page import CONTROLS

HARMONY = re.compile(r"<\|start\|>|<\|end\|>|<\|call\|>|<\|return\|>")
"""Between messages of Harmony; a message's head ends at `<|message|>`."""
HEAD = re.compile(r"(?P<role>[^<]*)(?:<\|channel\|>(?P<channel>[^<]*))?(?:<\|constrain\|>[^<]*)?$")
GEMMA = re.compile(r"<start_of_turn>|<end_of_turn>\n?")


class Shown(NamedTuple):
    head: str
    """Role, channel and recipient, as they were written."""
    kind: str
    """What decides its colour: analysis, commentary, final, or the role."""
    text: str


def split(text: str, role: str = "") -> list[Shown]:
    """Messages in order; text of no known format is one message. `role`: who speaks where no one is named."""
    if "<|message|>" in text:
        return [_harmony(piece, role) for piece in HARMONY.split(text) if piece.strip()]
    if "<start_of_turn>" in text or "<end_of_turn>" in text:
        pieces = (piece for piece in GEMMA.split(text) if piece.strip())
        heads = ("user\n", "model\n")
        named = [piece.partition("\n") if piece.startswith(heads) else (role, "", piece) for piece in pieces]
        return [Shown(head, head or "text", said) for head, _, said in named]
    return [Shown(role, role or "text", text)] if text else []


def _harmony(piece: str, role: str) -> Shown:
    head, found, said = piece.partition("<|message|>")
    matched = HEAD.match(head) if found else None
    if matched is None:
        return Shown("", "text", piece)
    speaker, channel = matched["role"].strip() or role, (matched["channel"] or "").strip()
    first = channel.split(" ")[0]
    kind = first if first in ("analysis", "commentary", "final") else speaker.split(" ")[0] or "text"
    return Shown(f"{speaker} {channel}".strip(), kind, said)


def visible(text: str) -> str:
    """With pictures in place of control characters, which HTML does not allow."""
    return text.translate(CONTROLS)
