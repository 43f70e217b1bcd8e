"""Bounded store of earlier requests' outputs, one per namespace, each a pair of staggered suffix automata."""

from __future__ import annotations

import numpy.typing as npt

from .suffix_automaton import SuffixAutomaton

# Below this share of the budget a namespace's store is too small to be of use: fewer namespaces are kept instead.
_SMALLEST_SHARE = 1 << 20
_SMALLEST_BLOCK = 1024


class OutputStore:
    """Outputs of one namespace.

    An automaton cannot forget a single text, so two are staggered: once the primary is half full, new outputs enter
    a shadow as well; when the primary is full, the shadow, which holds the newest half, takes its place.

    Attributes:
        primary: the automaton to draft from.
        swaps: how often it was replaced; a cursor into an older one is void.
    """

    def __init__(self) -> None:
        self.primary = SuffixAutomaton(_SMALLEST_BLOCK)
        self.shadow: SuffixAutomaton | None = None
        self.swaps = 0

    @property
    def nbytes(self) -> int:
        """Bytes held by both automata."""
        return self.primary.nbytes + (self.shadow.nbytes if self.shadow else 0)

    def add(self, output: npt.ArrayLike) -> None:
        """Insert one output."""
        self.primary.cut()
        self.primary.extend(output)
