"""What happens to a batch of requests between two target steps, compiled: learn, recycle, propose, check.

No function here checks bounds beyond what it says; :mod:`.drafting` calls them in the right order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from vllm_specplug.kernels.memory import kernel, load, store

from .base import Float32Array, Int32Array
from .mixture import HISTORY_MASK, Mixture, Scratch, learn, predict
from .recycling_table import Table, find_rows, recycle
from .suffix_automaton import LAST, LEN, advance, extend, has_room, record, settle
from .tree_growth import Forest, Nodes, Slots, grow, token_back

Int64Array = npt.NDArray[np.int64]

# Tokens a cursor is walked over to find its place in a store: longer contexts all fall in one length bucket.
REWALK = 32
# Candidates learned from per emitted token; twice as many give nothing.
LEARNED = 12


@kernel
def observe_batch(
    mix: Mixture,
    scratch: Scratch,
    table: Table,
    orders: int,
    per: Slots,
    slots: Int32Array,
    tokens: Int32Array,
    offsets: Int32Array,
    done: Int32Array,
) -> int:
    """Learn from emitted tokens and append them; counts in ``done``. Returns how many requests need more room."""
    full = 0
    for i in range(len(slots)):
        slot = slots[i]
        block, store_block, habits = per.block[slot], per.store[slot], per.habits[slot]
        last, state, matched, history = per.last[slot], per.state[slot], per.matched[slot], per.history[slot]
        sibling, common = per.sibling[slot], per.sibling_last[slot]
        if store_block != 0:
            state = settle(store_block, state, matched)
        for at in range(offsets[i] + done[i], offsets[i + 1]):
            token = np.int64(tokens[at])
            if block != 0:
                store(block, LAST, last)
            if sibling != 0:
                store(sibling, LAST, common)
            if (
                per.size[slot] == per.room[slot]
                or (block != 0 and not has_room(block, token))
                or (sibling != 0 and not has_room(sibling, token))
            ):
                full += 1
                break
            done[i] += 1
            if token >= 0:
                length = load(record(block, last), LEN) if block != 0 else np.int64(0)
                find_rows(
                    table,
                    per.space[slot],
                    orders,
                    token_back(per, slot, 1),
                    token_back(per, slot, 2),
                    token_back(per, slot, 3),
                    scratch.row,
                )
                shared = load(record(sibling, common), LEN) if sibling != 0 else np.int64(0)
                k, best = predict(
                    mix,
                    scratch,
                    habits,
                    block,
                    last,
                    length,
                    store_block,
                    state,
                    matched,
                    sibling,
                    common,
                    shared,
                    history,
                    LEARNED,
                )
                learn(mix, scratch, habits, token)
                hit = 1 if k > 0 and scratch.token[best] == token else 0
                history = (history << 1 | hit) & HISTORY_MASK
            store(per.text[slot], per.size[slot], token)
            per.size[slot] += 1
            per.left[slot] -= 1
            if block != 0:
                extend(block, token)
                last = load(block, LAST)
            if sibling != 0:
                extend(sibling, token)
                common = load(sibling, LAST)
            if store_block != 0:
                state, matched = advance(store_block, state, matched, token)
        per.last[slot], per.state[slot], per.matched[slot], per.history[slot] = last, state, matched, history
        per.sibling_last[slot] = common
    return full


@kernel
def recycle_batch(
    table: Table,
    orders: int,
    width: int,
    per: Slots,
    slots: Int32Array,
    tokens: Int32Array,
    offsets: Int32Array,
    row_tokens: Int32Array,
    row_offsets: Int32Array,
    row_parents: Int32Array,
    ids: Int32Array,
    logprobs: Float32Array,
    depth: Int64Array,
) -> None:
    """Learn every verified row; the emitted tokens are in the texts already. ``depth``: scratch, -1: not accepted."""
    for i in range(len(slots)):
        slot = slots[i]
        first, start, emitted = row_offsets[i], offsets[i], offsets[i + 1] - offsets[i]
        second, third = token_back(per, slot, emitted + 2), token_back(per, slot, emitted + 3)
        for row in range(first, row_offsets[i + 1]):
            own, parent, here = np.int64(row_tokens[row]), row_parents[row], row - first
            if parent < 0:
                depth[here] = 0
                recycle(table, per.space[slot], orders, width, own, second, third, ids, logprobs, row, True)
                continue
            above = depth[parent]
            accepted = above >= 0 and above < emitted - 1 and own == tokens[start + above]
            depth[here] = above + 1 if accepted else -1
            grand = row_parents[first + parent]
            before = np.int64(row_tokens[first + grand]) if grand >= 0 else second
            recycle(
                table,
                per.space[slot],
                orders,
                width,
                own,
                np.int64(row_tokens[first + parent]),
                before,
                ids,
                logprobs,
                row,
                accepted,
            )


@kernel
def all_live(per: Slots, slots: Int32Array) -> bool:
    for i in range(len(slots)):  # noqa: SIM110 - Numba compiles no generators
        if slots[i] < 0 or slots[i] >= len(per.text) or per.text[slots[i]] == 0:
            return False
    return True


@kernel
def sound(per: Slots, slots: Int32Array, offsets: Int32Array, size: int) -> bool:
    """Whether all slots have requests, and ``offsets`` cuts ``size`` things into as many parts."""
    if len(offsets) != len(slots) + 1 or offsets[0] < 0 or offsets[len(slots)] > size:
        return False
    for i in range(len(slots)):
        if offsets[i] > offsets[i + 1]:
            return False
    return all_live(per, slots)


@kernel
def hang_together(offsets: Int32Array, parents: Int32Array, most: int) -> bool:
    """Whether every row's parent is an earlier row of its request, and no request has more than ``most`` rows."""
    for i in range(len(offsets) - 1):
        if offsets[i + 1] - offsets[i] > most:
            return False
        for row in range(offsets[i], offsets[i + 1]):
            if parents[row] < -1 or parents[row] >= row - offsets[i]:
                return False
    return True


@kernel
def propose_batch(
    mix: Mixture,
    scratch: Scratch,
    nodes: Nodes,
    table: Table,
    orders: int,
    per: Slots,
    slots: Int32Array,
    limits: Int32Array,
    min_prob: float,
    most: int,
    out: Forest,
    offsets: Int32Array,
    matched: Int32Array,
) -> int:
    """Draft for a batch; returns the number of nodes. ``matched``: as in :class:`.base.DraftForest`."""
    size = 0
    for i in range(len(slots)):
        size += grow(mix, scratch, nodes, table, orders, per, slots[i], limits[i], min_prob, most, out, size)
        offsets[i + 1] = size
        matched[i] = max(nodes.length[0], nodes.matched[0], nodes.common[0])
    return size


@kernel
def rewalk(store_block: int, per: Slots, slot: int) -> None:
    """Put a request's cursor into a store where the end of its text is."""
    text, size = per.text[slot], per.size[slot]
    s, m = np.int64(0), np.int64(0)
    if store_block != 0:
        for at in range(max(0, size - REWALK), size):
            s, m = advance(store_block, s, m, load(text, at))
    per.state[slot] = s
    per.matched[slot] = m
