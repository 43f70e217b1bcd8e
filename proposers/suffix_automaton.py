"""Online suffix automaton with continuation counts, in one flat memory block, for compiled callers.

A suffix automaton has one state per class of substrings that end at the same places of the text. The suffix links
of the current state are exactly the shorter and shorter contexts of the text's end, so prediction by context
length is a walk along links (Blumer et al. 1985; used for drafting by SAM-Decoding, arXiv 2411.10666). Here every
edge also counts how often its token followed, as statistical compressors do.

Memory: an automaton is one block of int32, found by address, so that one compiled call can serve a whole batch
without building an array object per request. Layout::

    header | states: STATE_CAP x 64 bytes | table: TABLE_CAP x 32 bytes

A state is one cache line and holds its three best edges; most states have one. A state with a fourth edge keeps
all its edges in the hash table too, keyed (state, token). Then the three inline edges are the truth and their table
entries are stale until they are pushed out of the line. Inline order: the two most frequent edges first (the newer
first among equals), then the third or the most recent one.

Negative tokens (placeholders of multi-modal inputs) cut the text: no context reaches across them.

Functions marked ``@kernel`` do no bounds checks. ``block`` arguments are addresses from :func:`new_block`; callers
must call :func:`has_room` before :func:`extend` and :func:`grown` when it says no.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from vllm_specplug.kernels.memory import kernel, load, store

Int32Array = npt.NDArray[np.int32]

# Header, int32 fields.
STATES, STATE_CAP, LAST, ENTRIES, TABLE_CAP, TOKENS = range(6)
HEADER_BYTES = 64

# State, int32 fields. Edges are (token, destination, count) triples.
LEN, LINK, TOTAL, RECENT, HEAD, DEGREE, _SPARE, EDGE = range(8)
STATE_BYTES = 64
EDGE_BYTES = 12
INLINE = 3
TOKEN, DST, COUNT = range(3)

# Table entry, int32 fields: an edge triple, its state plus one (0: empty), the state's next entry.
OWNER, NEXT = 3, 4
ENTRY_BYTES = 32

# A token is counted in the contexts that did not know it, and in this many that did, from the longest: what a longer
# context predicted well says little about the shorter ones ("update exclusion" of PPM compressors). 2 was best of 1, 2,
# 3, 8 and 16 on the trace, by 0.01 mean accepted tokens; it also bounds the work on repetitive text.
COUNTED_LEVELS = 2

# Unsigned: Numba marks signed products as never overflowing, and LLVM makes use of it.
_MIX1, _MIX2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


@kernel
def record(block: int, state: int) -> int:
    """Address of a state."""
    return block + HEADER_BYTES + state * STATE_BYTES


@kernel
def _table(block: int) -> int:
    return block + HEADER_BYTES + load(block, STATE_CAP) * STATE_BYTES


@kernel
def _slot(table: int, mask: int, state: int, token: int) -> int:
    """Address of the table entry of (state, token), or of the empty entry where it belongs."""
    at = int(np.int64((np.uint64(state) * _MIX1 + np.uint64(token) * _MIX2) >> np.uint64(33))) & mask
    while True:
        entry = table + at * ENTRY_BYTES
        owner = load(entry, OWNER)
        if owner == 0 or (owner == state + 1 and load(entry, TOKEN) == token):
            return entry
        at = (at + 1) & mask


@kernel
def find(block: int, state: int, token: int) -> int:
    """Address of the edge's (token, destination, count), or 0."""
    rec = record(block, state)
    degree = load(rec, DEGREE)
    edge = rec + EDGE * 4
    for _ in range(min(degree, INLINE)):
        if load(edge, TOKEN) == token:
            return edge
        edge += EDGE_BYTES
    if degree > INLINE:
        entry = _slot(_table(block), load(block, TABLE_CAP) - 1, state, token)
        if load(entry, OWNER) != 0:
            return entry
    return 0


@kernel
def _put(edge: int, token: int, dst: int, count: int) -> None:
    store(edge, TOKEN, token)
    store(edge, DST, dst)
    store(edge, COUNT, count)


