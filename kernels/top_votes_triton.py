"""The entries with most votes, inside a Triton program: exactly as many as asked for, of equal votes the earlier."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def most_voted(votes, index, forced, count, total):  # type: ignore[no-untyped-def]
    """Choose ``count`` of the entries 0 to ``total - 1``: the first ``forced`` and those of most votes after them.

    Votes that are not negative order as their bits do, so the least vote that is chosen is found by bisection of the
    bits, ended as soon as exactly as many as wanted are at least as large. NaN counts as the largest vote.

    Args:
        votes: ``float32[BLOCK]``, not negative; at most 32,767 entries, for two counts share 32 bits.
        index: ``int32[BLOCK]`` 0, 1, ...
        forced, count, total: scalars, ``0 <= forced <= count <= total <= BLOCK``.

    Returns:
        ``bool[BLOCK]`` what is chosen, and ``int32[BLOCK]`` its place among what is chosen, rising.
    """
    candidate = (index >= forced) & (index < total)
    # The sign bit is only that of NaN or -0; all NaN become one number, one above infinity.
    bits = tl.minimum(votes.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)
    keys = tl.where(candidate, bits, -1)
    wanted = count - forced
    # So many keys as wanted or more are at least `low`, fewer are at least `high`.
    high = tl.max(keys, 0) + 1
    low = high * 0
    at_least = low + (total - forced)
    while (high - low > 1) & (at_least != wanted):
        middle = low + ((high - low) >> 1)
        reached = tl.sum((keys >= middle).to(tl.int32), 0)
        enough = reached >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        at_least = tl.where(enough, reached, at_least)
    above, equal = keys > low, keys == low
    missing = wanted - tl.sum(above.to(tl.int32), 0)
    # One scan for both ranks.
    ranks = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
    ties = ranks >> 16
    chosen = above | (equal & (ties <= missing)) | (index < forced)
    place = forced + (ranks & 0xFFFF) + tl.minimum(ties, missing) - 1
    return chosen, tl.where(index < forced, index, place)
