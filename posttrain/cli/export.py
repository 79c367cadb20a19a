"""`posttrain export RUN|DIR`: a model in the formats that programs load, planned, written and verified."""

from pathlib import Path

import click

from posttrain.cli.options import existing_run, runs_dir_option
from posttrain.errors import InputError
from posttrain.run.folder import RunFolder


def _export(
    target: str,
    runs_dir: Path,
    formats: str,
    gguf: str,
    dtype: str,
    base: Path | None,
    output: Path | None,
    dry_run: bool,
    verify: bool,
    threads: int,
) -> None:
    run, folder = source(target, runs_dir)
    from posttrain.cli.screen import TerminalScreen
    from posttrain.export.formats import FORMATS, parse_formats
    from posttrain.export.gguf_types import GGUF_TYPES
    from posttrain.phases.export_command import chosen_of_folder, chosen_of_run, export

    chosen_formats = parse_formats(formats, FORMATS, "--formats")
    gguf_types = parse_formats(gguf, GGUF_TYPES, "--gguf")
    if run is not None:
        chosen = chosen_of_run(run)
        place = output or run.path / "exports"
    else:
        chosen = chosen_of_folder(folder, base)
        place = output or folder.with_name(f"{folder.name}-exports")
    screen = TerminalScreen()
    export(chosen, chosen_formats, dtype, gguf_types, place, dry_run, verify, threads, screen.say, screen.progress)


def source(target: str, runs_dir: Path) -> tuple[RunFolder | None, Path]:
    """The run, or the model or adapter folder, that a word on the command line means."""
    folder = Path(target)
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return None, folder
    if folder.is_dir() and "/" in target and not (folder / "recipe.json").is_file():
        raise InputError(
            f"{target} is neither a run nor a model: it has no recipe.json, config.json or adapter_config.json"
        )
    run = existing_run(target, runs_dir.absolute())
    return run, run.path


export = click.Command(
    "export",
    callback=_export,
    params=[
        click.Argument(["target"], metavar="RUN|DIR"),
        runs_dir_option(),
        click.Option(
            ["--formats"], default="hf", show_default=True, help="hf, mxfp4, gguf, ollama, adapter: any of them."
        ),
        click.Option(
            ["--gguf"],
            default="auto",
            show_default=True,
            help="Types of GGUF files: f32, f16, bf16, q8_0, q4_0, q4_k_m, mxfp4, auto.",
        ),
        click.Option(
            ["--dtype"],
            type=click.Choice(["bfloat16", "float32"]),
            default="bfloat16",
            show_default=True,
            help="Of hf.",
        ),
        click.Option(["--base"], type=click.Path(path_type=Path, file_okay=False), help="Base of an adapter folder."),
        click.Option(
            ["--output"],
            type=click.Path(path_type=Path, file_okay=False),
            help="Where to write.  [default: exports/ of the run, or DIR-exports]",
        ),
        click.Option(["--dry-run"], is_flag=True, help="Only say what would be written, how large and how long."),
        click.Option(
            ["--verify/--no-verify"], default=False, help="Compare every format with the adapter it came from."
        ),
        click.Option(["--threads"], type=int, default=2, show_default=True, help="Threads of the arithmetic."),
    ],
    help="Write a run's best model, or a model or adapter folder, in the formats that programs load.",
)
