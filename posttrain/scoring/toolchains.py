"""One row per language: the commands that check a source tree, their limits, and where the tools lie."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from posttrain.errors import MachineError, ScoringError
from posttrain.run.redaction import without_secrets
from posttrain.sandbox.slots import Budget, Room
from posttrain.scoring import drivers

NODE_MODULES = "POSTTRAIN_NODE_MODULES"
"""Environment variable: the node_modules folder that holds typescript, eslint and typescript-eslint."""


@dataclass(frozen=True)
class Step:
    """A command in the tree; `{name}` stands for the places that the row's `find` gives."""

    argv: tuple[str, ...]
    budget: Budget


@dataclass(frozen=True)
class Found:
    """Where the tools lie on this machine, and what must be seen of it to use them."""

    places: dict[str, str]
    roots: tuple[str, ...]
    path: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Toolchain:
    language: str
    install: str
    find: Callable[[], Found | str]
    """The tools, or the name of the one that is missing."""
    compile: tuple[Step, ...]
    suite: tuple[Step, ...]
    """What the tree's own tests need, and the tests. Their outcome is for the model to read and for code of ours
    (mutants, recorded fixes); it is no part of a score: a program that runs in the same process can write it."""
    lint: tuple[Step, ...]
    driver: Callable[[drivers.Files, Sequence[str]], drivers.Driver]
    run: Budget
    protected: str
    """Names that a model's edit may not touch: tests, and files that change what the tools do."""
    generated: dict[str, str]
    """Files of ours that the tools need."""
    room: Room


def _budget(wall_s: float, memory_gib: float = 2.0, processes: int = 64, cpu_s: int | None = None) -> Budget:
    return Budget(
        wall_s=wall_s,
        cpu_s=cpu_s or int(wall_s),
        memory_bytes=int(memory_gib * 2**30),
        file_bytes=2**28,
        open_files=1024,
        processes=processes,
        output_bytes=2**18,
    )


