"""`posttrain generate --model X --prompts FILE`: one answer to each prompt, as JSON lines."""

import json
from pathlib import Path
from typing import Any

import click

from posttrain.cli.models import chosen_model, execution_given, model_options, sampling_options, where_options
from posttrain.cli.options import runs_dir_option
from posttrain.errors import DataError


def _generate(model: str, prompts: Path, output: Path | None, **given: Any) -> None:
    if output is not None and output.exists():
        raise DataError(f"{output} exists and is not overwritten; choose another name or remove it")
    from posttrain.phases.generate_command import generate, prompts_of
    from posttrain.recipe.types import Sampling
    from posttrain.run.folder import write_lines_atomic

    asked = prompts_of(prompts)
    chosen, _ = chosen_model(model, given)
    sampling = Sampling(
        temperature=given["temperature"] or 0.0,
        top_p=given["top_p"] or 1.0,
        top_k=given["top_k"],
        max_new_tokens=given["max_new_tokens"] or 512,
        max_turns=1,
    )
    answers = generate(chosen, asked, sampling, given["seed"], given["precision"], execution_given(given))
    lines = (json.dumps(answer, ensure_ascii=False) for answer in answers)
    if output is None:
        for line in lines:
            print(line)
    else:
        print(f"{write_lines_atomic(output, lines):,} answers written to {output}")


generate = click.Command(
    "generate",
    callback=_generate,
    params=[
        click.Option(
            ["--model"], required=True, metavar="RUN|MODEL", help="A run, a model or adapter folder, a hub id."
        ),
        *model_options(),
        runs_dir_option(),
        click.Option(
            ["--prompts"],
            required=True,
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="A prompt per line (.txt), or records with prompt or messages (.jsonl, .csv, .parquet).",
        ),
        click.Option(["--output"], type=click.Path(path_type=Path, dir_okay=False), help="File; else standard output."),
        *sampling_options(temperature="0", top_p="1", max_new_tokens="512"),
        *where_options(),
    ],
    help="Write one answer to each prompt of a file, from any model state.",
)
