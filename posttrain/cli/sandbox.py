"""`posttrain sandbox check` and `posttrain sandbox run FILE`."""

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import click

from posttrain.errors import InputError, MachineError
from posttrain.sandbox import level
from posttrain.sandbox.confine import LADDER
from posttrain.sandbox.slots import Budget, Finished, Pool, Room
from posttrain.scoring.toolchains import TOOLCHAINS, Found, found

LANGUAGES = {".go": "go", ".rs": "rust"}
COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    ".py": (("{python}", "-P", "program.py"),),
    ".sh": (("sh", "program.sh"),),
    ".js": (("node", "program.js"),),
    ".mjs": (("node", "program.mjs"),),
    ".go": (("go", "run", "program.go"),),
    ".rs": (("rustc", "-o", "program", "program.rs"), ("./program",)),
}


@click.group()
def sandbox() -> None:
    """Check the sandbox, or run a program in it."""


@sandbox.command()
def check() -> None:
    """Try every level, and say which one is used."""
    results = [level.probe(name) for name in LADDER]
    used = next((result.level for result in results if result.works), None)
    for result in results:
        mark = "used" if result.level == used else "works" if result.works else "no"
        click.echo(f"{result.level:14} {mark:6} {result.reason}")
    if used is None:
        level.chosen()  # says why, and what can be done


@sandbox.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--sandbox", "wanted", type=click.Choice(level.CHOICES), default=level.AUTO, show_default=True)
@click.option("--wall-s", type=click.FloatRange(min=0.1), default=30.0, show_default=True, help="Seconds it may take.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of what the program prints.")
def run(file: Path, wanted: str, wall_s: float, as_json: bool) -> None:
    """Run a program of one file (Python, shell, JavaScript, Go or Rust, by its ending) in the sandbox.

    Ends with the program's exit code, with 1 where a signal or a limit ended it; with --json, with 0.
    """
    if file.suffix not in COMMANDS:
        raise InputError(f"{file}: what runs a {file.suffix or 'file without an ending'}? known: {', '.join(COMMANDS)}")
    level.use(wanted)
    used = level.chosen()
    done = _run(file, used, wall_s)
    if as_json:
        texts = {name: getattr(done, name).decode(errors="replace") for name in ("stdout", "stderr", "answers")}
        click.echo(json.dumps({"level": used, **asdict(done), **texts}))
        return
    for stream, data in ((sys.stdout, done.stdout), (sys.stderr, done.stderr)):
        stream.buffer.write(data)
        stream.flush()
    if done.limit is not None:
        click.echo(f"ended by the sandbox: {done.limit}", err=True)
    sys.exit(done.exit if done.exit >= 0 and done.limit is None else 1)


def _run(file: Path, used: str, wall_s: float) -> Finished:
    tools = _tools(file.suffix)
    budget = Budget(wall_s=wall_s, cpu_s=max(1, int(wall_s)), memory_bytes=2**31, open_files=1024)
    with Pool(used, 1) as pool, pool.session(Room(tools.roots)) as session:
        session.write({f"program{file.suffix}": file.read_bytes()})
        path = ":".join([*map(session.place, tools.path), "/usr/local/bin:/usr/bin:/bin"])
        done = None
        for command in COMMANDS[file.suffix]:
            words = [session.place(tools.places.get(word.strip("{}"), word)) for word in command]
            done = session.run(words, budget, {**tools.environment, "PATH": path})
            if done.exit != 0:
                break
        assert done is not None
        return done


def _tools(suffix: str) -> Found:
    """Where what runs the program lies; Python is the one that we run in, without its packages."""
    if suffix == ".py":
        home = os.path.realpath(sys.base_prefix)
        python = home + "/" + os.path.relpath(os.path.realpath(sys.executable), home)
        return Found({"python": python}, (home,), (), {})
    program = COMMANDS[suffix][0][0]
    if suffix in LANGUAGES:
        return found(LANGUAGES[suffix])
    place = shutil.which(program)
    if place is None:
        raise MachineError(f"{program} is missing; {TOOLCHAINS['typescript'].install}")
    place = os.path.realpath(place)
    roots = () if place.startswith("/usr/") else (str(Path(place).parents[1]),)
    return Found({}, roots, (str(Path(place).parent),), {})
