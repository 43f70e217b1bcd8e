"""What vLLM's FLASH_ATTN backend calls, written out in PyTorch, so that its own code runs on this machine's CPU.

Only three compiled functions are these; the backend's metadata builder, with FlashAttention 3's schedules made before a
step, its attention and its cache updates are vLLM's. The stand-ins are strict: a schedule made for other lengths, or a
bound that the lengths pass, is an error here, where the compiled ones would read past the end or leave rows out.
Source: vllm/v1/attention/backends/flash_attn.py and vllm/vllm_flash_attn/flash_attn_interface.py of vLLM 0.32.
"""

from __future__ import annotations

from typing import Any

import torch


def stand_in(version: int) -> None:
    """Let vLLM find FlashAttention 2 or 3, of these functions. Before its backend is imported."""
    from vllm.v1.attention.backends import fa_utils

    fa_utils.get_flash_attn_version = lambda *args, **settings: version
    fa_utils.is_flash_attn_varlen_func_available = lambda: True
    fa_utils.compile_flash_attn_varlen_func_from_specs = None
    fa_utils.flash_attn_varlen_func = flash_attn_varlen_func
    fa_utils.get_scheduler_metadata = get_scheduler_metadata
    fa_utils.reshape_and_cache_flash = reshape_and_cache_flash


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """Write rows ``[rows, kv_heads, head_size]`` to slots of ``[blocks, block_size, kv_heads, head_size]``; slot -1:
    nowhere."""
    rows = torch.nonzero(slot_mapping >= 0).flatten()
    slots, size = slot_mapping[rows], key_cache.shape[1]
    key_cache[slots // size, slots % size] = key[rows]
    value_cache[slots // size, slots % size] = value[rows]


def _schedule(queries: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """What stands in a schedule: one word, and four per request, rounded up to four requests."""
    count = len(lengths)
    words = torch.zeros(1 + -(-count // 4) * 16, dtype=torch.int32)
    words[0] = count
    words[1 : 1 + 2 * count : 2] = queries.diff()
    words[2 : 2 + 2 * count : 2] = lengths
    return words


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    causal: bool,
    window_size: Any,
    num_splits: int,
    **of_model: Any,
) -> torch.Tensor:
    """A schedule of FlashAttention 3: here, the lengths that it was made for."""
    assert batch_size == len(cache_seqlens) == len(cu_seqlens_q) - 1 and causal
    return _schedule(cu_seqlens_q, cache_seqlens)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: Any,
    block_table: torch.Tensor,
    scheduler_metadata: torch.Tensor | None,
    fa_version: int,
    num_splits: int,
    **unused: Any,
) -> None:
    """Causal attention over a paged cache; the last row of a request sees all of its ``seqused_k`` slots."""
    assert causal and all(unused[name] is None for name in ("alibi_slopes", "s_aux", "mask_mod", "dynamic_causal"))
    assert not unused["softcap"] and k.stride(-1) == v.stride(-1) == 1
    sizes = cu_seqlens_q.diff()
    assert int(sizes.max()) <= max_seqlen_q and int(seqused_k.max()) <= max_seqlen_k and int(cu_seqlens_q[-1]) <= len(q)
    if scheduler_metadata is not None:
        assert fa_version == 3
        assert torch.equal(scheduler_metadata, _schedule(cu_seqlens_q, seqused_k)), "a schedule of another step"
    group = q.shape[1] // k.shape[2]
    left = -1 if window_size is None else window_size[0]
    for request, (start, rows) in enumerate(zip(cu_seqlens_q.tolist(), sizes.tolist(), strict=False)):
        if not rows:
            continue
        length = int(seqused_k[request])
        blocks = block_table[request, : -(-length // k.shape[1])].long()
        keys, values = (c[blocks].flatten(0, 1)[:length].repeat_interleave(group, 1) for c in (k, v))
        slot, last = torch.arange(length), length - rows + torch.arange(rows)[:, None]
        seen = (slot <= last) & ((slot >= last - left) if left >= 0 else torch.ones((), dtype=torch.bool))
        scores = torch.einsum("rhd,khd->hrk", q[start : start + rows], keys) * softmax_scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[start : start + rows] = torch.einsum("hrk,khd->rhd", weights, values)
