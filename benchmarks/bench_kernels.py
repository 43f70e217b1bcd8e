"""Triton kernels on a GPU: time, roofline share and peers in the same run. Needs PyTorch, Triton and numba, not vLLM.

    python benchmarks/bench_kernels.py [--only tree_attention ...] [--quick] [--peers sdpa flex xformers]
        [--csv benchmarks/results/kernels.csv]

Every case is checked against its definition before it is timed; one that is wrong is not timed, and the exit code is 1
(``--dry-run`` stops there, on the CPU). Times are the GPU's, of launches recorded in a CUDA graph (launching takes no
time then), as a server replays them; between repeats a buffer larger than the second-level cache is written.
``roofline`` is the least time (`Work`) by this machine's own copy bandwidth and matrix products, measured first, over
the time measured. Without a GPU nothing is measured and nothing written. `make bench-kernels` also runs the kernels'
tests on the GPU, in bfloat16 too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_case import Bench, Case
from kernel_cases import CASES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "kernels.csv"
REPEATS, LAUNCHES = 15, 8


def gpu_seconds(run: Callable[[], Any], flush: torch.Tensor) -> tuple[float, float, float]:
    """Median, 20% and 80% quantile of the time of one launch, caches cold before each repeat of several launches.

    A launch of microseconds is repeated within one graph; its data then are in the second-level cache, as they are
    in a server, where the step before wrote them.
    """
    run()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    launches = LAUNCHES if start.elapsed_time(end) < 0.3 else 1
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            for _ in range(launches):
                run()
        replay: Callable[[], Any] = graph.replay
    except RuntimeError as error:  # a peer that cannot be recorded is timed as it is
        print(f"  not recorded in a graph: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        launches, replay = 1, run
    seconds = []
    for _ in range(REPEATS):
        flush.zero_()
        start.record()
        replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / launches)
    low, _, _, high = statistics.quantiles(seconds, n=5)
    return statistics.median(seconds), low, high


def ceilings(flush: torch.Tensor) -> dict[str, float]:
    """Bytes and bfloat16 operations per second of this GPU, as PyTorch reaches them."""
    source, target = torch.empty(2, 1 << 31, dtype=torch.uint8, device="cuda")
    copied = gpu_seconds(lambda: target.copy_(source), flush)[0]
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b, c = torch.randn_like(a), torch.empty_like(a)
    multiplied = gpu_seconds(lambda: torch.mm(a, b, out=c), flush)[0]
    return {"bytes_per_s": 2 * len(source) / copied, "operations_per_s": 2 * 8192**3 / multiplied}


def main() -> int:
    """Command line."""
    peers = ("sdpa", "flex", "xformers")
    parser = argparse.ArgumentParser(description="Time the Triton kernels on a GPU.")
    parser.add_argument("--only", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--peers", nargs="*", choices=peers, default=list(peers))
    parser.add_argument("--quick", action="store_true", help="one shape of the large ones")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter, nothing timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        args.peers = [peer for peer in args.peers if peer == "sdpa"]
    elif not torch.cuda.is_available():
        print(
            "error: bench_kernels needs a CUDA GPU, and PyTorch finds none; nothing was measured. --dry-run checks the "
            "cases in Triton's interpreter.",
            file=sys.stderr,
        )
        return 2
    bench = Bench(args.dry_run, args.quick, tuple(args.peers), args.seed)
    return check_all(bench, args.only) if args.dry_run else time_all(bench, args.only, args.csv)


def is_right(case: Case) -> bool:
    """Run a case once and say so if it is wrong."""
    case.run()
    error = case.error() if case.error is not None else 0.0
    if not error <= case.allowed:
        print(f"{case.label}: WRONG, error {error:.3g} where {case.allowed:.3g} is allowed")
        return False
    print(f"{case.label}: error {error:.1e}", end="\n" if not torch.cuda.is_available() else "; ")
    return True


def check_all(bench: Bench, names: list[str]) -> int:
    """Run every case once; the exit code."""
    results = [is_right(case) for name in names for case in CASES[name](bench)]
    return 0 if all(results) else 1


def time_all(bench: Bench, names: list[str], path: Path) -> int:
    """Time every case that is right, and add rows to the CSV at ``path``; the exit code."""
    from replay import write_rows

    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    limits = ceilings(flush)
    print(", ".join(f"{name} {value:.3e}" for name, value in limits.items()))
    rows: list[dict[str, Any]] = []
    wrong = 0
    for name in names:
        for case in CASES[name](bench):
            if not is_right(case):
                wrong += 1
                continue
            median, low, high = gpu_seconds(case.run, flush)
            common = {"benchmark": case.kernel, "provider": case.provider, "task": case.task, "seed": bench.seed}
            common["config"] = json.dumps({k: round(v) for k, v in limits.items()})
            found = {"value": median * 1e6, "p20": low * 1e6, "p80": high * 1e6}
            rows.append(common | {"metric": "time", "unit": "us"} | found)
            share = ""
            if case.work is not None:
                roofline = case.work.seconds(**limits) / median
                share = f"roofline {roofline:.2f}"
                for metric, unit, value in (
                    ("roofline", "share", roofline),
                    ("bytes", "B", case.work.bytes),
                    ("operations", "ops", case.work.operations),
                ):
                    rows.append(common | {"metric": metric, "unit": unit, "value": value})
            print(f"{median * 1e6:.1f} us {share}")
            write_rows(path, rows, torch.cuda.get_device_name())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
