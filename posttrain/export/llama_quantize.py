"""K-quants, which llama.cpp alone writes: its `llama-quantize` where that is installed, else the same function of the
library that node-llama-cpp brings, in a process of its own.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from gguf import LlamaFileType

from posttrain.errors import MachineError, PhaseFault
from posttrain.export.llama import tool_folders
from posttrain.run.folder import fsync_folder

PLATFORMS = {"x86_64": "linux-x64", "aarch64": "linux-arm64"}
LIBRARY = "node_modules/@node-llama-cpp/{platform}/bins/{platform}/libllama.v*.so"


class Parameters(ctypes.Structure):
    """The opening of `llama_model_quantize_params` in llama.h, with room for what follows it."""

    _fields_ = (("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("rest", ctypes.c_byte * 504))


def find_quantizer() -> list[str]:
    """The command to be given source, target, type and threads; MachineError where there is none."""
    program = shutil.which("llama-quantize")
    if program is not None:
        return [program]
    pattern = LIBRARY.format(platform=PLATFORMS.get(platform.machine(), "none"))
    for folder in tool_folders():
        for library in sorted(folder.glob(pattern)):
            return [sys.executable, "-m", "posttrain.export.llama_quantize", str(library.resolve())]
    raise MachineError(
        "GGUF type q4_k_m is written by llama.cpp's quantizer, and there is none: put llama-quantize on the PATH, or "
        f"npm i node-llama-cpp in one of {', '.join(map(str, tool_folders()))}, or choose q4_0 or q8_0"
    )


def quantize_file(source: Path, target: Path, kind: str, threads: int) -> None:
    """Write `target`; it has its name when all of it is on the disk. Raises PhaseFault with llama.cpp's last words."""
    partial = target.with_name(f".{target.name}.part")
    command = [*find_quantizer(), str(source), str(partial), kind.upper(), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0 or not partial.exists():
        partial.unlink(missing_ok=True)
        raise PhaseFault(f"llama.cpp could not make {kind} of {source.name}: {(done.stdout + done.stderr)[-600:]}")
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)
    fsync_folder(target.parent)


def main(library: str, source: str, target: str, kind: str, threads: str) -> int:
    llama = ctypes.CDLL(library)
    llama.llama_model_quantize_default_params.restype = Parameters
    llama.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters))
    llama.llama_model_quantize.restype = ctypes.c_uint32
    parameters = llama.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = int(threads), LlamaFileType[f"MOSTLY_{kind}"].value
    return int(llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
