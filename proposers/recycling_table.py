"""Bounded table of what the target ranked highest after the last tokens: after three, two, one and none of them.

Token Recycling (arXiv 2408.08696) keeps, per token id, the target's own top-k after it, rejected rows included, the
last occurrence winning. Here a key is the last one, two or three tokens (as in STAND, arXiv 2506.04708, and ADED,
arXiv 2407.12021), and a row keeps how probable the target said each was. The row of no token is a running mean over
emitted tokens: what is likely anywhere.

A row is one cache line. Rows live in sets of WAYS; in a full set the row written longest ago gives way, so the table
never outgrows its budget. Keys are tagged with 62 bits of a hash of (namespace, tokens): no namespace sees another's
rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from vllm_specplug.kernels.memory import kernel, load, store

from .base import Float32Array, Int32Array
from .saved_state import Array, State, check

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

WIDTH = 8
# Keys of 0, 1, 2 and 3 tokens.
ORDERS = 4
WAYS = 4
# Row, int32 fields. PROBS: WIDTH bytes, least significant first.
TAG, IDS, PROBS, STAMP, SIZE, SEEN = 0, 2, 10, 12, 13, 14
ROW_BYTES = 64
# A byte is -log2(probability) in these steps, up to 15.9.
_STEPS = 16.0
_PROB = np.exp2(-np.arange(256) / _STEPS)
# The row of no token forgets over this many emitted tokens.
_SPAN = 200.0
_STAMP_MASK = 0x7FFFFFFF

# Unsigned: Numba marks signed products as never overflowing, and LLVM makes use of it.
_U = np.uint64
_MIX1, _MIX2 = _U(0x9E3779B97F4A7C15), _U(0xBF58476D1CE4E5B9)
_SIGN = _U(0x7FFFFFFFFFFFFFFF)


class Table(NamedTuple):
    """Compiled code's view of a :class:`RecyclingTable`. ``address`` 0: no table."""

    address: int
    mask: int  # sets - 1
    anywhere: bool  # whether there is a row of no token
    clock: Int64Array  # [1] rows written
    ids: Int64Array  # [2 * WIDTH] scratch
    share: Float64Array  # [2 * WIDTH] scratch


@kernel
def key_hash(space: int, order: int, last: int, second: int, third: int) -> int:
    """63-bit hash of a key of ``order`` tokens, from the last one backwards; the others are ignored."""
    h = (_U(space) * _U(8) + _U(order + 1)) * _MIX1
    if order > 0:
        h = (h ^ (h >> _U(29))) * _MIX2 + _U(last)
    if order > 1:
        h = (h ^ (h >> _U(31))) * _MIX1 + _U(second)
    if order > 2:
        h = (h ^ (h >> _U(27))) * _MIX2 + _U(third)
    h = (h ^ (h >> _U(30))) * _MIX1
    return int(np.int64((h ^ (h >> _U(32))) & _SIGN))


@kernel
def _set(table: Table, h: int) -> int:
    return table.address + ((h >> 7) & table.mask) * (WAYS * ROW_BYTES)


@kernel
def find_row(table: Table, h: int) -> int:
    """Address of the row of hash ``h``, or 0."""
    row = _set(table, h)
    low, high = h & 0x7FFFFFFF, (h >> 31) & 0x7FFFFFFF
    for _ in range(WAYS):
        if load(row, TAG) == low and load(row, TAG + 1) == high and load(row, SIZE) > 0:
            return row
        row += ROW_BYTES
    return 0


