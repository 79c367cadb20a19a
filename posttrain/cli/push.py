"""`posttrain push RUN --repo OWNER/NAME`: an export and its model card to the hub; asked first, private unless told."""

from pathlib import Path

import click

from posttrain.cli.options import existing_run, run_argument, runs_dir_option
from posttrain.errors import InputError
from posttrain.run.folder import RunFolder, shortest


def _push(run_name: str, runs_dir: Path, repo: str, exported: str, public: bool, yes: bool) -> None:
    run = existing_run(run_name, runs_dir.absolute())
    folder = exported_folder(run, exported)
    from posttrain.export.hub import plan_push, push
    from posttrain.report.card import model_card
    from posttrain.run import recipe_file

    base = recipe_file.load(run.recipe).base
    base_name = base.path if base.kind == "folder" else "a fresh model"
    card = model_card(run, folder, run.model_folder(base_name), base_name)
    plan = plan_push(folder, repo, public, card)
    for line in plan.lines():
        print(line)
    if not yes and not click.confirm("push this?", default=False):
        print("nothing was pushed")
        return
    from huggingface_hub import HfApi

    push(plan, HfApi(), print)


def exported_folder(run: RunFolder, name: str) -> Path:
    """The run's export of that name, by command or by phase; the newest where there are several."""
    places = [run.path / "exports", *(run.path / "phases").glob("*/exports")]
    found = {folder for place in places if place.is_dir() for folder in place.iterdir() if folder.is_dir()}
    named = sorted((folder for folder in found if folder.name == name), key=lambda folder: folder.stat().st_mtime)
    if not named:
        known = sorted({folder.name for folder in found if not folder.name.startswith(".")})
        raise InputError(
            f"run {run.path.name} has no export {name!r}; it has {', '.join(known) or 'none'}: "
            f"posttrain export {run.words} --formats ..., then push, with --export one of its folders"
        )
    return shortest(named[-1])


push = click.Command(
    "push",
    callback=_push,
    params=[
        run_argument(),
        runs_dir_option(),
        click.Option(["--repo"], required=True, metavar="OWNER/NAME", help="Repository on the hub."),
        click.Option(["--export", "exported"], default="hf", show_default=True, help="Which exported folder."),
        click.Option(["--public"], is_flag=True, help="Let anyone read it.  [default: private]"),
        click.Option(["--yes"], is_flag=True, help="Do not ask before pushing."),
    ],
    help="Put an exported folder with a model card made from the run on the hub; private unless told.",
)
