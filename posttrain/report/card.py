"""A model card made from a run: front matter for the hub, then what the report says, all from the run's files."""

import json
from pathlib import Path

from posttrain.report.document import document
from posttrain.report.read import read_run
from posttrain.report.text import fenced, markdown
from posttrain.run.folder import RunFolder

LICENCES = (("Apache License", "apache-2.0"), ("MIT License", "mit"))
"""First words of licence texts, and the hub's names for them."""


def model_card(run: RunFolder, folder: Path, base: Path, base_name: str) -> str:
    """The card of the export in `folder`: licence of the base, the report's tables, the recipe."""
    record = read_run(run)
    front = ["---", f"license: {licence(base)}", f"base_model: {json.dumps(base_name)}"]
    front += ["library_name: gguf" if list(folder.glob("*.gguf")) else "library_name: transformers"]
    front += ["pipeline_tag: text-generation", "tags: [posttrain]", "---", ""]
    recipe = json.dumps(record.recipe, indent=2, ensure_ascii=False)
    return "\n".join([*front, markdown(document(record)), "## Recipe", "", *fenced(recipe)]).rstrip() + "\n"


def licence(base: Path) -> str:
    """The hub's name for the base's licence, `other` where its text is another, `unknown` where it has none."""
    for file in sorted(base.glob("LICENSE*")):
        opening = file.read_text(errors="replace")[:200]
        return next((name for words, name in LICENCES if words in opening), "other")
    return "unknown"
