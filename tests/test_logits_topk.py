"""Top-k of logits against PyTorch, in every dtype, with ties, tails, strides and infinities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm_specplug.kernels.logits_topk import LogitsTopK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [8, 15, 16, 1000, 49155])
def test_matches_torch(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    logits = (torch.randn(5, size) * 4).to(dtype)
    before = logits.clone()
    ids, logprobs = LogitsTopK(8)(logits)
    assert torch.equal(logits, before)
    exact = logits.double().log_softmax(dim=-1)
    values, _ = exact.topk(8)
    # Sums of 50,000 terms in float32, in as few lanes as the processor has.
    np.testing.assert_allclose(logprobs, values.numpy(), atol=4e-5)
    # Of equal logits any order would do for torch; here the smallest id comes first.
    order = np.lexsort((np.arange(size)[None].repeat(5, 0), -logits.double().numpy()))[:, :8]
    np.testing.assert_array_equal(ids, order)


def test_first_of_equals_is_what_argmax_takes() -> None:
    logits = torch.zeros(3, 640)
    logits[1, [5, 77, 300]] = 1.0
    logits[2, 639] = 1.0
    ids, logprobs = LogitsTopK(4)(logits)
    assert ids.tolist() == [[0, 1, 2, 3], [5, 77, 300, 0], [639, 0, 1, 2]]
    np.testing.assert_array_equal(ids[:, 0], logits.argmax(dim=-1))
    np.testing.assert_allclose(logprobs[0], -np.log(640), rtol=1e-6)


def test_masked_tokens_and_views() -> None:
    wide = torch.randn(6, 200)
    wide[:, 100:] = 50.0
    logits = wide[::2, :100]
    logits[0] = -np.inf
    logits[0, [7, 9]] = torch.tensor([1.0, 2.0])
    reader = LogitsTopK(3)
    ids, logprobs = reader(logits)
    assert ids[0, :2].tolist() == [9, 7] and logprobs[0, 2] == -np.inf and logprobs[0, :2].max() < 0
    np.testing.assert_array_equal(ids[1:], logits[1:].topk(3)[1])
    # Columns that are not side by side, too few of them, or double precision, go to PyTorch.
    for odd in (wide.T, wide.double()[:, :100], torch.randn(2, 3)):
        ids, logprobs = reader(odd)
        np.testing.assert_allclose(logprobs, odd.float().log_softmax(-1).topk(3)[0], atol=1e-5)


def test_nothing_comparable_ends_in_the_vocabulary() -> None:
    ids, _ = LogitsTopK(8)(torch.full((2, 100), np.nan))
    assert ids.min() >= 0 and ids.max() < 100
