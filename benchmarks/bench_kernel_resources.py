"""What the Triton kernels take of a GPU, found without one: every launch is compiled as it would be there, and not run.

    python benchmarks/bench_kernel_resources.py [--capability 90 80] [--only tree_attention ...]
        [--launches benchmark shapes] [--csv benchmarks/results/kernel_resources.csv]

Triton decides by a launch's own arguments what it compiles. `compiled` puts a driver in its place that names a GPU and
launches nothing, so launchers run as they are, on tensors of the CPU; outputs stay as they were. The binary says how
many registers a thread has, and how many bytes of memory for what did not fit in them. None of it is a time. Launches
are those of `bench_kernels.py`, with few requests, and attention of further shapes; ``narrow_copies`` are copies of
less than 16 bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_case import Bench
from kernel_cases import CASES
from replay import write_rows
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

RESULTS = Path(__file__).resolve().parent / "results" / "kernel_resources.csv"
#: By compute capability, bytes of shared memory of a processor, and the most that a program may have (CUDA C++
#: Programming Guide, compute capabilities).
SHARED = {80: (164 << 10, 163 << 10), 90: (228 << 10, 227 << 10)}
GPUS = {80: "compiled for A100", 90: "compiled for H100, H200"}
#: Of a processor: registers, warps and programs; and shared memory that each program takes besides its own.
REGISTERS, WARPS, PROGRAMS, RESERVED = 65536, 64, 32, 1024


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        kernel: the function's name.
        capability: 80 (A100) or 90 (H100, H200).
        warps: of a program.
        registers: of a thread; 255 is the most that there are.
        stack: bytes of a thread in memory, for want of registers.
        shared: bytes of shared memory of a program.
        code, ptx: the compiler's last own form, and the assembler's source.
    """

    kernel: str
    capability: int
    warps: int
    registers: int
    stack: int
    shared: int
    code: str = field(repr=False)
    ptx: str = field(repr=False)

    @property
    def programs(self) -> int:
        """How many run on a processor at once; 0: it cannot be launched."""
        whole, most = SHARED[self.capability]
        if self.shared > most:
            return 0
        # A warp gets registers in pieces of 256.
        of_warp = -(-self.registers * 32 // 256) * 256
        by_memory = whole // (self.shared + RESERVED)
        return min(REGISTERS // of_warp // self.warps, WARPS // self.warps, by_memory, PROGRAMS)

    @property
    def copies(self) -> Counter[int]:
        """How many instructions copy to shared memory while the program goes on, by their bytes per thread."""
        return Counter(
            int(size, 16) for size in re.findall(r"cp\.async\.\w+\.shared\.global.*?, (0x[0-9a-f]+)", self.ptx)
        )


class _NoDevice(DriverBase):  # type: ignore[misc]
    """A driver of a GPU that is not there. Its device's number is its capability: Triton keeps kernels by that."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def _never(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Triton asked for a device where launches end before one is needed")

    map_python_to_cpp_type = get_active_torch_device = get_benchmarker = _never


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as a compiled kernel's binary states them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump said something else than expected: {said}")
    return int(found[1]), int(found[2])


@contextmanager
def compiled(capability: int) -> Iterator[list[Resources]]:
    """Within it, launches compile for a compute capability instead of running; the list grows with what they compiled.

    Raises:
        ValueError: the capability is not one of `SHARED`.
        RuntimeError: Triton was imported for its interpreter, which compiles nothing.
    """
    if capability not in SHARED:
        raise ValueError(f"capability must be one of {list(SHARED)}, got {capability}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("with TRITON_INTERPRET=1 nothing is compiled: unset it")
    found: list[Resources] = []
    kept: dict[int, Any] = {}  # kernels by their id, which is theirs for as long as they live
    run, before = JITFunction.run, triton.runtime.driver._active  # None if none was asked for yet

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in kept:
            kept[id(kernel)] = kernel
            registers, stack = _usage(kernel.asm["cubin"])
            warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
            code, ptx = kernel.asm["ttgir"], kernel.asm["ptx"]
            found.append(Resources(self.fn.__name__, capability, warps, registers, stack, shared, code, ptx))
        return kernel

    triton.runtime.driver.set_active(_NoDevice(capability))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = before


class Few(Bench):
    """The benchmark's large shapes with two requests, on the CPU, without peers."""

    device = "cpu"
    dtype = torch.bfloat16

    def shapes(self, tiny: Any, *large: Any) -> tuple[Any, ...]:
        return tuple((min(2, shape[0]), *shape[1:]) if isinstance(shape, tuple) else shape for shape in large)


@dataclass(frozen=True)
class Attention:
    """A launch of attention.

    Attributes:
        rows: of a request.
        window: -1: none.
        unit: slots of the units that are chosen; 0: all slots are attended.
    """

    heads: int
    kv_heads: int
    head_size: int
    rows: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    splits: int = 4
    window: int = -1
    unit: int = 0

    @property
    def task(self) -> str:
        extra = f", window {self.window}" if self.window > 0 else f", units of {self.unit}" if self.unit else ""
        shape = f"{self.rows} rows, heads {self.heads}/{self.kv_heads}x{self.head_size}, blocks of {self.block_size}"
        return f"{shape}, {str(self.dtype).removeprefix('torch.')}{extra}"

    def launch(self) -> None:
        """Two requests of 1,024 tokens and the rows."""
        from vllm_specplug.kernels.attention_triton import AttentionPlan
        from vllm_specplug.kernels.sparse_attention_triton import sparse_attention
        from vllm_specplug.kernels.tree_attention_triton import tree_attention

        length, on = 1024 + self.rows, {"dtype": torch.int32}
        blocks = -(-length // self.block_size)
        cache = torch.zeros(2 * blocks, 2, self.block_size, self.kv_heads, self.head_size, dtype=self.dtype)
        query, out = torch.zeros(2, 2 * self.rows, self.heads, self.head_size, dtype=self.dtype)
        of_model = (self.heads, self.kv_heads, self.head_size, self.dtype, "cpu")
        plan = AttentionPlan(2 * self.rows, 2, self.rows, *of_model, self.splits, 256)
        step = (
            *(plan, query, *cache.unbind(1), torch.zeros(2, blocks, **on), torch.arange(3, **on) * self.rows),
            *(torch.full((2,), length, **on), torch.zeros(2 * self.rows, -(-self.rows // 32), **on), out, 0.1),
        )
        if self.unit:
            chosen = torch.zeros(2, self.kv_heads, 8, **on)
            counts, tails = torch.full((2, self.kv_heads), 8, **on), torch.full((2,), 512, **on)
            sparse_attention(*step, self.unit, chosen, counts, tails)
        else:
            depths = torch.zeros(2 * self.rows, **on) if self.window > 0 else None
            tree_attention(*step, self.window, depths)


#: Models' heads: SmolLM2, Llama 3 8B, and 70B by 8 devices, Phi 2's 80, Phi 3's 96, Gemma 2's 256; and trees' rows.
HEADS = ((9, 3, 64), (32, 8, 128), (8, 1, 128), (32, 32, 80), (32, 32, 96), (16, 8, 256))
_SOME = (HEADS[0], HEADS[1], HEADS[5])
ATTENTION = (
    *(Attention(*heads, rows=rows) for heads, rows in itertools.product(HEADS, (1, 16, 129))),
    *(Attention(*heads, dtype=torch.float16) for heads in _SOME),
    *(Attention(*heads, window=512) for heads in _SOME),
    *(Attention(*heads, block_size=128) for heads in _SOME),
    *(Attention(*heads, unit=16) for heads in _SOME),
    *(Attention(32, 8, 128, rows=129, window=512), Attention(32, 8, 128, rows=129, unit=16)),
)


def launches(names: list[str], kinds: list[str]) -> Iterator[tuple[str, str, Any]]:
    """Kernel, task and launcher of every launch."""
    if "benchmark" in kinds:
        for name in names:
            for case in CASES[name](Few(peers=())):
                yield case.kernel, case.task, case.run
    for shape in ATTENTION if "shapes" in kinds else ():
        kernel = "sparse_attention" if shape.unit else "tree_attention"
        if kernel in names:
            yield kernel, shape.task, shape.launch


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="What the Triton kernels take of a GPU, without one.")
    parser.add_argument("--capability", nargs="+", type=int, choices=sorted(SHARED), default=[90, 80])
    parser.add_argument("--only", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--launches", nargs="+", choices=("benchmark", "shapes"), default=["benchmark", "shapes"])
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        print("error: with TRITON_INTERPRET=1 nothing is compiled: unset it.", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")
    bad = 0
    for capability in args.capability:
        rows: list[dict[str, Any]] = []
        with compiled(capability) as found:
            for kernel, task, launch in launches(args.only, args.launches):
                before = len(found)
                launch()
                for part in found[before:]:
                    bad += part.programs == 0
                    print(
                        f"sm_{capability} {part.kernel:<24} {task}: {part.registers} registers, {part.stack} B stack, "
                        f"{part.shared} B shared, {part.programs} programs of {part.warps} warps"
                    )
                    common = {"benchmark": kernel, "provider": part.kernel, "task": task, "seed": 0}
                    common["config"] = json.dumps({"capability": capability, "warps": part.warps})
                    values = {name: getattr(part, name) for name in ("registers", "stack", "shared", "programs")}
                    if part.copies:
                        values["copies"] = part.copies.total()
                        values["narrow_copies"] = values["copies"] - part.copies[16]
                    for metric, value in values.items():
                        unit = "B" if metric in ("stack", "shared") else ""
                        rows.append(common | {"metric": metric, "unit": unit, "value": value})
        write_rows(args.csv, rows, GPUS[capability])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