@kernel
def _claim(table: Table, h: int) -> int:
    """Address of the row of hash ``h``; if there is none, the row of its set written longest ago, emptied."""
    first = _set(table, h)
    low, high = h & 0x7FFFFFFF, (h >> 31) & 0x7FFFFFFF
    clock = table.clock[0] & _STAMP_MASK
    table.clock[0] += 1
    row, chosen, age = first, first, np.int64(-1)
    for _ in range(WAYS):
        size = load(row, SIZE)
        if size > 0 and load(row, TAG) == low and load(row, TAG + 1) == high:
            store(row, STAMP, clock)
            return row
        unused = np.int64(1) << 32 if size == 0 else (clock - load(row, STAMP)) & _STAMP_MASK
        if unused > age:
            chosen, age = row, unused
        row += ROW_BYTES
    store(chosen, TAG, low)
    store(chosen, TAG + 1, high)
    store(chosen, STAMP, clock)
    store(chosen, SIZE, 0)
    store(chosen, SEEN, 0)
    return chosen


@kernel
def prob_byte(row: int, rank: int) -> int:
    """-log2 of the probability of a row's entry, in 16ths, at most 255."""
    return (load(row, PROBS + (rank >> 2)) >> (8 * (rank & 3))) & 255


@kernel
def _byte(steps: float) -> int:
    return int(min(max(steps, 0.0), 255.0))


@kernel
def _write_bytes(row: int, low: int, high: int, size: int) -> None:
    store(row, PROBS, low)
    store(row, PROBS + 1, high)
    store(row, SIZE, size)


@kernel
def _overwrite(row: int, ids: Int32Array, logprobs: Float32Array, at: int, width: int) -> None:
    """Write row ``at`` of the target's top-k arrays, best first."""
    low, high = 0, 0
    for j in range(width):
        store(row, IDS + j, ids[at, j])
        byte = _byte(logprobs[at, j] * (-_STEPS * 1.4426950408889634))
        if j < 4:
            low |= byte << (8 * j)
        else:
            high |= byte << (8 * (j - 4))
    _write_bytes(row, low, high, width)


@kernel
def _average(table: Table, row: int, ids: Int32Array, logprobs: Float32Array, at: int, width: int) -> None:
    """Mix row ``at`` of the target's top-k arrays into a running mean; the most probable WIDTH stay."""
    size, seen = load(row, SIZE), load(row, SEEN)
    keep = min(seen / (seen + 1.0), 1.0 - 1.0 / _SPAN)
    n = width
    for j in range(width):
        table.ids[j] = ids[at, j]
        table.share[j] = (1.0 - keep) * np.exp(np.float64(logprobs[at, j]))
    for i in range(size):
        old, share, known = load(row, IDS + i), keep * _PROB[prob_byte(row, i)], False
        for j in range(width):
            if table.ids[j] == old:
                table.share[j] += share
                known = True
                break
        if not known:
            table.ids[n] = old
            table.share[n] = share
            n += 1
    low, high, most = 0, 0, min(n, WIDTH)
    for j in range(most):
        best = j
        for i in range(j + 1, n):
            if table.share[i] > table.share[best]:
                best = i
        token, share = table.ids[best], table.share[best]
        table.ids[best], table.share[best] = table.ids[j], table.share[j]
        store(row, IDS + j, token)
        # Rounded up or down at random: one token changes a share by less than a byte's step.
        dither = ((_U(table.clock[0] + j) * _MIX1) >> _U(40)) / 16777216.0
        byte = _byte(np.log2(max(share, 1e-9)) * -_STEPS + dither)
        if j < 4:
            low |= byte << (8 * j)
        else:
            high |= byte << (8 * (j - 4))
    _write_bytes(row, low, high, most)
    store(row, SEEN, min(seen + 1, 1 << 20))


@kernel
def find_rows(table: Table, space: int, orders: int, last: int, second: int, third: int, rows: Int64Array) -> None:
    """Addresses of the rows of 0 to ``orders`` tokens into ``rows`` (``int64[ORDERS]``), 0 where there is none.

    Tokens from the last one backwards; a negative one ends the context. A longer key is looked up only where the
    shorter one has a row: they were written together, and a lookup is a cache miss.
    """
    for o in range(ORDERS):
        rows[o] = 0
    if table.address == 0:
        return
    if table.anywhere:
        rows[0] = find_row(table, key_hash(space, 0, 0, 0, 0))
    if last >= 0 and orders > 0:
        rows[1] = find_row(table, key_hash(space, 1, last, 0, 0))
        if rows[1] != 0 and second >= 0 and orders > 1:
            rows[2] = find_row(table, key_hash(space, 2, last, second, 0))
            if rows[2] != 0 and third >= 0 and orders > 2:
                rows[3] = find_row(table, key_hash(space, 3, last, second, third))


