"""`kv_move` in Triton: accepted rows' K and V to their final slots, all layers in one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from vllm_specplug.kernels.kv_move import by_slot
from vllm_specplug.kernels.triton_tools import Work, check

#: Integers that data is moved as, by their bytes.
_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
#: Most words of a program. With 4 warps a thread holds 4 words: two accesses of 16 bytes in flight for words of 8.
_LARGEST_CHUNK = 512
#: Words that a warp moves by one access of 16 bytes per thread, for words of 8. No smaller chunk would keep its threads
#: busy.
_SMALLEST_CHUNK = 64


class KVMover:
    """The KV caches of the layers of one group, prepared for `kv_move`. Made once: addresses must not change after.

    Attributes:
        addresses: ``int64[layers]`` where each cache begins, on the caches' device.
        device: the caches'.
        block_size: slots per block.
        slot_bytes: bytes of a slot in one layer.
    """

    def __init__(self, kv_caches: Sequence[torch.Tensor], block_size: int, parts_dim: int | None = None) -> None:
        """
        Args:
            kv_caches: one per layer, see `by_slot`; all have one shape, dtype, device and strides.
            block_size: slots per block of the block table.
            parts_dim: see `by_slot`.

        Raises:
            ValueError: there is no cache, a shape is wrong, or caches differ.
        """
        if not kv_caches:
            raise ValueError("a KVMover needs at least one layer's KV cache, got none")
        first = kv_caches[0]
        for layer, cache in enumerate(kv_caches):
            for name in ("shape", "dtype", "device"):
                found, wanted = getattr(cache, name), getattr(first, name)
                if found != wanted:
                    raise ValueError(f"layer {layer}: the KV cache's {name} must be layer 0's {wanted}, got {found}")
            if cache.stride() != first.stride():
                raise ValueError(
                    f"layer {layer}: the KV cache's strides must be layer 0's {first.stride()}, got {cache.stride()}"
                )
        view = by_slot(first, block_size, parts_dim)
        parts, heads, width = view.shape[2:]
        block, slot, part, head, _ = view.stride()
        # What lies side by side is one run.
        if head == width or heads == 1:
            heads, width, head = 1, heads * width, 0
            if part == width or parts == 1:
                parts, width, part = 1, parts * width, 0
        self._caches = list(kv_caches)  # they live as long as their addresses are used
        self.device = first.device
        self.block_size = block_size
        addresses = [cache.data_ptr() for cache in kv_caches]
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=self.device)
        size = first.element_size()
        self.slot_bytes = parts * heads * width * size
        in_bytes = [n * size for n in (block, slot, part, head, width)]
        aligned = math.gcd(16, *addresses, *in_bytes)
        word = min(aligned, 8)
        self.strides = tuple(n // word for n in in_bytes[:4])
        total = self.slot_bytes // word
        chunk = min(max(triton.next_power_of_2(total), _SMALLEST_CHUNK), _LARGEST_CHUNK)
        self.chunks = triton.cdiv(total, chunk)
        self.constants = {
            "BLOCK_SIZE": block_size,
            "HEADS": heads,
            "WIDTH": in_bytes[4] // word,
            "TOTAL": total,
            "WORD": _WORDS[word],
            "WORD_BYTES": word,
            "VECTOR": aligned // word,
            "CHUNK": chunk,
            "num_warps": max(1, chunk // 128),
        }


@triton.jit(do_not_specialize=["depth", "table_stride"])
def kv_move_kernel(  # type: ignore[no-untyped-def]
    addresses_ptr,  # *int64 [layers] where each layer's cache begins; out: the slots' data
    block_table_ptr,  # *int32 [n, blocks]
    sources_ptr,  # *int32 [n, depth] slot within the request, -1: none
    targets_ptr,  # *int32 [n, depth] slot within the request, -1: none
    depth,
    table_stride,  # elements between rows of the block table
    block_stride,  # words between blocks, slots, parts and heads
    slot_stride,
    part_stride,
    head_stride,
    BLOCK_SIZE: tl.constexpr,  # slots per block
    HEADS: tl.constexpr,  # runs of a part
    WIDTH: tl.constexpr,  # words of a run
    TOTAL: tl.constexpr,  # words of a slot
    WORD: tl.constexpr,  # integer type of a word
    WORD_BYTES: tl.constexpr,
    VECTOR: tl.constexpr,  # every run begins at a multiple of so many words; at most 16 bytes
    CHUNK: tl.constexpr,  # words of a slot that a program moves
    LEVELS: tl.constexpr,  # power of two, at least depth
):
    """Grid: (n, layers, chunks of a slot). A program makes all moves of one request, in order, of its words.

    Nothing a program reads is written by another, and its own words stay with the same threads from move to move, so
    the order within the program is all that overlapping moves need.
    """
    request = tl.program_id(0).to(tl.int64)  # 64 bits: products with strides may pass 2^31
    layer = tl.program_id(1)
    column = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)

    # Where all moves begin and end is known before the first: a loop that read it move by move would wait for three
    # loads each time.
    level = tl.arange(0, LEVELS)
    at = request * depth + level
    source = tl.load(sources_ptr + at, mask=level < depth, other=-1)
    target = tl.load(targets_ptr + at, mask=level < depth, other=-1)
    moved = (source >= 0) & (target >= 0)
    table = block_table_ptr + request * table_stride
    source_block = tl.load(table + source // BLOCK_SIZE, mask=moved, other=0).to(tl.int64)
    target_block = tl.load(table + target // BLOCK_SIZE, mask=moved, other=0).to(tl.int64)
    begin = source_block * block_stride + (source % BLOCK_SIZE).to(tl.int64) * slot_stride
    end = target_block * block_stride + (target % BLOCK_SIZE).to(tl.int64) * slot_stride
    last = tl.max(tl.where(moved, level + 1, 0), axis=0)

    part = (column // (HEADS * WIDTH)).to(tl.int64)
    head = (column // WIDTH % HEADS).to(tl.int64)
    offset = part * part_stride + head * head_stride + column % WIDTH
    # The compiler cannot know that strides and addresses allow accesses of VECTOR words.
    offset = tl.max_contiguous(tl.multiple_of(offset, VECTOR), VECTOR)
    cache = tl.load(addresses_ptr + layer).to(tl.pointer_type(WORD))
    for j in range(0, last):
        here = moved & (level == j)
        if tl.max(here.to(tl.int32), axis=0) > 0:
            from_slot = tl.multiple_of(cache + tl.sum(tl.where(here, begin, 0), axis=0), VECTOR * WORD_BYTES)
            to_slot = tl.multiple_of(cache + tl.sum(tl.where(here, end, 0), axis=0), VECTOR * WORD_BYTES)
            words = tl.load(from_slot + offset, mask=column < TOTAL)
            tl.store(to_slot + offset, words, mask=column < TOTAL)


def kv_move(caches: KVMover, block_table: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Move accepted rows to their final slots in all layers, in place; see `kv_move_reference`.

    Args:
        caches: of the layers that share ``block_table``.
        block_table: ``int32[>= n, max_blocks]``, rows of any stride.
        sources, targets: ``int32[n, depth]``, contiguous, as `tree_walk` writes them; -1: no move. Slots must be in the
            block table: that is not checked.

    Raises:
        ValueError: a dtype, shape, device or stride is wrong.
    """
    check("sources", sources, torch.int32, (None, None), caches.device)
    count, depth = sources.shape
    check("targets", targets, torch.int32, (count, depth), caches.device)
    check("block_table", block_table, torch.int32, (None, None), caches.device, contiguous=False)
    if len(block_table) < count:
        raise ValueError(f"block_table must have at least {count} rows, one per request, got {len(block_table)}")
    if not count or not depth:
        return
    kv_move_kernel[(count, len(caches.addresses), caches.chunks)](
        *(caches.addresses, block_table, sources, targets, depth, block_table.stride(0), *caches.strides),
        LEVELS=triton.next_power_of_2(depth),
        **caches.constants,
    )


def work(caches: KVMover, moves: int) -> Work:
    """Each moved slot is read and written once in each layer: ``2 * moves * layers * slot_bytes`` bytes."""
    return Work(bytes=2 * moves * len(caches.addresses) * caches.slot_bytes, operations=0)