@kernel
def _insert(block: int, state: int, token: int, dst: int, count: int) -> None:
    table = _table(block)
    entry = _slot(table, load(block, TABLE_CAP) - 1, state, token)
    rec = record(block, state)
    _put(entry, token, dst, count)
    store(entry, OWNER, state + 1)
    store(entry, NEXT, load(rec, HEAD))
    store(rec, HEAD, (entry - table) // ENTRY_BYTES)
    store(block, ENTRIES, load(block, ENTRIES) + 1)


@kernel
def _push_out(block: int, state: int, token: int, dst: int, count: int) -> None:
    """Write the last inline edge back to the table and put another there."""
    edge = record(block, state) + (EDGE + 3 * (INLINE - 1)) * 4
    entry = _slot(_table(block), load(block, TABLE_CAP) - 1, state, load(edge, TOKEN))
    store(entry, DST, load(edge, DST))
    store(entry, COUNT, load(edge, COUNT))
    _put(edge, token, dst, count)


@kernel
def _bump(block: int, state: int, edge: int) -> None:
    """Count one more use of an edge and restore the inline order."""
    rec = record(block, state)
    first = rec + EDGE * 4
    if edge < first or edge >= first + INLINE * EDGE_BYTES:
        _push_out(block, state, load(edge, TOKEN), load(edge, DST), load(edge, COUNT))
        edge = first + (INLINE - 1) * EDGE_BYTES
    token, dst, count = load(edge, TOKEN), load(edge, DST), load(edge, COUNT) + 1
    while edge > first and load(edge - EDGE_BYTES, COUNT) <= count:
        for field in range(3):
            store(edge, field, load(edge - EDGE_BYTES, field))
        edge -= EDGE_BYTES
    _put(edge, token, dst, count)
    store(rec, TOTAL, load(rec, TOTAL) + 1)
    store(rec, RECENT, token)


@kernel
def _add_edge(block: int, state: int, token: int, dst: int) -> None:
    """Add an edge that is not there yet, counted once (the root is not counted)."""
    rec = record(block, state)
    degree = load(rec, DEGREE)
    edge = rec + (EDGE + 3 * min(degree, INLINE - 1)) * 4
    if degree < INLINE:
        _put(edge, token, dst, 0)
    else:
        if degree == INLINE:
            for i in range(INLINE):
                old = rec + (EDGE + 3 * i) * 4
                _insert(block, state, load(old, TOKEN), load(old, DST), load(old, COUNT))
        _insert(block, state, token, dst, 0)
        _push_out(block, state, token, dst, 0)
    store(rec, DEGREE, degree + 1)
    if state != 0:
        _bump(block, state, edge)


@kernel
def _new_state(block: int, length: int, link: int) -> int:
    state = load(block, STATES)
    store(block, STATES, state + 1)
    rec = record(block, state)
    for field, value in ((LEN, length), (LINK, link), (TOTAL, 0), (RECENT, -1), (HEAD, -1), (DEGREE, 0)):
        store(rec, field, value)
    return state


@kernel
def _split(block: int, state: int, token: int, below: int) -> int:
    """Where ``token`` leads from ``state`` at length len(state) + 1: ``below``, or a new clone of it."""
    length = load(record(block, state), LEN) + 1
    rec = record(block, below)
    if load(rec, LEN) == length:
        return below
    clone = load(block, STATES)
    store(block, STATES, clone + 1)
    new = record(block, clone)
    for field in range(STATE_BYTES // 4):
        store(new, field, load(rec, field))
    store(new, LEN, length)
    store(new, HEAD, -1)
    if load(rec, DEGREE) > INLINE:
        table = _table(block)
        at = load(rec, HEAD)
        while at >= 0:
            entry = table + at * ENTRY_BYTES
            _insert(block, clone, load(entry, TOKEN), load(entry, DST), load(entry, COUNT))
            at = load(entry, NEXT)
    store(rec, LINK, clone)
    while state >= 0:
        edge = find(block, state, token)
        if edge == 0 or load(edge, DST) != below:
            break
        store(edge, DST, clone)
        state = load(record(block, state), LINK)
    return clone


@kernel
def has_room(block: int, token: int) -> bool:
    """Whether :func:`extend` by ``token`` fits. Exact for the table, so that no text can overflow it."""
    if load(block, STATES) + 2 > load(block, STATE_CAP):
        return False
    if token < 0:
        return True
    need = 0
    state = load(block, LAST)
    while state >= 0:
        rec = record(block, state)
        degree = load(rec, DEGREE)
        edge = find(block, state, token)
        if edge != 0:
            below = record(block, load(edge, DST))
            if load(below, LEN) != load(rec, LEN) + 1 and load(below, DEGREE) > INLINE:
                need += load(below, DEGREE)
            break
        if degree == INLINE:
            need += INLINE + 1
        elif degree > INLINE:
            need += 1
        state = load(rec, LINK)
    # Linear probing wants a quarter of the table free.
    return (load(block, ENTRIES) + need) * 4 <= load(block, TABLE_CAP) * 3


@kernel
def extend(block: int, token: int) -> None:
    """Append ``token`` to the text. Amortised constant time. :func:`has_room` must have said yes.

    Works for several sequences in one automaton as well, also in turns: set LAST to 0 (the root) for a new one, or to
    what it was after the sequence's last token (that state stays the sequence's own: only shorter contexts are cloned).
    """
    if token < 0:
        store(block, LAST, 0)
        return
    store(block, TOKENS, load(block, TOKENS) + 1)
    last = load(block, LAST)
    state = last
    edge = find(block, last, token)
    if edge == 0:
        new = _new_state(block, load(record(block, last), LEN) + 1, 0)
        while state >= 0 and edge == 0:
            _add_edge(block, state, token, new)
            state = load(record(block, state), LINK)
            if state >= 0:
                edge = find(block, state, token)
        if state >= 0:
            link = _split(block, state, token, load(edge, DST))
            store(record(block, new), LINK, link)
        store(block, LAST, new)
    else:
        # Only after a cut, or in a store of several sequences, is the whole text so far known already.
        store(block, LAST, _split(block, last, token, load(edge, DST)))
    for _ in range(COUNTED_LEVELS):
        if state <= 0:
            break
        _bump(block, state, find(block, state, token))
        state = load(record(block, state), LINK)


@kernel
def advance(block: int, state: int, matched: int, token: int) -> tuple[int, int]:
    """Move a cursor (state, number of matched tokens) over ``token``: the longest known suffix of the text + token."""
    if token < 0:
        return 0, 0
    while True:
        edge = find(block, state, token)
        if edge != 0:
            return load(edge, DST), matched + 1
        state = load(record(block, state), LINK)
        if state < 0:
            return 0, 0
        matched = load(record(block, state), LEN)


@kernel
def settle(block: int, state: int, matched: int) -> int:
    """The state of a cursor after other text was added: clones may have taken over its length."""
    link = load(record(block, state), LINK)
    while link >= 0 and matched <= load(record(block, link), LEN):
        state = link
        link = load(record(block, state), LINK)
    return state


@kernel
def _prepare(block: int, state_cap: int, table_cap: int) -> None:
    for field in range(HEADER_BYTES // 4):
        store(block, field, 0)
    store(block, STATE_CAP, state_cap)
    store(block, TABLE_CAP, table_cap)
    table = _table(block)
    for at in range(table_cap):
        store(table + at * ENTRY_BYTES, OWNER, 0)
    _new_state(block, 0, -1)


@kernel
def _copy(old: int, new: int) -> None:
    """Fill a prepared larger block from ``old``."""
    states = load(old, STATES)
    for field in (STATES, LAST, TOKENS):
        store(new, field, load(old, field))
    for i in range(states * (STATE_BYTES // 4)):
        store(new + HEADER_BYTES, i, load(old + HEADER_BYTES, i))
    for state in range(states):
        store(record(new, state), HEAD, -1)
    table = _table(old)
    for at in range(load(old, TABLE_CAP)):
        entry = table + at * ENTRY_BYTES
        if load(entry, OWNER) != 0:
            _insert(new, load(entry, OWNER) - 1, load(entry, TOKEN), load(entry, DST), load(entry, COUNT))


@kernel
def _extend_all(block: int, tokens: Int32Array, start: int) -> int:
    """Append ``tokens[start:]`` while there is room; returns how many of ``tokens`` are in."""
    for i in range(start, len(tokens)):
        if not has_room(block, tokens[i]):
            return i
        extend(block, tokens[i])
    return len(tokens)


def block_bytes(state_cap: int, table_cap: int) -> int:
    """Size of a block, alignment included."""
    return HEADER_BYTES + state_cap * STATE_BYTES + table_cap * ENTRY_BYTES + 64


def new_block(state_cap: int, table_cap: int) -> tuple[Int32Array, int]:
    """An empty automaton: the array that owns its memory, and its address (a multiple of 64)."""
    owner = np.empty(block_bytes(state_cap, table_cap) // 4, dtype=np.int32)
    address = (owner.ctypes.data + 63) & ~63
    _prepare(address, state_cap, table_cap)
    return owner, address


# Sizes of a fresh block for a text of n tokens. English, code and dialogue in a 49k vocabulary need 1.3 to 1.5 states
# per token and 0.4 to 0.7 table entries per token (the root's edges, and common words); what does not fit grows.
_STATES_PER_TOKEN, _ENTRIES_PER_TOKEN = 1.5, 0.75


def capacities(tokens: int) -> tuple[int, int]:
    """(state_cap, table_cap) of a block for about ``tokens`` tokens."""
    table = 64
    while table * 3 < tokens * _ENTRIES_PER_TOKEN * 4:
        table *= 2
    return int(tokens * _STATES_PER_TOKEN) + 16, table


class SuffixAutomaton:
    """One automaton and the memory it lives in.

    Attributes:
        address: of the block; changes when it grows.
    """

    def __init__(self, tokens: int = 256) -> None:
        """Make room for about ``tokens`` tokens."""
        self._owner, self.address = new_block(*capacities(tokens))

    def _header(self, field: int) -> int:
        return int(self._words()[field])

    def _words(self) -> Int32Array:
        """The block, header first, as int32."""
        return self._owner[(self.address - self._owner.ctypes.data) // 4 :]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self._owner.nbytes)

    @property
    def num_tokens(self) -> int:
        """Tokens appended, cuts not counted."""
        return self._header(TOKENS)

    @property
    def last(self) -> int:
        """State of the whole sequence so far; 0 after a cut."""
        return self._header(LAST)

    def _next_capacities(self) -> tuple[int, int]:
        """Capacities after growth: whatever is nearly full doubles."""
        states, entries = self._header(STATES), self._header(ENTRIES)
        state_cap, table_cap = self._header(STATE_CAP), self._header(TABLE_CAP)
        old_states = state_cap
        if states * 4 >= state_cap * 3:
            state_cap *= 2
        if entries * 2 >= table_cap or state_cap == old_states:
            table_cap *= 2
        return state_cap, table_cap

    @property
    def next_nbytes(self) -> int:
        """What :attr:`nbytes` would be after :meth:`grow`."""
        return block_bytes(*self._next_capacities())

    def grow(self) -> None:
        """Move to a larger block."""
        owner, address = new_block(*self._next_capacities())
        _copy(self.address, address)
        self._owner, self.address = owner, address

    def try_extend(self, tokens: Int32Array, start: int = 0) -> int:
        """Append ``tokens[start:]`` (``int32``) while they fit; returns how many of ``tokens`` are in now."""
        return int(_extend_all(self.address, tokens, start))

    def extend(self, tokens: npt.ArrayLike) -> None:
        """Append tokens to the current sequence, growing as needed; negative ones cut it."""
        array = np.ascontiguousarray(tokens, dtype=np.int32)
        done = self.try_extend(array)
        while done < len(array):
            self.grow()
            done = self.try_extend(array, done)

    def cut(self) -> None:
        """Start another sequence: no context reaches across."""
        self.resume(0)

    def resume(self, last: int) -> None:
        """Go on with the sequence that :attr:`last` was read after."""
        self._words()[LAST] = last

    def edges(self, state: int) -> dict[int, tuple[int, int]]:
        """``{token: (destination, count)}`` of a state; slow, for tests and inspection."""
        words = self._words()
        rec = self.state(state)
        found: dict[int, tuple[int, int]] = {}
        if rec[DEGREE] > INLINE:
            caps = HEADER_BYTES + self._header(STATE_CAP) * STATE_BYTES
            table = words[caps // 4 :][: self._header(TABLE_CAP) * ENTRY_BYTES // 4].reshape(-1, ENTRY_BYTES // 4)
            at = int(rec[HEAD])
            while at >= 0:
                entry = table[at]
                if entry[OWNER] != state + 1 or int(entry[TOKEN]) in found:
                    raise ValueError(f"state {state}: entry {at} of its edge list is not its own or is a duplicate")
                found[int(entry[TOKEN])] = (int(entry[DST]), int(entry[COUNT]))
                at = int(entry[NEXT])
        for i in range(min(int(rec[DEGREE]), INLINE)):
            token, dst, count = (int(x) for x in rec[EDGE + 3 * i : EDGE + 3 * i + 3])
            found[token] = (dst, count)
        return found

    def state(self, number: int) -> Int32Array:
        """``int32[16]`` view of a state's fields."""
        start = (HEADER_BYTES + number * STATE_BYTES) // 4
        return self._words()[start : start + STATE_BYTES // 4]

    def check_integrity(self) -> None:
        """Raise ``ValueError`` naming the first broken invariant. Slow."""
        n = self._header(STATES)
        if not 0 < n <= self._header(STATE_CAP) or not 0 <= self._header(LAST) < n:
            raise ValueError(f"{n} states of {self._header(STATE_CAP)}, last {self._header(LAST)}")
        entries = 0
        for s in range(n):
            rec = self.state(s)
            edges = self.edges(s)
            if len(edges) != rec[DEGREE]:
                raise ValueError(f"state {s}: {len(edges)} edges, degree {rec[DEGREE]}")
            entries += len(edges) if len(edges) > INLINE else 0
            for token, (dst, count) in edges.items():
                if token < 0 or not 0 < dst < n or self.state(dst)[LEN] < rec[LEN] + 1 or count < (s != 0):
                    raise ValueError(f"state {s}: bad edge {token} -> {dst} counted {count}")
            if s == 0:
                if rec[LINK] != -1 or rec[LEN] != 0:
                    raise ValueError("the root must have no link and length 0")
                continue
            if not 0 <= rec[LINK] < n or self.state(int(rec[LINK]))[LEN] >= rec[LEN]:
                raise ValueError(f"state {s}: link {rec[LINK]} is not shorter")
            if sum(c for _, c in edges.values()) != rec[TOTAL]:
                raise ValueError(f"state {s}: total {rec[TOTAL]} is not the sum of its counts")
            missing = edges.keys() - self.edges(int(rec[LINK])).keys()
            if missing:
                raise ValueError(f"state {s}: its link lacks tokens {sorted(missing)}")
            if edges:
                inline = [int(rec[EDGE + 3 * i + COUNT]) for i in range(min(len(edges), INLINE))]
                counts = sorted((c for _, c in edges.values()), reverse=True)
                if inline[:2] != counts[:2] or int(rec[RECENT]) not in edges:
                    raise ValueError(f"state {s}: inline counts {inline}, all {counts}, recent {rec[RECENT]}")
        if entries != self._header(ENTRIES) or entries > self._header(TABLE_CAP):
            raise ValueError(f"table says {self._header(ENTRIES)} entries, states have {entries}")
