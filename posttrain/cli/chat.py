"""`posttrain chat RUN`: talk to a run's result."""

from pathlib import Path

import click

from posttrain.cli.options import existing_run, run_argument, runs_dir_option


def _chat(run_name: str, runs_dir: Path, state: str | None) -> None:
    run = existing_run(run_name, runs_dir.absolute())
    from posttrain.rollout.chat import chat as talk

    talk(run, state)


chat = click.Command(
    "chat",
    callback=_chat,
    params=[
        run_argument(),
        runs_dir_option(),
        click.Option(["--state"], metavar="PHASE", help="The model state of this phase.  [default: the best one]"),
    ],
    help="Talk to a run's result in the terminal.",
)
