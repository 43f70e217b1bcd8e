"""Kernels compile for GPUs, as their launchers launch them, and fit; attention's registers do, and its loads overlap.

Triton's interpreter accepts much that its compiler does not. This needs no GPU.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("vllm_specplug.ab.environment")

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
#: All but attention's.
SMALL = ("kv_move", "tree_walk", "tree_rows", "recycling_matrix", "block_select", "suffix_match", "expert_vote")
KERNELS = {
    *("kv_move_kernel", "tree_walk_kernel", "tree_rows_kernel"),
    *("recycle_claim_kernel", "recycle_update_kernel", "recycle_draft_kernel"),
    *("_block_summary_kernel", "_mean_kernel", "_scores_kernel", "_votes_kernel", "_choose_kernel", "_scan_kernel"),
    *("_copy_kernel", "_weights_kernel", "_expert_vote_kernel", "_open_kernel", "_list_kernel"),
}


def run(tmp_path, *command):
    """In a process without the interpreter, with a cache of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path]),
    }
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=1200)


def resources(tmp_path, *arguments):
    """``{(machine, kernel, task, metric): value}``, as the benchmark writes them, one value per launch's part."""
    path = tmp_path / "resources.csv"
    done = run(tmp_path, str(BENCHMARKS / "bench_kernel_resources.py"), "--csv", str(path), *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found[row["machine"], row["provider"], row["task"]][row["metric"]] = int(row["value"])
    return found


def test_small_kernels_fit_an_h200(tmp_path):
    found = resources(tmp_path, "--capability", "90", "--only", *SMALL, "ffn_union")
    assert {kernel for _, kernel, _ in found} == KERNELS
    assert {machine for machine, _, _ in found} == {"compiled for H100, H200"}
    for launch, of in found.items():
        assert of["stack"] == 0 and 1 <= of["programs"] <= 32 and of["registers"] < 255, (launch, of)


def overlapping_loads() -> None:
    """What `test_attention_fits_and_its_loads_overlap` runs: 17 rows take 8 warps, the others 4."""
    from bench_kernel_resources import Attention, compiled

    with compiled(90) as found:
        Attention(32, 8, 128).launch()
        Attention(32, 8, 128, rows=17, block_size=128).launch()
        Attention(32, 8, 128, block_size=64, unit=32).launch()
    merges = [part for part in found if part.kernel == "merge_splits_kernel"]
    trees, wide, sparse = (part for part in found if part not in merges)
    assert merges and (trees.programs, wide.programs, sparse.programs) == (2, 1, 2)
    assert all(part.stack == 0 and part.registers < 255 for part in found), found
    for part, loops in ((trees, 2), (wide, 2), (sparse, 3)):
        # Per loop, keys and values are requested twice before it and once in it, and never waited for to the last.
        copies, waits = part.code.count("ttg.async_copy_global_to_local"), part.code.count("{num = 2 : i32}")
        assert (copies, waits) == (6 * loops, loops), (part.kernel, copies, waits)
        assert set(part.copies) == {16}, part.copies
    print("compiled")


def test_attention_fits_and_its_loads_overlap(tmp_path):
    done = run(tmp_path, "-c", "import test_bench_kernel_resources as t; t.overlapping_loads()")
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]


@pytest.mark.slow
def test_attention_of_every_shape_fits(tmp_path):
    found = resources(tmp_path, "--only", "tree_attention", "sparse_attention")
    assert len({machine for machine, _, _ in found}) == 2 and len(found) > 64
    assert {kernel for _, kernel, _ in found} == {
        "tree_attention_kernel",
        "sparse_attention_kernel",
        "merge_splits_kernel",
    }
    for launch, of in found.items():
        assert of["programs"] >= 1 and of["stack"] <= 512, (launch, of)
        if "context" in launch[2] and launch[0] == "compiled for H100, H200":  # the benchmark's
            assert of["stack"] == 0, (launch, of)
        if launch[1] != "merge_splits_kernel" and "window" not in launch[2]:
            assert of["copies"] > 0 and of["narrow_copies"] == 0, (launch, of)


@pytest.mark.slow
def test_the_hosts_time_per_launch(tmp_path):
    pytest.importorskip("vllm")
    path = tmp_path / "launch_time.csv"
    done = run(tmp_path, str(BENCHMARKS / "bench_launch_time.py"), "--rounds", "2", "--csv", str(path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with path.open(newline="") as file:
        rows = {(row["provider"], row["task"], row["metric"]): float(row["value"]) for row in csv.DictReader(file)}
    assert ("vllm.unified_attention", "attention, a layer", "host_time") in rows and len(rows) == 18
    assert all(0 < value < 1e6 for value in rows.values())


def test_what_cannot_be_compiled_is_named(tmp_path):
    code = "import bench_kernel_resources as b\nwith b.compiled({}) as found: pass"
    done = run(tmp_path, "-c", code.format(75))
    assert "ValueError: capability must be one of [80, 90], got 75" in done.stderr
    done = run(tmp_path, "-c", "import os; os.environ['TRITON_INTERPRET'] = '1'\n" + code.format(90))
    assert "RuntimeError: with TRITON_INTERPRET=1 nothing is compiled: unset it" in done.stderr


def test_programs_per_processor(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from bench_kernel_resources import Resources

    def programs(capability=90, warps=4, registers=32, shared=0):
        return Resources("k", capability, warps, registers, 0, shared, "", "").programs

    assert programs() == 16  # 64 warps
    assert programs(warps=1) == 32  # no more
    assert programs(registers=255) == 2 and programs(registers=168) == 3  # of 65,536
    assert programs(registers=129) == 3 and programs(registers=128) == 4  # in pieces of 8 per thread
    assert programs(shared=100 << 10) == 2 and programs(80, shared=100 << 10) == 1
    assert programs(shared=228 << 10) == 0 and programs(shared=227 << 10) == 1 and programs(80, shared=164 << 10) == 0
