"""Whether work is done by kernels compiled for it: chains of elementwise operations on a GPU, layers on a tile unit."""

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from posttrain.host import machine

COMPILED_DEVICES: set[str] = {"cuda"}
"""Where a chain pays for being compiled: a GPU is bound by memory traffic, a CPU by the products between."""


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose first argument is a tensor, compiled by torch where that tensor's device is one of these."""
    compiled = torch.compile(function)

    @functools.wraps(function)
    def run(first: torch.Tensor, *rest: Any) -> Any:
        return (compiled if first.device.type in COMPILED_DEVICES else function)(first, *rest)

    return run


def has_compiler() -> bool:
    """Whether there is a C compiler, with which torch builds what starts a kernel."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["cc", "gcc", "clang"]
    return any(shutil.which(name) for name in names)


def has_tile_kernels() -> bool:
    """Whether kernels for a processor's tile unit are wanted, and it has one."""
    return _TILES_WANTED and machine.has_matrix_tiles()


_TILES_WANTED = True


def switch(compile_kernels: bool) -> None:
    """Compile kernels from now on, or run operation by operation."""
    global _TILES_WANTED
    _TILES_WANTED = compile_kernels
    COMPILED_DEVICES.clear()
    if compile_kernels:
        COMPILED_DEVICES.add("cuda")