@kernel
def _repeats(ids: Int32Array, at: int, width: int) -> bool:
    for j in range(1, width):
        for i in range(j):
            if ids[at, i] == ids[at, j]:
                return True
    return False


@kernel
def recycle(
    table: Table,
    space: int,
    orders: int,
    width: int,
    last: int,
    second: int,
    third: int,
    ids: Int32Array,
    logprobs: Float32Array,
    at: int,
    emitted: bool,
) -> None:
    """Learn row ``at`` of ``ids`` and ``logprobs`` (``[rows, >= width]``), whose text ends in the three tokens given.

    A row that names a token twice is no top-k and is left out: readers rely on distinct tokens.
    """
    if _repeats(ids, at, width):
        return
    if emitted and table.anywhere:
        _average(table, _claim(table, key_hash(space, 0, 0, 0, 0)), ids, logprobs, at, width)
    if last >= 0 and orders > 0:
        _overwrite(_claim(table, key_hash(space, 1, last, 0, 0)), ids, logprobs, at, width)
        if second >= 0 and orders > 1:
            _overwrite(_claim(table, key_hash(space, 2, last, second, 0)), ids, logprobs, at, width)
            if third >= 0 and orders > 2:
                _overwrite(_claim(table, key_hash(space, 3, last, second, third)), ids, logprobs, at, width)


