"""The Dockerfile of a GPU box names things that there are. It is not built here: there is no Docker."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from posttrain.cli.main import main

ROOT = Path(__file__).parents[2]
KNOWN = {"FROM", "ENV", "RUN", "COPY", "WORKDIR", "VOLUME", "CMD"}
LINES = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
INSTRUCTIONS = [
    tuple(line.split(" ", 1)) for line in re.sub(r"\\\n\s*", " ", "\n".join(LINES)).splitlines() if line.strip()
]


def of(kind: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == kind]


def test_it_parses_and_every_image_has_a_tag() -> None:
    assert {name for name, _ in INSTRUCTIONS} == KNOWN and INSTRUCTIONS[0][0] == "FROM"
    assert all(re.match(r"[\w/]+:[\w.-]+( AS \w+)?$", image) for image in of("FROM"))


def test_what_is_copied_is_there_and_is_what_an_installation_needs() -> None:
    own = [words.split()[:-1] for words in of("COPY") if "--from" not in words]
    names = [name for words in own for name in words]
    assert all((ROOT / name).exists() for name in names)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", project["readme"], "constraints.txt", "posttrain"} == set(names)
    stages = {image.partition(" AS ")[2] for image in of("FROM")}
    assert set(re.findall(r"--from=(\w+)", " ".join(of("COPY")))) <= stages


def test_extras_and_packages_of_python_and_node_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [(extras, others)] = re.findall(r'pip install -c constraints\.txt "\.\[([\w,]+)\]" ([\w ]+)', " ".join(of("RUN")))
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    constraints = (ROOT / "constraints.txt").read_text()
    assert all(re.search(rf"^{name}==", constraints, re.MULTILINE) for name in others.split())
    wanted = re.search(r"^NODE_PACKAGES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert wanted
    # The tokenizer is an oracle of the tests alone.
    node = {name for name in wanted[1].split() if not name.startswith("gpt-tokenizer")}
    assert set(re.findall(r"[\w-]+@[\d.]+", " ".join(of("RUN")))) == node


def test_every_variable_is_one_that_something_reads() -> None:
    names = re.findall(r"\b(POSTTRAIN_\w+)=", " ".join(of("ENV")))
    code = "".join(path.read_text() for path in (ROOT / "posttrain").rglob("*.py"))
    assert names and all(f'"{name}"' in code for name in names)


def test_every_debian_package_exists() -> None:
    if shutil.which("apt-cache") is None:
        pytest.skip("apt-cache is missing: this is no Debian")
    [names] = re.findall(r"install -y --no-install-recommends\s+([\w\s.+-]+?)\s*&&", " ".join(of("RUN")))
    if subprocess.run(["apt-cache", "show", "bash"], capture_output=True).returncode:
        pytest.skip("the package lists are missing (apt-get update)")
    shown = subprocess.run(["apt-cache", "show", "--no-all-versions", *names.split()], capture_output=True, text=True)
    missing = set(names.split()) - set(re.findall(r"^Package: (.+)$", shown.stdout, re.MULTILINE))
    assert not missing


def test_its_command_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.Command.invoke", lambda self, context: None)
    [words] = map(json.loads, of("CMD"))
    assert words[0] == "posttrain" and CliRunner().invoke(main, words[1:]).exit_code == 0
