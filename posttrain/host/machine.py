"""Facts about this machine, read without starting any framework."""

import contextlib
import ctypes
import functools
import os
import platform
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import MachineError
from posttrain.run.redaction import without_secrets

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (malloc.h)."""
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18
"""A system call, and what it is asked for (arch_prctl(2), linux/Documentation/arch/x86/xstate.rst)."""


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def has_matrix_tiles() -> bool:
    """Whether the processor has tile registers for bfloat16 (Intel AMX) and Linux lets this process use them."""
    try:
        if " amx_bf16" not in Path("/proc/cpuinfo").read_text():
            return False
    except OSError:
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


def memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """Memory that a new process could have without swapping; all of it where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return memory_bytes()


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    free_bytes: int
    driver: str
    capability: str
    """As `9.0`."""


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs that the driver lists, in its order; empty without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    asked = "name,memory.total,memory.free,driver_version,compute_cap"
    query = [program, f"--query-gpu={asked}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True, env=without_secrets())
    except (OSError, subprocess.SubprocessError):
        return []
    return [_gpu(line) for line in done.stdout.splitlines() if line.count(",") >= asked.count(",")]


def _gpu(line: str) -> Gpu:
    """A line of the query; the driver writes memory in MiB, and `[N/A]` for what it does not know."""
    name, total, free, driver, capability = (part.strip() for part in line.rsplit(",", 4))
    total, free = (text if text.isdigit() else "0" for text in (total, free))
    return Gpu(name, int(total) * 2**20, int(free) * 2**20, driver, capability)


def show_gpus(ranks: str) -> None:
    """Let the GPUs with these numbers alone be seen, of those that could be seen so far; before torch is imported.

    MachineError where there is no GPU of such a number.
    """
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    everything = list(map(str, range(len(gpus()))))
    seen = everything if before is None else [one.strip() for one in before.split(",") if one.strip()]
    wanted = list(map(int, ranks.split(",")))
    if missing := [rank for rank in wanted if rank >= len(seen)]:
        there = f"GPUs {', '.join(map(str, range(len(seen))))}" if seen else "no GPU"
        raise MachineError(f"--gpu-ranks {ranks}: there is no GPU {missing[0]}; this machine has {there}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen[rank] for rank in wanted)


def require_gpu() -> None:
    """MachineError where neither the driver's program nor its device can be found; asks no torch."""
    if not gpus() and not Path("/dev/nvidiactl").exists():
        raise MachineError(
            "--device cuda: this machine has no NVIDIA GPU (no nvidia-smi, no /dev/nvidiactl): start the container "
            "with its GPUs, or use --device cpu"
        )


def free_bytes(folder: Path) -> int:
    """Free disk space where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def forget_peak() -> None:
    """Give back what is free, and begin to measure the process's peak anew, where the kernel lets it be."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory that the process has held since the last `forget_peak`."""
    # Not ru_maxrss where it can be helped: a process inherits that from the one that started it.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on a device; known by name, so that no framework is imported."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def facts() -> dict[str, Any]:
    """What a run's manifest records about the hardware; no host name and no paths."""
    return {
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "gpus": [gpu.name for gpu in gpus()],
    }


def set_thread_environment(threads: int) -> None:
    """Thread counts and determinism switches that libraries read once, when they are first imported."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Kernels for bfloat16 products are compiled per shape; the default of 1024 forgets them from step to step.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Rows differ in length from step to step: blocks that grow leave no holes.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def keep_freed_memory() -> None:
    """Let glibc's allocator keep what tensors leave behind instead of returning it and asking for it again.

    Each step then finds its pages where the last one left them. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**30)
