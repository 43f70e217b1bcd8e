"""Bounded store of earlier requests' outputs: per namespace, a pair of staggered suffix automata."""

from __future__ import annotations

import array
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .base import Float32Array
from .mixture import HABITS
from .saved_state import Array, State, check, pack_names, unpack_names
from .suffix_automaton import STATE_BYTES, SuffixAutomaton

Int32Array = npt.NDArray[np.int32]

# A namespace whose share of the budget would be smaller than this finds too little to be worth it: the least
# recently used ones go instead.
SMALLEST_SHARE = 1 << 18
# Tokens a fresh automaton has room for, about 70 KiB.
_FIRST_TOKENS = 512
# Before each output in a store's text. Automata cut their text at negative tokens.
_CUT = -1
# Bytes of text per token, and at least: an array of 4-byte tokens has room for a sixteenth more than it holds.
_TEXT_BYTES, _LEAST_TEXT_BYTES = 5, 128


class OutputStore:
    """Outputs of one namespace.

    An automaton cannot forget a single text, so two are staggered: once the primary's block cannot double any more
    (it is then about half full), new outputs enter a shadow as well; when the primary is full, the shadow, which
    holds the newest outputs, takes its place.

    Attributes:
        primary: the automaton to draft from.
        text: what ``primary`` was made of, ``_CUT`` before each output: automata do not tell, and a saved store is made
            from it anew.
        habits: ``float32[HABITS]``, see :mod:`.mixture`.
        epoch: rises when ``primary`` is another automaton, which voids cursors into it.
    """

    def __init__(self) -> None:
        self.primary = SuffixAutomaton(_FIRST_TOKENS)
        self.shadow: SuffixAutomaton | None = None
        self.text = array.array("i")
        self.habits: Float32Array = np.zeros(HABITS, np.float32)
        self.epoch = 0
        self._shadow_start = 0  # where in the text the shadow's begins

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        text = _LEAST_TEXT_BYTES + _TEXT_BYTES * len(self.text)
        return self.primary.nbytes + self.habits.nbytes + text + (self.shadow.nbytes if self.shadow else 0)

    def shed(self) -> None:
        """Forget the older outputs; all, if there is no shadow yet."""
        del self.text[: self._shadow_start if self.shadow else len(self.text)]
        self.primary = self.shadow or SuffixAutomaton(_FIRST_TOKENS)
        self.shadow = None
        self.epoch += 1

    def add(self, output: Int32Array, budget: int) -> None:
        """Insert one output without holding more than ``budget`` bytes at any moment, growth included.

        An output too long for the budget on its own is kept as far as it fits.
        """
        output = output[: budget // STATE_BYTES]  # for its text must fit, too
        text_bytes = _TEXT_BYTES * (len(output) + 1)
        if self.nbytes + text_bytes > budget:
            self.shed()
        kept = self._insert(self.primary, output, budget - text_bytes)
        if kept < len(output):
            self.shed()
            kept = self._insert(self.primary, output, budget - text_bytes)
        elif self.shadow is not None:
            kept = self._insert(self.shadow, output, budget - text_bytes)
            if kept < len(output):
                self.shed()
        self.text.append(_CUT)
        self.text.frombytes(output[:kept].tobytes())
        if self.shadow is None and not self._can_grow(self.primary, budget) and self.primary.num_tokens > 0:
            shadow = SuffixAutomaton(_FIRST_TOKENS)
            if self.nbytes + shadow.nbytes <= budget:
                self.shadow, self._shadow_start = shadow, len(self.text)

    def _can_grow(self, automaton: SuffixAutomaton, budget: int) -> bool:
        # The old block lives until the new one is filled.
        return self.nbytes + automaton.next_nbytes <= budget

    def _insert(self, automaton: SuffixAutomaton, output: Int32Array, budget: int) -> int:
        """Insert what fits; returns how many tokens that is."""
        automaton.cut()
        done = automaton.try_extend(output)
        while done < len(output):
            if not self._can_grow(automaton, budget):
                break
            automaton.grow()
            done = automaton.try_extend(output, done)
        return done


class OutputStores:
    """All namespaces' stores under one byte budget.

    A namespace may use what the others leave. When it cannot get its equal share, the largest others shed their older
    outputs, so that no tenant can starve another.

    Attributes:
        evictions: how often outputs were forgotten to stay in the budget.
    """

    def __init__(self, budget: int) -> None:
        """``budget`` in bytes."""
        self._budget = budget
        self._stores: dict[str, OutputStore] = {}  # least recently used first
        self._lost_epochs = 0
        self.evictions = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(s.nbytes for s in self._stores.values())

    @property
    def num_tokens(self) -> int:
        """Tokens that drafts can be made from."""
        return sum(s.primary.num_tokens for s in self._stores.values())

    @property
    def num_namespaces(self) -> int:
        """Namespaces with a store."""
        return len(self._stores)

    def find(self, namespace: str) -> tuple[int, int, int]:
        """Addresses of the automaton to draft from and of the habits, and an epoch: if equal, cursors still hold.

        (0, 0, -1) if the namespace has no store.
        """
        store = self._stores.get(namespace)
        return (store.primary.address, store.habits.ctypes.data, store.epoch) if store else (0, 0, -1)

    def open(self, namespace: str) -> bool:
        """Make sure the namespace has a store. True if others were dropped for it: :meth:`find` all again."""
        if namespace in self._stores:
            return False
        dropped = False
        while self._stores and len(self._stores) + 1 > self._budget // SMALLEST_SHARE:
            lost = self._stores.pop(next(iter(self._stores)))
            self._lost_epochs = max(self._lost_epochs, lost.epoch + 1)
            self.evictions += 1
            dropped = True
        store = OutputStore()
        # A namespace that was dropped and came back must not look unchanged.
        store.epoch = self._lost_epochs
        self._stores[namespace] = store
        return self._make_way(store) != 0 or dropped

    def _make_way(self, store: OutputStore) -> int:
        """Let the largest others shed until this one can have its share; returns how many did."""
        others = [s for s in self._stores.values() if s is not store]
        share, shed = self._budget // len(self._stores), 0
        while self._budget - sum(s.nbytes for s in others) < share:
            max(others, key=lambda s: s.nbytes).shed()
            shed += 1
        self.evictions += shed
        return shed

    def add(self, namespace: str, output: Int32Array) -> None:
        """Insert one output, ``int32[n]``. Moves or frees automata: :meth:`find` all namespaces again."""
        self.open(namespace)
        store = self._stores.pop(namespace)
        self._stores[namespace] = store  # now the most recently used
        self._make_way(store)
        epoch = store.epoch
        store.add(output, self._budget - (self.nbytes - store.nbytes))
        self.evictions += store.epoch - epoch

    def clear(self) -> None:
        """Forget everything."""
        self._stores.clear()

    def state(self) -> State:
        """The ``n`` namespaces, least recently used first: their ``names``, the ``text`` of all, the ``sizes`` of each
        (``int64[n]`` tokens, cuts included) and ``habits`` (``float32[n, HABITS]``)."""
        stores = self._stores.values()
        texts = [np.array(s.text, np.int32) for s in stores]
        return {
            "names": pack_names(self._stores),
            "text": np.concatenate([*texts, np.zeros(0, np.int32)]),
            "sizes": np.fromiter(map(len, texts), np.int64, len(texts)),
            "habits": np.array([s.habits for s in stores], np.float32).reshape(-1, HABITS),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Fill empty stores with what :meth:`state` of others returned, as if the same outputs came again: under a
        smaller budget the newest stay. Raises ``ValueError`` if the arrays do not fit."""
        like = {"names": (np.uint8, (-1,)), "text": (np.int32, (-1,)), "sizes": (np.int64, (-1,))}
        check(state, {**like, "habits": (np.float32, (-1, HABITS))})
        names, sizes, habits = unpack_names(state["names"]), state["sizes"], state["habits"]
        ends = np.cumsum(sizes)
        if not len(names) == len(sizes) == len(habits) or (sizes < 0).any() or sizes.sum() != len(state["text"]):
            raise ValueError("saved outputs are not cut into one text per namespace")
        first = max(0, len(names) - self._budget // SMALLEST_SHARE)
        for i in range(first, len(names)):
            self.open(names[i])
            store = self._stores[names[i]]
            store.habits[:] = habits[i]
            left = self._budget - (self.nbytes - store.nbytes)
            epoch = store.epoch
            text = state["text"][ends[i] - sizes[i] : ends[i]]
            for output in np.split(text, np.flatnonzero(text < 0)):
                if (output >= 0).any():
                    store.add(output[output >= 0], left)
            self.evictions += store.epoch - epoch
