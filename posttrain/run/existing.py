"""Runs that exist, by name."""

from pathlib import Path

from posttrain.errors import RunFolderError
from posttrain.recipe.spelling import did_you_mean
from posttrain.run.folder import RunFolder


def run_named(name: str, runs_dir: Path) -> RunFolder:
    """The run called `name` in `runs_dir`; RunFolderError with near names when there is none."""
    run = RunFolder.named(runs_dir, name)
    if not run.recipe.is_file():
        names = run_names(runs_dir)
        raise RunFolderError(
            f"there is no run {name!r} in {runs_dir}{did_you_mean(name, names)}; "
            f"runs there: {', '.join(names[:12]) or 'none'}"
        )
    return run


def run_names(runs_dir: Path) -> list[str]:
    return sorted(path.parent.name for path in runs_dir.glob("*/recipe.json"))
