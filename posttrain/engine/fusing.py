"""Chains of elementwise operations as one kernel each, where the device has a compiler for them."""

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

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


def switch(compile_kernels: bool) -> None:
    """Compile chains on a GPU from now on, or run them operation by operation."""
    COMPILED_DEVICES.clear()
    if compile_kernels:
        COMPILED_DEVICES.add("cuda")
