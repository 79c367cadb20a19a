"""The `posttrain` command: names of the commands and where they live; nothing is imported until it is needed."""

import errno
import importlib
import sys
from typing import Any

import click

from posttrain.errors import MachineError, PosttrainError, Stopped

COMMANDS = {
    "run": ("Start a recipe's run, or continue it.", "posttrain.cli.run_command:run"),
    "resume": ("Continue a run from its stored recipe.", "posttrain.cli.resume:resume"),
    "start": ("The same in a session that outlives the shell.", "posttrain.cli.start:start"),
    "attach": ("Attach to a run that was started detached.", "posttrain.cli.attach:attach"),
    "stop": ("Stop a run; it can be continued.", "posttrain.cli.stop:stop"),
    "doctor": ("Check this machine, and what a recipe needs of it.", "posttrain.cli.doctor:doctor"),
    "plan": ("Show what would run, and what it needs.", "posttrain.cli.plan:plan"),
    "status": ("Show where a run stands.", "posttrain.cli.status:status"),
    "logs": ("Print the log of a run's last attempt.", "posttrain.cli.logs:logs"),
    "report": ("Rebuild a run's report from its files.", "posttrain.cli.report:report"),
    "eval": ("Ask an evaluation set of a model and score the answers.", "posttrain.cli.eval:eval_command"),
    "generate": ("Answer the prompts of a file.", "posttrain.cli.generate:generate"),
    "export": ("Write a run's best model, or a model folder, in other formats.", "posttrain.cli.export:export"),
    "push": ("Put an export on the hub, with a model card; private unless told.", "posttrain.cli.push:push"),
    "chat": ("Talk to a run's result in the terminal.", "posttrain.cli.chat:chat"),
    "data": ("Build, look at and export datasets.", "posttrain.cli.data:data"),
    "render": ("Show conversations as tokens and what is learned of them.", "posttrain.cli.render:render"),
    "sandbox": ("Check the sandbox, or run a program in it.", "posttrain.cli.sandbox:sandbox"),
    "serve": ("Serve runs, data and models over HTTP.", "posttrain.cli.serve:serve"),
    "schema": ("Print the JSON schema of recipes.", "posttrain.cli.schema:schema"),
}


class LazyGroup(click.Group):
    """Lists commands from their one-line helps; imports only the one that is called."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][1].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(self, context: click.Context, words: list[str]) -> Any:
        if words and words[0] not in COMMANDS:
            from posttrain.recipe.spelling import did_you_mean

            near = did_you_mean(words[0], COMMANDS)
            context.fail(f"there is no command {words[0]!r}{near}; commands: {', '.join(COMMANDS)}")
        return super().resolve_command(context, words)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (text, _) in COMMANDS.items()])

    def invoke(self, context: click.Context) -> Any:
        from posttrain.host.environment import prepare

        try:
            prepared = context.obj = prepare()
            if prepared.problem:
                click.echo(f"warning: {prepared.problem}; they stay where they were", err=True)
            return super().invoke(context)
        except PosttrainError as error:
            sys.stdout.flush()
            click.echo(str(error) if isinstance(error, Stopped) else f"error: {error}", err=True)
            context.exit(error.exit_code)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # click ends quietly when nobody reads on
            sys.stdout.flush()
            click.echo(f"error: {error}", err=True)
            context.exit(MachineError.exit_code)


def _print_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from posttrain import __version__

        click.echo(f"posttrain {__version__}")
        context.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show it.")
def main() -> None:
    """Post-training of open-weight chat models: data, SFT, preference, RL, export and report in one command.

    \b
    Begin with:  posttrain run quickstart
    Exit codes:  0 done, 1 fault in the run, 2 bad input, 3 hard gate, 4 stopped and resumable, 5 machine lacks a thing
    """
