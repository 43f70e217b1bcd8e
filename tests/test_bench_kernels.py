"""The kernels' benchmark where there is no GPU: its cases are right, and it measures nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "bench_kernels.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)


def test_every_case_is_right_in_the_interpreter():
    done = run("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = {line.split()[0] for line in done.stdout.splitlines()}
    assert kernels == {
        *("tree_attention", "sparse_attention", "kv_move", "tree_walk", "tree_rows"),
        *("recycle_update", "recycle_draft", "shaped_draft"),
        *("block_summary", "block_select", "suffix_match", "expert_vote", "ffn_union"),
    }
    assert "WRONG" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    done = run("--csv", str(tmp_path / "kernels.csv"))
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: bench_kernels needs a CUDA GPU") and "Traceback" not in done.stderr
