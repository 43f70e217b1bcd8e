"""What steps compute and how long they take, for budgets to learn from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_specplug.proposers.base import Int32Array, StepLoad

logger = logging.getLogger("vllm.specplug")

#: Row counts that the start-up probe times, and how often: the quickest run of a size counts.
PROBE_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
PROBE_ROUNDS = 3


class StepClock:
    """Times steps from draft to draft, the engine's own work included."""

    def __init__(self, now: Callable[[], int] = time.perf_counter_ns) -> None:
        self._now = now
        self._last = 0
        self._passes = 0
        self._overhead = 0

    def forward(self) -> None:
        """A forward pass of the model begins."""
        self._passes += 1

    def lap(self) -> float:
        """Seconds since the last lap; NaN if it was not one forward pass."""
        now, passes = self._now(), self._passes
        seconds = (now - self._last) * 1e-9 if passes == 1 and self._last else math.nan
        self._last, self._passes = now, 0
        return seconds

    def spent(self, since: int) -> None:
        """Count what drafting took since ``since``, by :meth:`read`."""
        self._overhead += self._now() - since

    def counted(self) -> float:
        """Seconds counted since the last call of :meth:`overhead`."""
        return self._overhead * 1e-9

    def overhead(self) -> float:
        """Seconds counted since the last call."""
        seconds, self._overhead = self._overhead * 1e-9, 0
        return seconds

    def read(self) -> int:
        """The time, in nanoseconds."""
        return self._now()


def load_of(runner: Any, drafted: Int32Array) -> StepLoad:
    """What the runner's step computed.

    Args:
        runner: vLLM's model runner, after the step.
        drafted: ``int32[n]`` draft tokens of each request of its batch.
    """
    n = len(drafted)
    starts = runner.query_start_loc.np[: n + 1].astype(np.int64)
    rows = np.diff(starts)
    computed = runner.input_batch.num_computed_tokens_cpu[:n].astype(np.int64)
    decodes = rows == drafted + 1
    if decodes.all():
        return StepLoad(n, int(rows.sum()), int(computed.sum()), int((rows * computed).sum()))
    prefill = rows[~decodes]
    before = prefill * (computed[~decodes] + (prefill - 1) // 2)
    rows, computed = rows[decodes], computed[decodes]
    return StepLoad(
        len(rows),
        int(rows.sum()),
        int(computed.sum()),
        int((rows * computed).sum()),
        int(prefill.sum()),
        int(before.sum()),
    )


def probe(runner: Any) -> tuple[list[StepLoad], list[float]]:
    """Time forward passes of a few sizes, without attention: how the time grows with the rows. On every rank alike.

    Uses the dummy runs by which vLLM profiles a model (v1/worker/gpu_model_runner.py:_dummy_run).
    """
    sizes = [n for n in PROBE_ROWS if n <= runner.max_num_tokens]
    best = dict.fromkeys(sizes, math.inf)
    for _ in range(PROBE_ROUNDS):
        for size in sizes:
            start = time.perf_counter()
            _run(runner, size)
            best[size] = min(best[size], time.perf_counter() - start)
    return [StepLoad(1, size, 0, 0) for size in sizes], [best[size] for size in sizes]


def _run(runner: Any, rows: int) -> None:
    hidden, _ = runner._dummy_run(rows)
    runner.model.compute_logits(hidden[:rows])
