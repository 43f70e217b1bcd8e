"""Parts of attention on the CPU that its kernels share: a call's words, scores made weights, chosen units attended."""

from __future__ import annotations

import numpy as np
from vllm_specplug.kernels import lanes
from vllm_specplug.kernels.lanes import LANES
from vllm_specplug.kernels.memory import kernel, load
from vllm_specplug.kernels.products import multiply

# Keys whose scores are held at a time, rounded down to whole blocks (at least one). 128 was slower, 512 no faster.
PANEL_KEYS = 256
# Words of a call's description, all int64 but the scale; up to there they change with the layer. CHOSEN, where it is
# not 0, is the address of `int32[trees, kv_heads, 1 + most]`: how many units of the context a tree attends (-1: all of
# it), and which, rising; TAILS that of `int32[trees]`, the block from which on it attends everything.
QUERY, OUT, KEY, VALUE = range(4)
QUERY_ROW, QUERY_HEAD, OUT_ROW, OUT_HEAD, KEY_BLOCK, KEY_HEAD, VALUE_BLOCK, VALUE_HEAD = range(4, 12)  # bytes
HEADS, KV_HEADS, WINDOW, ROWS_AT_ONCE, SCRATCH, SCRATCH_BYTES, NEXT_ITEM, NEXT_WORKER, SCALE = range(12, 21)
HEAD_SIZE, BLOCK_SIZE, ELEMENT, KEYS_IN_PLACE, VALUES_IN_PLACE = range(21, 26)
KEY_TABLE, VALUE_TABLE, KEY_RUN, VALUE_RUN, KEY_STRIDE = range(26, 31)
TREES, STARTS, SIZES, CONTEXTS, REQUESTS, DEPTHS, VISIBLE, VISIBLE_ROW, TABLE, TABLE_ROW = range(31, 41)
CHOSEN, CHOSEN_TREE, CHOSEN_HEAD, TAILS, UNIT = range(41, 46)
WORDS = 48


@kernel
def weigh(  # type: ignore[no-untyped-def]
    kind, scale, scores, row_bytes, padded, queries, maxima, totals, sums, width, vectors, fresh
):  # fmt: skip
    """Make the ``padded`` vectors of scores, times ``scale``, of each query weights under a running maximum.

    They are what products with ``kind`` take, see `lanes.row_weights`. ``scores``, ``maxima``, ``totals`` and ``sums``
    are addresses of float32, with ``row_bytes`` and ``width`` from one query to the next; sums of ``vectors`` vectors
    are scaled to the new maximum, unless ``fresh``: they hold nothing.
    """
    floats = np.float32(0)
    for q in range(queries):
        line = scores + q * row_bytes
        before = lanes.load_number(maxima, q)
        largest = max(before, lanes.row_largest(floats, line, padded) * scale)
        # A row that has seen nothing yet: any finite shift makes all weights 0.
        shift = largest if largest > np.float32(-np.inf) else np.float32(0)
        added = lanes.row_weights(kind, line, padded, scale, shift)
        if not fresh:
            fade = lanes.exp2(before - shift)
            added += lanes.load_number(totals, q) * fade
            if before < largest:
                lanes.row_copy(floats, sums + q * width, floats, sums + q * width, vectors, fade)
        lanes.store_number(maxima, q, largest)
        lanes.store_number(totals, q, added)


@kernel
def _neighbours(units, at, left, per_block):  # type: ignore[no-untyped-def]
    """How many of ``left`` units, listed from place ``at`` on, lie side by side in one block: they are one product."""
    first = load(units, at)
    run = 1
    while run < left and (first + run) % per_block and load(units, at + run) == first + run:
        run += 1
    return run


@kernel
def attend_chosen(  # type: ignore[no-untyped-def]
    kind, call, chosen, table, keys_at, values_at,
    packed, sums, scores, row_bytes, maxima, totals, gathered, queries,
):  # fmt: skip
    """Attend the units listed at ``chosen`` (a count, then units) for one KV head; whether there was none.

    Every query sees all of them, so nothing is masked. ``table``, ``keys_at`` and ``values_at`` are addresses of the
    request's blocks and of the KV head's part of the caches' first block, the others those of `weigh`.
    """
    head_size = lanes.load_wide(call, HEAD_SIZE)
    block_size = lanes.load_wide(call, BLOCK_SIZE)
    element = lanes.load_wide(call, ELEMENT)
    keys_in_place = lanes.load_wide(call, KEYS_IN_PLACE)
    values_in_place = lanes.load_wide(call, VALUES_IN_PLACE)
    key_block = lanes.load_wide(call, KEY_BLOCK)
    value_block = lanes.load_wide(call, VALUE_BLOCK)
    unit = lanes.load_wide(call, UNIT)
    scale = abs(lanes.load_number(call, 2 * SCALE))
    factor = lanes.factor_width(kind)
    vectors = head_size // LANES
    width = head_size * 4
    per_block = block_size // unit
    most = max(1, PANEL_KEYS // unit)
    count = load(chosen, 0)
    fresh = True
    at = 0
    while at < count:
        taken = min(most, count - at)
        i = 0
        while i < taken:
            first = load(chosen, 1 + at + i)
            run = _neighbours(chosen, 1 + at + i, taken - i, per_block)
            block = load(table, first // per_block)
            from_keys = keys_at + block * key_block
            pitch = block_size * element
            if keys_in_place == 0:
                pitch = lanes.load_wide(call, KEY_STRIDE)
                every = head_size * (pitch // element) // LANES
                key_table = lanes.load_wide(call, KEY_TABLE)
                lanes.row_gather(kind, from_keys, key_table, gathered, every, lanes.load_wide(call, KEY_RUN))
                from_keys = gathered
            elif values_in_place != 0:
                # The choice jumps about, so the processor does not see what comes next: the next keys, these values.
                if at + i + run < count:
                    after = load(chosen, 1 + at + i + run)
                    there = keys_at + load(table, after // per_block) * key_block + after % per_block * unit * element
                    lanes.rows_fetch(there, pitch, head_size, unit * element)
                there = values_at + block * value_block + first % per_block * unit * head_size * element
                lanes.rows_fetch(there, 0, 1, run * unit * head_size * element)
            multiply(
                kind, packed, head_size * factor, from_keys + first % per_block * unit * element, pitch, element,
                scores + i * unit * 4, row_bytes, queries, run * unit // LANES, head_size, 0,
            )  # fmt: skip
            i += run
        weigh(
            kind, scale, scores, row_bytes, taken * unit // LANES, queries,
            maxima, totals, sums, width, vectors, fresh,
        )  # fmt: skip
        i = 0
        while i < taken:
            first = load(chosen, 1 + at + i)
            run = _neighbours(chosen, 1 + at + i, taken - i, per_block)
            from_values = values_at + load(table, first // per_block) * value_block
            offset = first % per_block * unit * head_size
            if values_in_place == 0:
                value_table = lanes.load_wide(call, VALUE_TABLE) + offset * 4
                every = run * unit * vectors
                lanes.row_gather(kind, from_values, value_table, gathered, every, lanes.load_wide(call, VALUE_RUN))
                from_values = gathered
            else:
                from_values += offset * element
            multiply(
                kind, scores + i * unit * factor, row_bytes, from_values, head_size * element, element,
                sums, width, queries, vectors, run * unit, 0 if fresh else 1,
            )  # fmt: skip
            fresh = False
            i += run
        at += taken
    return fresh
