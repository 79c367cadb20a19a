"""What this machine has for a recipe, checked for real: each answer with the command that mends it."""

import importlib.util
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from posttrain.data.hub import MIRROR, mirrored
from posttrain.errors import MachineError
from posttrain.host import machine
from posttrain.host.environment import Prepared
from posttrain.host.sessions import KINDS
from posttrain.pipeline.base import on_this_machine
from posttrain.pipeline.plan import plan_run
from posttrain.recipe.types import Execution, HubBase, HubSource, PreparePhase, Recipe
from posttrain.run.folder import RunFolder
from posttrain.sandbox import level
from posttrain.scoring import toolchains

Status = Literal["ok", "warning", "failure"]
TORCH_RANGE = ((2, 11), (2, 14))
"""From the first on, below the second."""
LITTLE_DISK_BYTES = 5 * 10**9
PORT = 8000


@dataclass(frozen=True)
class Check:
    name: str
    status: Status
    said: str
    mend: str = ""
    """The command, or what else to do."""


def examine(
    prepared: Prepared, run: RunFolder, recipe: Recipe | None, execution: Execution, port: int
) -> Iterator[Check]:
    """One check after another; the network is asked only about what the recipe needs from it."""
    yield _torch()
    yield _gpu(execution)
    yield from _kernels()
    yield _workspace(prepared)
    yield from _disk(run)
    yield _token(prepared)
    if recipe is not None:
        yield from _access(recipe)
        yield from _needs(run, recipe, execution)
    yield from (_toolchain(language) for language in toolchains.TOOLCHAINS)
    yield _sandbox(execution)
    yield _session()
    yield _port(port)


# ---------------------------------------------------------------- the machine


def _torch() -> Check:
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return Check("torch", "failure", "it is not installed", "pip install 'torch>=2.11,<2.14'")
    build = torch_build()
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    said = f"{version}, built for {build}"
    if not TORCH_RANGE[0] <= numbers < TORCH_RANGE[1]:
        return Check("torch", "failure", f"{said}; supported is >=2.11,<2.14", "pip install 'torch>=2.11,<2.14'")
    if machine.gpus() and build == "the CPU":
        mend = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
        return Check("torch", "failure", f"{said}, and this machine has a GPU", mend)
    return Check("torch", "ok", said)


def torch_build() -> str:
    """`the CPU`, or CUDA's version, read from the package's own file: importing it takes seconds."""
    found = importlib.util.find_spec("torch")
    text = Path(str(found.origin)).with_name("version.py").read_text() if found and found.origin else ""
    cuda = re.search(r"^cuda(?:: [^=]+)? = '([\d.]+)'", text, re.MULTILINE)
    return f"CUDA {cuda[1]}" if cuda else "the CPU"


def _gpu(execution: Execution) -> Check:
    found = machine.gpus()
    if execution.gpu_ranks is not None and max(map(int, execution.gpu_ranks.split(","))) >= len(found):
        mend = (
            f"choose --gpu-ranks below {len(found)}"
            if found
            else "leave --gpu-ranks out, or go to a machine with a GPU"
        )
        return Check("GPU", "failure", f"--gpu-ranks {execution.gpu_ranks}: this machine has {len(found)}", mend)
    if not found:
        if shutil.which("nvidia-smi"):
            return Check("GPU", "failure", "nvidia-smi is there and lists none", "nvidia-smi  # says why")
        return Check("GPU", "warning", "none: the tiny recipes run on the CPU, large ones need one", "rent one")
    shown = "; ".join(
        f"{gpu.name}, {gpu.memory_bytes / 1e9:.0f} GB ({gpu.free_bytes / 1e9:.0f} free), driver {gpu.driver}, "
        f"capability {gpu.capability}"
        for gpu in found
    )
    busy = [str(number) for number, gpu in enumerate(found) if gpu.free_bytes < 0.9 * gpu.memory_bytes]
    if busy:
        return Check("GPU", "warning", f"{shown}; in use: {', '.join(busy)}", "nvidia-smi  # lists the processes")
    return Check("GPU", "ok", shown)


def _kernels() -> Iterator[Check]:
    """Triton writes the kernels of a GPU's step, with a C compiler for its launchers."""
    if not machine.gpus():
        flags = _cpu_flags()
        fast = [name for name in ("avx512_bf16", "amx_bf16", "avx512f", "avx2") if name in flags]
        said = f"CPU with {', '.join(fast)}" if fast else "CPU without wide vectors"
        yield Check("kernels", "ok" if fast else "warning", said, "" if fast else "another kind of machine is faster")
        return
    for name, there, mend in (
        ("triton", importlib.util.find_spec("triton") is not None, "pip install triton"),
        ("C compiler", any(map(shutil.which, ("cc", "gcc", "clang"))), "apt-get install -y gcc"),
    ):
        yield Check(
            f"kernels: {name}", "ok" if there else "failure", "found" if there else "missing", "" if there else mend
        )


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _workspace(prepared: Prepared) -> Check:
    if prepared.problem:
        return Check("workspace", "failure", prepared.problem, "df -h /workspace  # free some, or mount it writable")
    if prepared.workspace is None:
        return Check("workspace", "ok", "none: caches lie in the user's own folder")
    return Check("workspace", "ok", f"caches and temporary files in {prepared.workspace}")


