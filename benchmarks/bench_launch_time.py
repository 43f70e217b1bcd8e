"""What launching the Triton kernels takes of the host's time, beside vLLM's own attention kernel, without a GPU.

    python benchmarks/bench_launch_time.py [--rounds 9] [--csv benchmarks/results/launch_time.csv]

Everything before the driver's launch: the launcher's checks, and Triton finding the compiled kernel for the arguments.
The launch itself, some microseconds, is left out (`bench_kernel_resources.compiled`). Attention is launched once per
layer of every step that is not in a CUDA graph; the rest once per step. All take turns, round by round.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton.backends

RESULTS = Path(__file__).resolve().parent / "results" / "launch_time.csv"
LAUNCHES = 200


def unified_attention() -> Callable[..., None]:
    """vLLM's own attention kernel for GPUs (vllm/v1/attention/ops/triton_unified_attention.py)."""

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    # vLLM imports Triton only where some driver is active.
    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=Driver)
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention as found

    del triton.backends.backends["cpu"]
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    return found


def attention_launches(theirs: Callable[..., None]) -> dict[tuple[str, str], Callable[[], Any]]:
    """Two requests of 16 rows, in a layer of heads 32/8x128."""
    from types import SimpleNamespace

    from vllm_specplug.kernels.attention_triton import AttentionPlan

    from vllm_specplug.host import gpu_attention

    class Layer(gpu_attention.TreeImplMixin):
        head_size, scale, sliding_window = 128, 0.1, (-1, -1)

    on: dict[str, Any] = {"dtype": torch.int32}
    cache = torch.zeros(130, 8, 16, 256, dtype=torch.bfloat16)
    query, out = torch.zeros(2, 32, 32, 128, dtype=torch.bfloat16)
    starts, lengths = torch.arange(3, **on) * 16, torch.full((2,), 1040, **on)
    table, bits = torch.zeros(2, 65, **on), torch.zeros(32, 1, **on)
    step = gpu_attention.DeviceStep(starts, lengths, bits, torch.zeros(32, **on), table, True)
    layer, metadata = Layer(), SimpleNamespace(specplug_step=step)
    layer.attention_plans = (AttentionPlan(32, 2, 16, 32, 8, 128, torch.bfloat16, "cpu", 4, 256),) * 2
    keys, values = gpu_attention.split_cache(cache, 128)

    def first() -> None:
        step.checked = None
        layer.forward(None, query, query, query, cache, metadata, out)

    def vllms() -> None:
        theirs(
            q=query, k=keys, v=values, out=out, cu_seqlens_q=starts, max_seqlen_q=16, seqused_k=lengths,
            max_seqlen_k=1040, softmax_scale=0.1, causal=True, window_size=(-1, -1), block_table=table, softcap=0.0,
            q_descale=None, k_descale=None, v_descale=None,
        )  # fmt: skip

    return {
        ("own", "attention, a step's first layer"): first,
        ("own", "attention, a further layer"): lambda: layer.forward(None, query, query, query, cache, metadata, out),
        ("vllm.unified_attention", "attention, a layer"): vllms,
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="The host's time per launch of the Triton kernels.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        print("error: with TRITON_INTERPRET=1 nothing is compiled: unset it.", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    theirs = unified_attention()
    from bench_kernel_resources import Few, compiled
    from kernel_cases import CASES
    from replay import write_rows

    torch.set_num_threads(1)
    with compiled(90):
        launches = attention_launches(theirs)
        for name in ("suffix_match", "recycling_matrix", "tree_rows", "tree_walk", "kv_move", "block_select"):
            for case in CASES[name](Few(peers=())):
                launches[case.provider, f"{case.kernel}, {case.task}"] = case.run
        for case in itertools.islice(CASES["sparse_attention"](Few(peers=())), 1):
            launches[case.provider, f"{case.kernel}, a layer"] = case.run
        seconds: dict[tuple[str, str], list[float]] = {of: [] for of in launches}
        for _ in range(args.rounds + 1):  # the first compiles
            for of, launch in launches.items():
                start = time.perf_counter()
                for _ in range(LAUNCHES):
                    launch()
                seconds[of].append((time.perf_counter() - start) / LAUNCHES)
    rows = []
    for (provider, task), all_rounds in seconds.items():
        taken = [1e6 * s for s in all_rounds[1:]]
        low, _, _, high = statistics.quantiles(taken, n=5)
        row = {"benchmark": "launch_time", "provider": provider, "task": task, "metric": "host_time", "unit": "us"}
        rows.append(row | {"value": statistics.median(taken), "p20": low, "p80": high, "config": "", "seed": 0})
        print(f"{provider:<24}{task:<60}{rows[-1]['value']:>7.1f} us")
    own, peer = (seconds[of][1:] for of in list(launches)[1:3])
    ratio = statistics.median(a / b for a, b in zip(own, peer, strict=True))
    print(f"a further layer, over vLLM's kernel in the same round: {ratio:.2f}")
    row = {"benchmark": "launch_time", "provider": "own", "task": "attention, a further layer", "seed": 0}
    rows.append(row | {"metric": "over_vllm", "unit": "ratio", "value": ratio, "config": ""})
    write_rows(args.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