def _find_python() -> Found | str:
    packages, scripts = sysconfig.get_path("purelib"), str(Path(sys.executable).parent)
    ruff = shutil.which("ruff", path=scripts) or shutil.which("ruff")
    missing = [name for name in ("pytest", "mypy") if not Path(packages, name).is_dir()]
    if missing or ruff is None:
        return (missing or ["ruff"])[0]
    home = os.path.realpath(sys.base_prefix)
    python = home + "/" + os.path.relpath(os.path.realpath(sys.executable), home)
    return Found(
        {"python": python, "ruff": os.path.realpath(ruff)},
        (home, packages, os.path.realpath(ruff)),
        (),
        {"PYTHONPATH": packages, "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )


def _find_rust() -> Found | str:
    """The toolchain's own folder: rustup's proxies need a home folder, which the sandbox does not show."""
    for name in ("cargo", "rustc"):
        if shutil.which(name) is None:
            return name
    asked = subprocess.run(
        ["rustc", "--print", "sysroot"], capture_output=True, text=True, check=False, env=without_secrets()
    )
    sysroot = asked.stdout.strip()
    if asked.returncode or not sysroot:
        return "rustc"
    if not any(Path(folder, "cargo-clippy").exists() for folder in (f"{sysroot}/bin", "/usr/bin")):
        return "cargo-clippy"
    environment = {"CARGO_HOME": "/nonexistent", "CARGO_NET_OFFLINE": "true", "CARGO_TERM_COLOR": "never"}
    return Found({}, () if sysroot == "/usr" else (sysroot,), (f"{sysroot}/bin",), environment)


def _find_go() -> Found | str:
    go = shutil.which("go")
    if go is None:
        return "go"
    asked = subprocess.run([go, "env", "GOROOT"], capture_output=True, text=True, check=False, env=without_secrets())
    root = os.path.realpath(asked.stdout.strip())
    environment = {"GOPROXY": "off", "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", "CGO_ENABLED": "0"}
    roots = [root, *(folder for folder in ("/usr/share/go-1.19",) if os.path.isdir(folder))]
    return Found({}, tuple(one for one in roots if not one.startswith("/usr/")), (f"{root}/bin",), environment)


def _find_typescript() -> Found | str:
    node = shutil.which("node")
    if node is None:
        return "node"
    modules = os.environ.get(NODE_MODULES, "")
    if not modules and shutil.which("npm"):
        modules = subprocess.run(
            ["npm", "root", "-g"], capture_output=True, text=True, check=False, env=without_secrets()
        ).stdout.strip()
    modules = os.path.realpath(modules) if modules else ""
    for name in ("typescript", "eslint", "typescript-eslint"):
        if not modules or not Path(modules, name).is_dir():
            return name
    node = os.path.realpath(node)
    roots = [modules] if node.startswith("/usr/") else [modules, str(Path(node).parents[1])]
    return Found({"node": node, "modules": modules}, tuple(roots), (), {})


_PYTEST = ("-x", "-q", "--tb=short", "--no-header", "-p", "no:cacheprovider", "-o", "pythonpath=. src")
_EMIT = (*drivers.TSC, "--rootDir", ".", "--outDir", ".built")
_ESLINT = """\
import ts from "{modules}/typescript-eslint/dist/index.js";
export default ts.config(...ts.configs.recommended, { ignores: [".built/**", "posttrain_*", "eslint.config.mjs"] });
"""

TOOLCHAINS = {
    "python": Toolchain(
        language="python",
        install="pip install 'posttrain[code]'",
        find=_find_python,
        compile=(Step(("{python}", "-P", "-m", "compileall", "-q", "."), _budget(10)),),
        suite=(Step(("{python}", "-P", "-m", "pytest", *_PYTEST), _budget(120)),),
        lint=(
            Step(("{ruff}", "check", "--isolated", "--no-cache", "."), _budget(30)),
            Step(
                ("{python}", "-P", "-m", "mypy", "--config-file=", "--cache-dir=/dev/null", "."),
                _budget(60),
            ),
        ),
        driver=drivers.python,
        run=_budget(30, memory_gib=1.0, cpu_s=10),
        protected=r"(.*/)?(test_.*|.*_test\.py|tests/.*|conftest\.py|sitecustomize\.py|usercustomize\.py|pytest\.ini"
        r"|tox\.ini|setup\.cfg|setup\.py|pyproject\.toml|mypy\.ini|\.mypy\.ini|ruff\.toml|\.ruff\.toml|.*\.pth"
        r"|posttrain_driver.*)",
        generated={},
        room=Room(bytes=2**28),
    ),
    "rust": Toolchain(
        language="rust",
        install="apt-get install cargo rust-clippy, or https://rustup.rs",
        find=_find_rust,
        compile=(Step(("cargo", "check", "--offline", "-q"), _budget(60)),),
        # One thread: what the tests print comes in one order.
        suite=(Step(("cargo", "test", "--offline", "-q", "--", "--test-threads=1"), _budget(120)),),
        lint=(Step(("cargo", "clippy", "--offline", "-q", "--", "-D", "warnings"), _budget(60)),),
        driver=drivers.rust,
        run=_budget(30, memory_gib=1.0, cpu_s=10),
        protected=r"(tests/.*|benches/.*|examples/posttrain_driver.*|build\.rs|\.cargo/.*|Cargo\.(toml|lock)"
        r"|rust-toolchain.*|\.?clippy\.toml|target/.*)",
        generated={},
        room=Room(bytes=2**29),
    ),
    "typescript": Toolchain(
        language="typescript",
        install="apt-get install nodejs npm, then npm install -g typescript eslint typescript-eslint",
        find=_find_typescript,
        compile=(Step(("{node}", "{modules}/typescript/bin/tsc", "--noEmit", *drivers.TSC, "{sources}"), _budget(30)),),
        # The tests' own types need packages that are not there.
        suite=(
            Step(("{node}", "{modules}/typescript/bin/tsc", "--noCheck", *_EMIT, "{everything}"), _budget(30)),
            Step(("{node}", "--test", "--test-reporter=spec", ".built/"), _budget(300)),
        ),
        lint=(Step(("{node}", "{modules}/eslint/bin/eslint.js", "--max-warnings", "0", "."), _budget(30)),),
        driver=drivers.typescript,
        run=_budget(30, memory_gib=1.0, cpu_s=10),
        protected=r"(.*\.(test|spec)\.[cm]?[jt]s|tests?/.*|eslint\.config\..*|tsconfig.*\.json|package(-lock)?\.json"
        r"|node_modules/.*|\.npmrc|posttrain_driver.*|\.built/.*)",
        generated={"eslint.config.mjs": _ESLINT, "package.json": '{"type": "module"}\n'},
        room=Room(bytes=2**28),
    ),
    "go": Toolchain(
        language="go",
        install="apt-get install golang-go, or https://go.dev/dl",
        find=_find_go,
        compile=(Step(("go", "build", "./..."), _budget(30)),),
        suite=(Step(("go", "test", "./..."), _budget(300)),),
        lint=(Step(("go", "vet", "./..."), _budget(30)),),
        driver=drivers.go,
        run=_budget(30, memory_gib=1.0, cpu_s=10),
        protected=r"(.*_test\.go|go\.(mod|sum|work)|vendor/.*|posttrain_driver.*|testdata/.*)",
        generated={},
        room=Room(bytes=2**29),
    ),
}


@cache
def _search(language: str) -> Found | str:
    return TOOLCHAINS[language].find()


def missing(language: str) -> str | None:
    """What this machine lacks for a language, with how to install it."""
    found = _search(language)
    return f"{language} needs {found}: {TOOLCHAINS[language].install}" if isinstance(found, str) else None


def found(language: str) -> Found:
    """MachineError where a tool is missing, with how to install it."""
    if language not in TOOLCHAINS:
        raise ScoringError(f"no evaluator for {language!r}; there are {', '.join(TOOLCHAINS)}")
    tools = _search(language)
    if isinstance(tools, str):
        raise MachineError(missing(language))
    return tools