def _disk(run: RunFolder) -> Iterator[Check]:
    """Where runs, caches and temporary files go, each file system once; a byte is written to each."""
    seen: dict[int, str] = {}
    places = {"runs": run.path.parent, "cache": Path(os.environ.get("HF_HOME") or Path.home()), "temporary files": None}
    for name, folder in places.items():
        place = _existing(folder or Path(tempfile.gettempdir()))
        device = place.stat().st_dev
        if device in seen:
            continue
        seen[device] = name
        free = machine.free_bytes(place)
        said = f"{place}: {free / 1e9:.1f} GB free"
        mend = f"du -xh --max-depth 2 {place} | sort -h | tail"
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"x" * 4096)
                file.flush()
        except OSError as error:
            yield Check(f"disk: {name}", "failure", f"{said}, and nothing can be written: {error.strerror}", mend)
            continue
        little = free < LITTLE_DISK_BYTES
        yield Check(f"disk: {name}", "warning" if little else "ok", said, mend if little else "")


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


# ---------------------------------------------------------------- the hub


def _token(prepared: Prepared) -> Check:
    mend = "hf auth login  # or export HF_TOKEN=..."
    if prepared.token == "none":
        said = "no HF_TOKEN, no RUNPOD_SECRET_HF_TOKEN, neither in process 1, and no login: gated sets are out of reach"
        return Check("hub token", "warning", said, mend)
    place = f"found ({prepared.token})"
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return Check("hub token", "ok", f"{place}; HF_HUB_OFFLINE is set, so it was not tried")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().whoami()
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        if code in (401, 403):
            return Check("hub token", "failure", f"{place}, and the hub refuses it: revoked or mistyped", mend)
        return Check("hub token", "warning", f"{place}; the hub answered {code}", "try again")
    except Exception as error:
        return Check(
            "hub token", "warning", f"{place}; the hub cannot be reached: {type(error).__name__}", "check the network"
        )
    return Check("hub token", "ok", f"{place}, accepted by the hub")


def _access(recipe: Recipe) -> Iterator[Check]:
    """Everything that the recipe reads from the hub, each repository once."""
    sources = [
        source
        for phase in recipe.phases
        if isinstance(phase, PreparePhase)
        for dataset in phase.datasets
        for source in dataset.sources
        if isinstance(source, HubSource)
    ]
    asked = {source.repo: source for source in sources}
    for repo, source in asked.items():
        if mirrored(source) is not None:
            yield Check(f"access: {repo}", "ok", f"a copy below {MIRROR}")
        else:
            yield _asked(repo, "dataset", all(one.optional for one in sources if one.repo == repo))
    if isinstance(recipe.base, HubBase):
        if on_this_machine(recipe.base) is not None:
            yield Check(f"access: {recipe.base.repo}", "ok", "on this machine")
        else:
            yield _asked(recipe.base.repo, "model", optional=False)


def _asked(repo: str, kind: Literal["dataset", "model"], optional: bool) -> Check:
    """Whether the hub lets this token read the repository."""
    name = f"access: {repo}"
    bad: Status = "warning" if optional else "failure"
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return Check(name, bad, "HF_HUB_OFFLINE is set and there is no copy", f"put a copy at ${MIRROR}/{repo}")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    goes_on = "; the run goes on without it" if optional else ""
    try:
        HfApi().auth_check(repo, repo_type=kind)
    except GatedRepoError:
        return Check(name, bad, f"gated, and this token has no access{goes_on}", f"accept the terms on {page}")
    except RepositoryNotFoundError:
        return Check(name, bad, f"not found, or not for this token{goes_on}", f"open {page}, then: hf auth login")
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        return Check(
            name, bad, f"the hub answered {code}{goes_on}", "hf auth login" if code in (401, 403) else "try again"
        )
    except Exception as error:
        return Check(name, bad, f"out of reach: {type(error).__name__}{goes_on}", "check the network")
    return Check(name, "ok", "may be read")


# ---------------------------------------------------------------- what the recipe needs


def _needs(run: RunFolder, recipe: Recipe, execution: Execution) -> Iterator[Check]:
    planned = plan_run(run, recipe, execution)
    words = f"posttrain plan {recipe.name}"
    for check in planned.shortages:
        yield Check(check.what, "failure", check.said, f"{check.field}; {words} has the parts")
    if not planned.shortages:
        disk, memory = planned.disk_bytes / 1e9, planned.rooms[0].needed_bytes / 1e9
        yield Check("room for the recipe", "ok", f"{disk:.1f} GB of disk, {memory:.1f} GB of memory at the peak")


def _toolchain(language: str) -> Check:
    missing = toolchains.missing(language)
    if missing is None:
        return Check(f"toolchain: {language}", "ok", "found")
    said = missing.partition(":")[0]
    return Check(f"toolchain: {language}", "warning", said, toolchains.TOOLCHAINS[language].install)


def _sandbox(execution: Execution) -> Check:
    level.use(execution.sandbox)
    try:
        used = level.chosen()
    except MachineError as error:
        first, *rest = str(error).splitlines()
        return Check("sandbox", "failure", first, rest[-1] if rest else "")
    return Check("sandbox", "warning" if used == "off" else "ok", f"{used}: {level.COVERS[used]}")


def _session() -> Check:
    found = [kind for kind in KINDS if shutil.which(kind)]
    if not found:
        said = "neither screen nor tmux: `posttrain start` uses a session of its own, to be followed with `logs -f`"
        return Check("detached sessions", "warning", said, "apt-get install -y screen")
    return Check("detached sessions", "ok", " and ".join(found))


def _port(port: int) -> Check:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
        except OSError as error:
            return Check(f"port {port}", "warning", f"127.0.0.1:{port}: {error.strerror}", "choose another with --port")
    return Check(f"port {port}", "ok", "free on 127.0.0.1")
