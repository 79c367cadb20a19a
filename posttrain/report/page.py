"""The report of a run: `report.html`, one file that needs nothing else, and `report.md`, both rebuilt from the run's files."""

import json
import re
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from posttrain.report import curves, words
from posttrain.report.document import Document, document
from posttrain.report.read import TRAINING_KINDS, read_run
from posttrain.report.text import markdown
from posttrain.run.folder import RunFolder, write_atomic

SPECIAL_TOKEN = re.compile(r"(<\|[A-Za-z0-9_]+\|>)")
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
"""Control characters, which HTML does not allow, and the pictures that stand for them."""


def write_report(run: RunFolder) -> None:
    """Rebuild both files of `run`, each replaced atomically. Works on unfinished runs."""
    content = document(read_run(run))
    for name, text in (("report.html", page(content)), ("report.md", markdown(content))):
        # A model can write half a surrogate pair; no file can hold one.
        write_atomic(run.path / name, text.encode("utf-8", "replace"))


def page(content: Document) -> str:
    """The HTML file's text."""
    phases = content.run.phases
    return _template().render(
        document=content,
        style=Markup((Path(__file__).parent / "page.css").read_text()),
        timeline=list(zip(phases, curves.timeline(phases), strict=True)),
        training=[
            (phase, panels) for phase in phases if phase.kind in TRAINING_KINDS and (panels := curves.phase_curves(phase))
        ],
        recipe_json=json.dumps(content.run.recipe, indent=2, ensure_ascii=False),
    )


@cache
def _template():  # type: ignore[no-untyped-def]  # jinja2 caches by the file's time itself
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(words=words, curves=curves)
    environment.filters["transcript"] = transcript
    return environment.get_template("page.html.j2")


def transcript(text: str) -> Markup:
    """Tokens as a person reads them: special tokens dim, a new line before every message."""
    pieces = []
    for piece in SPECIAL_TOKEN.split(text.translate(CONTROLS)):
        if SPECIAL_TOKEN.fullmatch(piece):
            kind = "token start" if piece == "<|start|>" else "token"
            pieces.append(Markup('<span class="{}">{}</span>').format(kind, piece))
        else:
            pieces.append(escape(piece))
    return Markup("").join(pieces)
