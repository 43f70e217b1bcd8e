"""Bounded store of earlier requests' outputs: per namespace, a pair of staggered suffix automata."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .base import Float32Array
from .mixture import HABITS
from .suffix_automaton import SuffixAutomaton

Int32Array = npt.NDArray[np.int32]

# A namespace whose share of the budget would be smaller than this finds too little to be worth it: the least
# recently used ones go instead.
SMALLEST_SHARE = 1 << 18
# Tokens a fresh automaton has room for, about 70 KiB.
_FIRST_TOKENS = 512


class OutputStore:
    """Outputs of one namespace.

    An automaton cannot forget a single text, so two are staggered: once the primary's block cannot double any more
    (it is then about half full), new outputs enter a shadow as well; when the primary is full, the shadow, which
    holds the newest outputs, takes its place.

    Attributes:
        primary: the automaton to draft from.
        habits: ``float32[HABITS]``, see :mod:`.mixture`.
        epoch: rises when ``primary`` is another automaton, which voids cursors into it.
    """

    def __init__(self) -> None:
        self.primary = SuffixAutomaton(_FIRST_TOKENS)
        self.shadow: SuffixAutomaton | None = None
        self.habits: Float32Array = np.zeros(HABITS, np.float32)
        self.epoch = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.primary.nbytes + self.habits.nbytes + (self.shadow.nbytes if self.shadow else 0)

    def shed(self) -> None:
        """Forget the older outputs; all, if there is no shadow yet."""
        self.primary = self.shadow or SuffixAutomaton(_FIRST_TOKENS)
        self.shadow = None
        self.epoch += 1

    def add(self, output: Int32Array, budget: int) -> None:
        """Insert one output without holding more than ``budget`` bytes at any moment, growth included.

        An output too long for the budget on its own is kept as far as it fits.
        """
        if not self._insert(self.primary, output, budget):
            self.shed()
            self._insert(self.primary, output, budget)
        elif self.shadow is not None and not self._insert(self.shadow, output, budget):
            self.shed()
        if self.shadow is None and not self._can_grow(self.primary, budget) and self.primary.num_tokens > 0:
            shadow = SuffixAutomaton(_FIRST_TOKENS)
            if self.nbytes + shadow.nbytes <= budget:
                self.shadow = shadow

    def _can_grow(self, automaton: SuffixAutomaton, budget: int) -> bool:
        # The old block lives until the new one is filled.
        return self.nbytes + automaton.next_nbytes <= budget

    def _insert(self, automaton: SuffixAutomaton, output: Int32Array, budget: int) -> bool:
        automaton.cut()
        done = automaton.try_extend(output)
        while done < len(output):
            if not self._can_grow(automaton, budget):
                return False
            automaton.grow()
            done = automaton.try_extend(output, done)
        return True


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
