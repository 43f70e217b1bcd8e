"""Which units of each live request's context have been summarised, and in which blocks of the cache they lay.

Shared by the kernels for CPUs, which keep a request's summaries together, and those for GPUs, which keep them beside
the cache's blocks. Plain bookkeeping on the host: no tensor is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from vllm_specplug.kernels.block_select import Int32Array, Selection


@dataclass(slots=True)
class Entry:
    """One request.

    Attributes:
        blocks: ``int32[n]`` the blocks that its summaries were read from.
        units: how many are there, from its first on.
    """

    blocks: Int32Array
    units: int


class UnitBook:
    """Units of all live requests, for layers that share a block table.

    Attributes:
        units_read: units summarised so far.
        resets: times that a request's blocks were other ones than before.
    """

    def __init__(self, unit: int, block_size: int) -> None:
        """
        Args:
            unit, block_size: slots.

        Raises:
            ValueError: the unit does not divide the block size, or is no multiple of 16.
        """
        if unit % 16 or block_size % unit:
            raise ValueError(
                f"units of {unit} tokens do not fit blocks of {block_size}: wanted a multiple of 16 that divides them"
            )
        self.units_read = 0
        self.resets = 0
        self._unit, self._block_size = unit, block_size
        self._entries: dict[str, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def items(self) -> Iterable[tuple[str, Entry]]:
        """All requests."""
        return self._entries.items()

    def drop(self, requests: Iterable[str]) -> None:
        """Forget requests that ended or were preempted; unknown ones are ignored."""
        for request in requests:
            self._entries.pop(request, None)

    def rewind(self, request: str, tokens: int) -> None:
        """The cache holds something else from token ``tokens`` of a request on: a rollback, or an exact refresh."""
        if (entry := self._entries.get(request)) is not None:
            entry.units = min(entry.units, tokens // self._unit)

    def update(self, request: str, blocks: Int32Array, selection: Selection, context: int) -> tuple[int, int]:
        """What of a request is to be summarised now, which is noted as done.

        Args:
            blocks: ``int32[n]`` the request's row of the block table, at least up to its ``context``.
            context: tokens in the cache that are accepted.

        Returns:
            The first unit to summarise, and the one after the last: all units before the tail then have a summary.
        """
        used = selection.tail_block(context, self._block_size)
        wanted = used * self._block_size // self._unit
        entry = self._entries.setdefault(request, Entry(blocks[:0], 0))
        same = min(used, len(entry.blocks))
        differs = np.flatnonzero(entry.blocks[:same] != blocks[:same])
        if len(differs):
            self.resets += 1
            entry.units = min(entry.units, int(differs[0]) * self._block_size // self._unit)
        begin = min(entry.units, wanted)
        self.units_read += wanted - begin
        entry.units, entry.blocks = wanted, blocks[:used].copy()
        return begin, wanted
