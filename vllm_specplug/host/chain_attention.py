"""Chains, and rows that draft nothing, through this plugin's attention instead of vLLM's: where that is faster.

Both attend the same tokens, so this changes no more than any other kernel would. Which is faster depends on the
processor and on vLLM's own kernel for it, so both are timed when the engine starts, on each group's first layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_specplug.kernels.tree_attention import TreeBatch, build_trees

#: Tokens in the cache from which on a request's rows are this plugin's, where it is faster. There a step of 1, 4 and 8
#: rows took 0.98, 0.93 and 0.92 of its time; with half the tokens 0.99, 0.97 and 0.96, which is not worth two kernels.
LONG = 1024
# Tokens in the cache, and rows, for which both are timed; each must be faster by so much.
_CONTEXT, _ROWS = 2048, (1, 8)
_WORTH = 0.95
_TURNS = 9


def chain_step(rows: int, context: int, blocks: int, block_size: int) -> tuple[CommonAttentionMetadata, TreeBatch]:
    """One request of ``rows`` rows after ``context`` tokens, in any of a cache's ``blocks``, for either attention."""
    total = context + rows
    table = torch.arange(-(-total // block_size), dtype=torch.int32)[None] % blocks
    starts = torch.tensor([0, rows], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([total], dtype=torch.int32),
        num_reqs=1,
        num_actual_tokens=rows,
        max_query_len=rows,
        max_seq_len=total,
        block_table_tensor=table,
        slot_mapping=torch.zeros(rows, dtype=torch.int64),
    )
    one = np.ones(1, np.int32)
    parents = np.arange(-1, rows - 1, dtype=np.int32)
    return common, build_trees(one - 1, one * rows, one * context, one - 1, parents)


def faster(own: Callable[[], Any], host: Callable[[], Any]) -> bool:
    """Whether ``own`` takes less time, by enough, than ``host``: the least of several turns, for other processes may
    disturb some."""
    seconds: list[list[float]] = [[], []]
    for _ in range(_TURNS):
        for run, found in zip((own, host), seconds, strict=True):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    # The first turn compiles.
    ours, theirs = (min(found[1:]) for found in seconds)
    return ours <= _WORTH * theirs


def long_contexts(
    blocks: int, block_size: int, own: Callable[..., Any], host: Callable[..., Any], longest: int
) -> bool:
    """Whether one group's attention of long contexts is faster by this plugin.

    Args:
        blocks, block_size: of the KV cache.
        own, host: attend, given what `chain_step` returns and the number of rows.
        longest: tokens a context can have.
    """
    if longest <= LONG:
        return False
    for rows in _ROWS:
        step = chain_step(rows, min(_CONTEXT, longest), blocks, block_size)
        ours, theirs = own(rows, *step), host(rows, *step)
        if not faster(ours, theirs):
            return False
    return True
