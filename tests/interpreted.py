"""Real vLLM engines that run their GPU code on this machine's CPU, in Triton's interpreter.

vLLM 0.32 has a Model Runner V2 for CPUs that runs the GPU runner's own Triton kernels by a Triton with a CPU backend.
The interpreter takes that backend's place here, so everything between the scheduler and the kernels is vLLM's real
code: only what a kernel is compiled to, streams and CUDA graphs are not. An engine of a tiny model starts in seconds
and makes a few steps per second.

A process is one or the other: with this, vLLM takes Triton for usable, and would for the other tests' engines. So tests
run a driver, a script beside them, in a process of its own (:func:`run`), which calls :func:`prepare` first.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent

#: Environment of a driver. Engines run in its own process, so that it can look into them.
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}


#: Attention backend of vLLM's that engines with trees subclass: FLASH_ATTN where a driver is to have FlashAttention.
FLASH = os.environ.get("INTERPRETED_FLASH", "")
BACKEND = "FLASH_ATTN" if FLASH else "TRITON_ATTN"


def run(driver: str, *arguments: str, flash: int | None = None, timeout: float = 900.0) -> Any:
    """What ``tests/<driver>.py`` reports by :func:`report`; its error output is shown where it fails.

    Args:
        flash: attend in vLLM's FLASH_ATTN, with this version of FlashAttention; None: in TRITON_ATTN.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPECPLUG_")}
    read, write = os.pipe()
    with os.fdopen(read) as answer:
        process = subprocess.Popen(
            [sys.executable, str(TESTS / f"{driver}.py"), *arguments],
            env=environment | ENVIRONMENT | {"INTERPRETED_ANSWER": str(write), "INTERPRETED_FLASH": str(flash or "")},
            pass_fds=[write],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        os.close(write)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(f"{driver} took more than {timeout:.0f} s:\n{output[-4000:]}") from None
        text = answer.read()
    assert process.returncode == 0 and text, f"{driver} ended with {process.returncode}:\n{output[-8000:]}"
    return json.loads(text)


def report(found: Any) -> None:
    """Hand what a driver found to :func:`run`."""
    with os.fdopen(int(os.environ["INTERPRETED_ANSWER"]), "w") as answer:
        json.dump(found, answer)


@functools.cache
def prepare() -> None:
    """Make vLLM run its GPU kernels in the interpreter, once. Before vLLM is imported."""
    import torch
    import triton.backends
    from triton.runtime import interpreter

    assert "vllm" not in sys.modules and os.environ.get("TRITON_INTERPRET") == "1"

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=Driver)
    # vLLM's kernel that writes K and V asks for it to choose the size of its tiles.
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    _take_scalar_masks()
    hasten()
    # Sums and products are not checked for overflow here, but where kernels are tested alone.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    if FLASH:
        import flash_attention

        flash_attention.stand_in(int(FLASH))


def _take_scalar_masks() -> None:
    """Let masks be made of scalars too, as the compiler does; Triton 3.9's interpreter makes numbers of those."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def taking(original: Any, place: int) -> Any:
        def call(self: Any, *arguments: Any) -> Any:
            mask = arguments[place]
            if mask.data.dtype != np.bool_:
                mask = TensorHandle(mask.data.astype(np.bool_), mask.dtype)
            return original(self, *arguments[:place], mask, *arguments[place + 1 :])

        return call

    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        setattr(InterpreterBuilder, name, taking(getattr(InterpreterBuilder, name), place))


def hasten() -> None:
    """Spare the interpreter looking through Triton's whole language at each call of a device function."""
    import inspect

    from triton.runtime import interpreter

    members: dict[Any, list[tuple[str, Any]]] = {}

    def patch(package: Any, builder: Any, scope: Any) -> None:
        if package not in members:
            every = inspect.getmembers(package)
            members[package] = [(name, found) for name, found in every if interpreter.tl.core.is_builtin(found)]
        for name, found in members[package]:
            if getattr(package, name) is found:
                interpreter._patch_attr(package, name, found, builder, scope)

    interpreter._patch_builtin = patch


def attend_with(path: str) -> None:
    """Let vLLM's CPU platform, which knows one attention backend only, use the one of this path, until
    :func:`attend_as_usual`. Worker processes started until then do so too, by :func:`attend_as_parent`."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, path)
    os.environ["INTERPRETED_ATTENTION"] = path


def attend_as_usual() -> None:
    """Undo :func:`attend_with`."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    AttentionBackendEnum.CPU_ATTN.clear_override()
    os.environ.pop("INTERPRETED_ATTENTION", None)


def attend_as_parent() -> None:
    """In a worker: attend as the process that started it wants."""
    if path := os.environ.get("INTERPRETED_ATTENTION"):
        attend_with(path)


def gpu_trees() -> None:
    """Let engines that draft attend trees as on a GPU, in :data:`BACKEND` under the V1 runner, where ``gpu_trees`` is
    set; others attend with vLLM's kernel for CPUs."""
    from vllm.v1.attention.backends import triton_attn

    from vllm_specplug.host import gpu_attention, trees

    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    trees.kind_here = lambda gpu_trees: "gpu" if gpu_trees else "the option gpu_trees is not set"
    # Programs run one after another here, and most splits of a short context have nothing to do.
    gpu_attention._SPLITS = triton_attn.NUM_PAR_SOFTMAX_SEGMENTS = 2
    install, uninstall = gpu_attention.install, gpu_attention.uninstall

    def attend(*module: str) -> None:
        attend_with(f"{gpu_attention.__name__}.{BACKEND}")
        install(*module)

    def leave() -> None:
        attend_as_usual()
        uninstall()

    gpu_attention.install, gpu_attention.uninstall = attend, leave
