"""The report of a run, rebuilt from its files: `report.html`, one file that needs nothing else, and `report.md`."""

import json
import re
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from posttrain.report import curves, training, words
from posttrain.report.document import Document, document, said
from posttrain.report.read import TRAINING_KINDS, read_run
from posttrain.report.text import markdown
from posttrain.run.folder import RunFolder, write_atomic

SPECIAL_TOKEN = re.compile(r"(<\|[A-Za-z0-9_]+\|>)")
LAST_REQUEST = re.compile(r"<\|start\|>user<\|message\|>((?:(?!<\|start\|>).)*?)<\|end\|>", re.DOTALL)
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
    curves_of = {phase.name: curves.phase_curves(phase) for phase in phases if phase.kind in TRAINING_KINDS}
    return _template().render(
        document=content,
        style=Markup((Path(__file__).parent / "page.css").read_text()),
        timeline=list(zip(phases, curves.timeline(phases), strict=True)),
        training=[(phase, panels) for phase in phases if (panels := curves_of.get(phase.name))],
        recipe_json=json.dumps(content.run.recipe, indent=2, ensure_ascii=False),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"words": words, "curves": curves, "training_of": training, "said": said}
    environment.filters |= {"transcript": transcript, "last_request": last_request}
    return environment.get_template("page.html.j2")


def transcript(text: str) -> Markup:
    """Tokens as a person reads them: special tokens dim, a new line before every message."""
    pieces: list[Markup] = []
    for piece in SPECIAL_TOKEN.split(text.translate(CONTROLS)):
        if SPECIAL_TOKEN.fullmatch(piece):
            if piece == "<|start|>" and any(pieces):
                pieces.append(Markup("<br>"))
            pieces.append(Markup('<span class="token">{}</span>').format(piece))
        else:
            pieces.append(escape(piece))
    return Markup("").join(pieces)


def last_request(prompt: str) -> str:
    """The last user message of a Harmony prompt on one line, cut to a glance; empty for other formats."""
    requests = LAST_REQUEST.findall(prompt)
    line = " ".join(requests[-1].split()) if requests else ""
    return line if len(line) <= 140 else line[:139] + "…"
