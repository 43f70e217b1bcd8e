"""What a step's rows are where draft trees stay on the device: parents, depths, who sees whom, rotary positions.

A tree is kept as one parent per draft node, by the request's slot. A step's rows are made from these: a request whose
rows are all verified (its last token and draft tokens) is the beginning of its tree, everything else is a chain.
`tree_rows_reference` is the definition that the compiled kernel is tested against.
"""

from __future__ import annotations

import torch


def tree_rows_reference(
    starts: torch.Tensor,
    verified: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
    parents: torch.Tensor,
    row_parents: torch.Tensor,
    depths: torch.Tensor,
    bits: torch.Tensor,
    positions: torch.Tensor,
    most: int,
) -> None:
    """Fill the rows of every request that has no more than ``most``; the others' are left as they are.

    Args:
        starts: ``int32[n + 1]`` first row of each request, and after the last.
        verified: ``int32[n + 1]`` first verified row of each request among all of the step's, and after the last. A
            request's verified rows are its last ones.
        lengths: ``int32[n]`` tokens in the cache, the request's rows included.
        slots: ``int[n]`` slot of each request.
        parents: ``int32[slots, K]`` parent of each draft node: row among the request's, 0 the root, node j being row
            ``j + 1``. One that is not before its node counts as the nearest row that is.
        row_parents, depths: ``int32[T]``, written: parent among the request's rows (-1: the first), steps from it.
        bits: ``int32[T, words]``, written: rows of the request that a row sees, see `ancestor_bits`.
        positions: ``int64[T]``, written: slots before the request's rows, and the depth.
    """
    for i, slot in enumerate(slots.tolist()):
        start, rows = int(starts[i]), int(starts[i + 1] - starts[i])
        if rows > most:
            continue
        context = int(lengths[i]) - rows
        tree = rows == int(verified[i + 1] - verified[i])
        seen: list[set[int]] = []
        for m in range(rows):
            parent = m - 1
            if tree and m:
                parent = min(max(int(parents[slot, m - 1]), 0), m - 1)
            seen.append({m} | (seen[parent] if m else set()))
            row_parents[start + m] = parent
            depths[start + m] = len(seen[m]) - 1
            positions[start + m] = context + len(seen[m]) - 1
            for word in range(bits.shape[1]):
                mask = sum(1 << (row - 32 * word) for row in seen[m] if row // 32 == word)
                bits[start + m, word] = mask - 2**32 if mask >= 2**31 else mask
