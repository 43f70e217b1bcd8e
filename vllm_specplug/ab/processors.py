"""How busy the machine's processors are with what is not the run's."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import psutil

from vllm_specplug.ab.servers import Remote


class Processors:
    """Use of the processors since it was made, less that of this process and of the servers ``own``."""

    def __init__(self, own: Sequence[Remote]) -> None:
        """Begin now."""
        self._own = list(own)
        # Of a server by URL it is not known which processes are its own, or whether they are on this machine.
        self._known = not any(server.arm.url for server in own)
        self._begin = self._now()

    def _now(self) -> tuple[float, float, float]:
        t = psutil.cpu_times()
        used = sum(getattr(t, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
        mine = sum(os.times()[:2]) + sum(server.cpu_seconds() for server in self._own)
        return time.monotonic(), used, mine

    def used_by_others(self) -> float | None:
        """Share of the processors since this was made, from 0 to 1; None if that cannot be told."""
        wall, used, mine = (after - before for before, after in zip(self._begin, self._now(), strict=True))
        if wall < 0.2 or not self._known:  # the system counts in hundredths of a second
            return None
        share = (used - mine) / (wall * (psutil.cpu_count() or 1))
        return min(max(share, 0.0), 1.0)