@kernel
def _put(table: Table, rows: Int32Array) -> None:
    """Write whole rows (``int32[n, ROW_BYTES / 4]``), those used longest ago first, whatever table they came from."""
    for i in range(len(rows)):
        row = _claim(table, np.int64(rows[i, TAG]) | (np.int64(rows[i, TAG + 1]) << 31))
        for field in range(ROW_BYTES // 4):
            store(row, field, rows[i, field])


class RecyclingTable:
    """A table and the memory it lives in; untouched memory costs nothing.

    Attributes:
        view: for compiled code.
    """

    def __init__(self, budget: int, anywhere: bool = True) -> None:
        """``budget`` in bytes; 0: no table. ``anywhere``: keep a row of no token."""
        sets = 1
        while sets * 2 * WAYS * ROW_BYTES <= budget:
            sets *= 2
        used = sets * WAYS * ROW_BYTES if budget >= WAYS * ROW_BYTES else 0
        self._owner = np.zeros(used // 4 + 16, np.int32)
        self.view = Table(
            (self._owner.ctypes.data + 63) & ~63 if used else 0,
            sets - 1,
            anywhere,
            np.zeros(1, np.int64),
            np.zeros(2 * WIDTH, np.int64),
            np.zeros(2 * WIDTH),
        )
        self._spaces: dict[str, int] = {}
        self._next_space = 0

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return int(self._owner.nbytes)

    def space(self, namespace: str) -> int:
        """Number of a namespace. One unused for long is forgotten, and gets another number when it comes back."""
        number = self._spaces.pop(namespace, -1)
        if number < 0:
            number = self._next_space
            self._next_space += 1
        self._spaces[namespace] = number  # now the last one used
        if len(self._spaces) > _MOST_SPACES:
            del self._spaces[next(iter(self._spaces))]
        return number

    def clear(self) -> None:
        """Forget everything."""
        self._owner[:] = 0
        self._spaces.clear()

    def _rows(self) -> Int32Array:
        """``int32[rows, ROW_BYTES / 4]`` view of all rows."""
        start = (self.view.address - self._owner.ctypes.data) // 4 if self.view.address else 0
        sets = self.view.mask + 1 if self.view.address else 0
        width = ROW_BYTES // 4
        return self._owner[start : start + sets * WAYS * width].reshape(-1, width)

    def state(self) -> State:
        """What the table holds: the ``rows`` written (``int32[n, ROW_BYTES / 4]``), copied piece by piece, and after
        them an ``index``: how many were written, and the namespaces' numbers."""
        return {"rows": self._pieces(), "index": self._index()}

    def _pieces(self) -> Iterator[Int32Array]:
        rows = self._rows()
        yield rows[:0]
        for start in range(0, len(rows), _PIECE):
            piece = rows[start : start + _PIECE]
            yield piece[piece[:, SIZE] > 0]

    def _index(self) -> Iterator[Array]:
        # One array, and read last: a row's namespace must be in it, or its number would be given to another one.
        index = {"clock": int(self.view.clock[0]), "next": self._next_space, "numbers": self._spaces}
        yield np.frombuffer(json.dumps(index).encode(), np.uint8)

    def restore(self, state: Mapping[str, Array]) -> None:
        """Fill an empty table with what :meth:`state` of another one returned; where this one is smaller, the rows
        written last stay. Raises ``ValueError`` if the arrays do not fit."""
        check(state, {"rows": (np.int32, (-1, ROW_BYTES // 4)), "index": (np.uint8, (-1,))})
        clock, next_space, spaces = _read_index(state["index"])
        rows: Int32Array = state["rows"]
        if not _sound(rows):
            raise ValueError("saved rows of second guesses are not as the table writes them")
        self._spaces, self._next_space = spaces, next_space
        self.view.clock[0] = clock
        if self.view.address:
            age = (clock - rows[:, STAMP].astype(np.int64)) & _STAMP_MASK
            _put(self.view, rows[np.argsort(-age, kind="stable")])
            self.view.clock[0] = clock

    def row(self, space: int, tokens: list[int]) -> dict[int, float]:
        """``{token: probability}`` stored after ``tokens`` (at most three, the last one last); for tests."""
        last, second, third = [*reversed(tokens), 0, 0, 0][:3]
        address = find_row(self.view, key_hash(space, len(tokens), last, second, third))
        if address == 0:
            return {}
        fields = self._owner[(address - self._owner.ctypes.data) // 4 :][: ROW_BYTES // 4]
        return {int(fields[IDS + j]): float(_PROB[prob_byte(address, j)]) for j in range(int(fields[SIZE]))}


def _read_index(array: Array) -> tuple[int, int, dict[str, int]]:
    """Clock, next namespace's number, numbers by namespace."""
    index = json.loads(array.tobytes())
    if not isinstance(index, dict) or index.keys() != {"clock", "next", "numbers"}:
        raise ValueError("the saved index of the table of second guesses is not one")
    clock, following, numbers = index["clock"], index["next"], index["numbers"]
    counts = [clock, following, *numbers.values()] if isinstance(numbers, dict) else [None]
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in counts):
        raise ValueError("the saved index of the table of second guesses must have whole numbers")
    if len({n for n in numbers.values() if n < following}) != len(numbers):
        raise ValueError("saved namespaces must have a number each")
    return clock, following, numbers


def _sound(rows: Int32Array) -> bool:
    """Whether compiled code may read these rows: sizes in range, no negative tags, tokens distinct and not negative."""
    sizes = rows[:, SIZE]
    if not len(rows):
        return True
    if sizes.min() < 1 or sizes.max() > WIDTH or min(rows[:, f].min() for f in (TAG, TAG + 1, STAMP, SEEN)) < 0:
        return False
    ids = rows[:, IDS : IDS + WIDTH]
    used = np.arange(WIDTH) < sizes[:, None]
    if (ids[used] < 0).any():
        return False
    ids = np.where(used, ids, -1 - np.arange(WIDTH, dtype=np.int32))  # unused ones are distinct, too
    ids.sort(axis=1)
    return bool((ids[:, 1:] != ids[:, :-1]).all())


_MOST_SPACES = 1 << 16
# Rows copied at once for saving: a quarter of a MiB.
_PIECE = 4096
