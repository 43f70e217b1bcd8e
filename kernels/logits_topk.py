"""The likeliest tokens of rows of logits, with their log-probabilities, in one pass over each row.

A proposer that learns from the target's own guesses needs them at every verified row of every step. On a CPU
`torch.topk` and `logsumexp` take several passes over a converted copy; for 4 rows of 49,152 that was 3% of a step of a
135M model.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from vllm_specplug.kernels.lanes import KINDS, LANES, exp2, load_number, row_copy, row_largest, row_weights
from vllm_specplug.kernels.memory import kernel

# Elements whose maximum is compared with the worst of the best before any of them is.
_BLOCK = 128
_LOG2E = np.float32(math.log2(math.e))
_LN2 = math.log(2.0)


@kernel
def _rows(
    kind: float,
    logits: int,
    stride: int,
    size: int,
    scratch: int,
    tail: npt.NDArray[np.float32],
    ids: npt.NDArray[np.int32],
    logprobs: npt.NDArray[np.float32],
) -> None:
    """Fill ``ids`` and ``logprobs``; ``stride`` bytes from one row of ``size`` elements to the next.

    ``scratch`` has room for one row as float32, ``tail`` holds what is left of each row after whole vectors, scaled.
    """
    k = ids.shape[1]
    whole = size // LANES * LANES
    for row in range(len(ids)):
        source = logits + row * stride
        row_copy(kind, source, np.float32(0), scratch, whole // LANES, _LOG2E)
        for j in range(k):
            ids[row, j] = j
            logprobs[row, j] = -np.inf
        worst = np.float32(-np.inf)
        start = 0
        while start < size:
            end = min(start + _BLOCK, whole)
            if start < whole:
                if not row_largest(np.float32(0), scratch + start * 4, (end - start) // LANES) > worst:
                    start = end
                    continue
            else:
                end = size
            for at in range(start, end):
                value = load_number(scratch, at) if at < whole else tail[row, at - whole]
                if value > worst:
                    place = k - 1
                    while place > 0 and logprobs[row, place - 1] < value:
                        logprobs[row, place] = logprobs[row, place - 1]
                        ids[row, place] = ids[row, place - 1]
                        place -= 1
                    logprobs[row, place] = value
                    ids[row, place] = at
                    worst = logprobs[row, k - 1]
            start = end
        best = logprobs[row, 0]
        total = np.float64(row_weights(np.float32(0), scratch, whole // LANES, np.float32(1), best))
        for at in range(size - whole):
            total += exp2(tail[row, at] - best)
        shift = np.log(total)
        for j in range(k):
            logprobs[row, j] = (np.float64(logprobs[row, j]) - best) * _LN2 - shift


class LogitsTopK:
    """Top-k of rows of logits; keeps its working memory from call to call."""

    def __init__(self, k: int) -> None:
        self.k = k
        self._scratch = np.zeros(0, np.float32)

    def __call__(self, logits: torch.Tensor) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """``int32[R, k]`` token ids, likeliest first (of equal ones, the smallest id first), and ``float32[R, k]``
        natural log-probabilities of ``logits`` (``[R, V]``, any float dtype, any device; not modified)."""
        rows, size = logits.shape
        name = str(logits.dtype).removeprefix("torch.")
        if logits.device.type != "cpu" or name not in KINDS or logits.stride(1) != 1 or size < self.k:
            return self._by_torch(logits)
        if len(self._scratch) < size + 16:
            self._scratch = np.zeros(size + 16, np.float32)
        ids, logprobs = np.empty((rows, self.k), np.int32), np.empty((rows, self.k), np.float32)
        tail = (logits[:, size // LANES * LANES :].float() * float(_LOG2E)).numpy()
        stride = logits.stride(0) * logits.element_size()
        _rows(KINDS[name], logits.data_ptr(), stride, size, self._scratch.ctypes.data, tail, ids, logprobs)
        return ids, logprobs

    def _by_torch(self, logits: torch.Tensor) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        numbers = logits.float()
        values, ids = torch.topk(numbers, min(self.k, logits.shape[1]), dim=-1)
        values = values - torch.logsumexp(numbers, dim=-1, keepdim=True)
        return ids.to(torch.int32).cpu().numpy(), values.cpu().numpy()
