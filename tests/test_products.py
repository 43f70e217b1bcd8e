"""Products of a few rows with rows in memory, for every kind of element, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm_specplug.kernels import lanes, products
from vllm_specplug.kernels.products import multiply

KINDS = [
    ("float32", lanes.KINDS["float32"]),
    ("float16", lanes.KINDS["float16"]),
    ("bfloat16", lanes.KINDS["bfloat16"]),
]
if products.KINDS["bfloat16"].dtype == np.int8:  # this processor multiplies pairs
    KINDS.append(("bfloat16", products.KINDS["bfloat16"]))


@pytest.mark.parametrize(("name", "kind"), KINDS, ids=[f"{name}-{kind.dtype}" for name, kind in KINDS])
def test_multiply_is_a_product_and_reads_nothing_beyond(name, kind):
    torch.manual_seed(0)
    dtype = getattr(torch, name)
    draw = np.random.default_rng(0)
    for _ in range(60):
        rows, vectors, depth = (int(n) for n in draw.integers(1, (14, 8, 40)))
        columns, keep = vectors * lanes.LANES, int(draw.integers(2))
        b = torch.full((depth + 1, columns + lanes.LANES), torch.nan, dtype=dtype)
        b[:depth, :columns] = torch.randn(depth, columns).to(dtype)
        a = torch.full((rows, depth + 3), torch.nan, dtype=torch.bfloat16 if kind.dtype == np.int8 else torch.float32)
        a[:, :depth] = torch.randn(rows, depth).to(a.dtype)
        c = torch.randn(rows, columns + 1)
        before = c.clone()
        (lda, ldb, ldc) = (t.stride(0) * t.element_size() for t in (a, b, c))
        multiply(
            *(kind, a.data_ptr(), lda, b.data_ptr(), ldb, b.element_size(), c.data_ptr(), ldc),
            *(rows, vectors, depth, keep),
        )
        wanted = a[:, :depth].double() @ b[:depth, :columns].double() + (before[:, :columns] if keep else 0.0)
        torch.testing.assert_close(c[:, :columns].double(), wanted, atol=3e-5, rtol=1e-5)
        assert torch.equal(c[:, columns:], before[:, columns:])
