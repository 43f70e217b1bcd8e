"""Which path of a draft tree the target model took: compiled walks over the trees of a whole batch.

Rows: request ``i`` has ``sizes[i] + 1`` rows, one after the other, in batch order: row 0 is its last token, row ``m``
its draft token ``m - 1``. ``parents[row]`` is the row's parent among its request's rows (-1 for row 0), always before
it; an empty ``parents`` says that every draft is a chain. A target token drawn at a row is accepted as draft if a child
of the row holds it, and the walk goes on there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from vllm_specplug.kernels.memory import kernel

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@kernel
def _child(
    row: int, token: int, size: int, first: int, first_draft: int, parents: Int32Array, drafts: Int32Array
) -> int:
    """The child of ``row`` that holds ``token``, -1 if there is none."""
    for m in range(row + 1, size + 1):
        parent = parents[first + m] if len(parents) > 0 else m - 1
        if parent == row and drafts[first_draft + m - 1] == token:
            return m
        if len(parents) == 0:
            return -1
    return -1


@kernel
def walk(
    sizes: Int32Array,
    parents: Int32Array,
    drafts: Int32Array,
    drawn: Int64Array,
    tokens: Int32Array,
    paths: Int32Array,
    lengths: Int32Array,
) -> None:
    """Walk every tree where the target's token is known at every row.

    Args:
        sizes: ``int32[B]`` draft tokens per request.
        parents: ``int32[R]`` or ``int32[0]``, see the module.
        drafts: ``int32[R - B]`` draft tokens, requests one after the other.
        drawn: ``int64[R]`` the target's token at each row.
        tokens, paths: ``int32[B, max(sizes) + 1]``, filled: tokens emitted, and the row each was drawn at; -1 after the
            last.
        lengths: ``int32[B]``, filled: tokens emitted, at least 1.
    """
    first = 0
    for i in range(len(sizes)):
        row = 0
        length = 0
        while row >= 0:
            token = drawn[first + row]
            tokens[i, length] = token
            paths[i, length] = row
            length += 1
            row = _child(row, token, sizes[i], first, first - i, parents, drafts)
        lengths[i] = length
        for k in range(length, tokens.shape[1]):
            tokens[i, k] = -1
            paths[i, k] = -1
        first += sizes[i] + 1


@kernel
def advance(
    active: Int64Array,
    drawn: Int32Array,
    level: int,
    starts: Int64Array,
    sizes: Int32Array,
    parents: Int32Array,
    drafts: Int32Array,
    rows: Int32Array,
    tokens: Int32Array,
    paths: Int32Array,
    lengths: Int32Array,
    following: Int64Array,
) -> int:
    """One step of every walk that goes on, where the target's token is drawn only at the rows reached.

    Args:
        active: ``int64[a]`` the requests that drew a token, rising.
        drawn: ``int32[a]`` their tokens.
        level: tokens each of them emitted before.
        starts: ``int64[B]`` first row of each request.
        sizes, parents, drafts, tokens, paths, lengths: as in :func:`walk`; column ``level`` is filled for ``active``.
        rows: ``int32[B]`` the row each active request drew at; becomes the row where it goes on.
        following: ``int64[B]``, filled: the requests that go on, rising.

    Returns:
        How many go on.
    """
    count = 0
    for j in range(len(active)):
        i = active[j]
        tokens[i, level] = drawn[j]
        paths[i, level] = rows[i]
        lengths[i] = level + 1
        row = _child(rows[i], drawn[j], sizes[i], starts[i], starts[i] - i, parents, drafts)
        if row >= 0:
            rows[i] = row
            following[count] = i
            count += 1
    return count
