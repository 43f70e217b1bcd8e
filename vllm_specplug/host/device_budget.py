"""The budget of drafting on the device: how many draft tokens each step gets, chosen in the scheduler.

vLLM's scheduler settles the draft length of a step when it schedules it, from a table by batch size (Dynamic SD), and
with asynchronous scheduling that is before the step before has ended. :class:`.DraftLength` takes the table's place.

vLLM's own extension point ``scheduler_cls``; set by :mod:`.device_lengths`.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_specplug import registry
from vllm_specplug.host import eligibility, metrics, numba_guard
from vllm_specplug.host.engine_requests import data_parallel_index
from vllm_specplug.proposers.draft_length import DraftLength
from vllm_specplug.proposers.length_times import LengthTimes

numba_guard.protect()
logger = logging.getLogger("vllm.specplug")


class Budget:
    """Chooses draft lengths in one engine, and learns from its steps.

    How long a step takes is the time from the output before to its own. With asynchronous scheduling it was queued by
    then, so that is the device's time, or the host's where the host is slower: what a step costs in either case.

    Args:
        lengths: to choose from, ascending, the first 0.
    """

    def __init__(self, lengths: list[int]) -> None:
        _compile()
        self.policy = DraftLength(lengths)
        self.failed = False
        self.off: set[str] = set()  # requests that want no drafts
        self._since = 0  # time of the output before; 0: the engine was idle since
        self._shapes: set[tuple[int, int]] = set()

    def __getitem__(self, requests: int) -> int:
        """The draft length of the step being scheduled, of so many requests; where vLLM looks into its table."""
        if self.failed:
            return 0
        try:
            return self.policy.choose(requests)
        except Exception:
            self._fail()
            return 0

    def learn(self, scheduled: Any, output: Any, now_ns: int) -> None:
        """Learn from a step's output, which arrived ``now_ns``. To be followed by :meth:`wait`."""
        if self.failed or not scheduled.num_scheduled_tokens or not output.sampled_token_ids:
            return
        try:
            self._learn(scheduled, output, now_ns)
        except Exception:
            self._fail()

    def wait(self, now_ns: int, busy: bool) -> None:
        """The output that arrived ``now_ns`` was dealt with; ``busy``: requests go on."""
        self._since = now_ns if busy else 0

    def _learn(self, scheduled: Any, output: Any, now_ns: int) -> None:
        drafts, tokens = scheduled.scheduled_spec_decode_tokens, output.sampled_token_ids
        count, rows = len(scheduled.num_scheduled_tokens), scheduled.total_num_scheduled_tokens
        sizes = list(map(len, drafts.values()))
        length = sizes[0] if sizes else 0
        off = sum(map(scheduled.num_scheduled_tokens.__contains__, self.off)) if self.off else 0
        if rows == count + len(sizes) * length and sizes.count(length) == (count - off if length else 0):
            emitted = [size for size in map(len, tokens) if size]
            shape = LengthTimes.bin_of(count), length
            # A new shape may be compiled in its first step.
            timed = self._since and shape in self._shapes and len(emitted) == count
            self._shapes.add(shape)
            if off and length:
                emitted = [len(tokens[output.req_id_to_index[request]]) for request in drafts]
            self.policy.share = 1.0 - off / count
            seconds = (now_ns - self._since) * 1e-9 if timed else math.nan
            self.policy.observe(length, [size for size in emitted if size], seconds, count)
            return
        # Prompts are computed beside, or lengths differ: of these steps only what was accepted counts.
        by_length: dict[int, list[int]] = {}
        for (request, drafted), size in zip(drafts.items(), sizes, strict=True):
            emitted_tokens = len(tokens[output.req_id_to_index[request]])
            if drafted and emitted_tokens:
                by_length.setdefault(size, []).append(emitted_tokens)
        for size, emitted in by_length.items():
            self.policy.observe(size, emitted)

    def _fail(self) -> None:
        self.failed = True
        logger.exception("vllm-specplug: choosing the draft length failed; no more drafts.")

    def snapshot(self) -> metrics.Snapshot:
        """For metrics."""
        totals = {f"draft_length.{name}": value for name, value in self.policy.stats().items()}
        return metrics.Snapshot(totals | {"errors": float(self.failed)}, [], np.zeros((3, 0, 1), np.int64), [])


class _Budgeted:
    """What both schedulers have in common; the next base is one of vLLM's.

    Attributes:
        budget: None if there is none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._off: set[str] = set()  # requests that want no drafts
        self.budget: Budget | None = None
        self._publisher: metrics.Publisher | None = None
        table = self.dynamic_sd_lookup
        if not table:
            logger.warning("vllm-specplug: no budget: vLLM turned Dynamic SD off.")
            return
        self.budget = Budget(sorted({0, *table[1:]}))
        self.budget.off = self._off
        self.dynamic_sd_lookup = self.budget
        name = registry.find(self.vllm_config.speculative_config.model.removeprefix(f"{registry.PACKAGE}.")).section
        labels = {"proposer": name, "engine": str(data_parallel_index(self.vllm_config))}
        self._publisher = metrics.Publisher(labels, self.budget.snapshot)

    def add_request(self, request: Any) -> None:
        """See vLLM's."""
        extra = getattr(request.sampling_params, "extra_args", None) or {}
        if extra.get(eligibility.ARM_ARG) == registry.OFF:
            self._off.add(request.request_id)
        super().add_request(request)

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        """See vLLM's, where the asynchronous scheduler makes room for the next step's drafts."""
        super()._update_after_schedule(scheduler_output)
        self._drop_drafts()

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """See vLLM's, where the other one is told of them."""
        super().update_draft_token_ids(draft_token_ids)
        self._drop_drafts()

    def _drop_drafts(self) -> None:
        """Requests that want no drafts get none in the step to come."""
        if not self._off:
            return
        self._off.intersection_update(self.requests)
        for request_id in self._off:
            self.requests[request_id].spec_token_ids = []

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """See vLLM's."""
        budget = self.budget
        if budget is None:
            return super().update_from_output(scheduler_output, model_runner_output)
        now = time.perf_counter_ns()
        budget.learn(scheduler_output, model_runner_output, now)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        budget.wait(now, bool(self.running))
        if self._publisher is not None:
            self._publisher.tick(now)
        return outputs

    def shutdown(self) -> None:
        """See vLLM's."""
        if self._publisher is not None:
            self._publisher.close()
        super().shutdown()


class BudgetedScheduler(_Budgeted, AsyncScheduler):
    """vLLM's asynchronous scheduler under the budget. Where that is off, an object of the other class is made."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An object of the class for the engine's configuration."""
        config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        if not config.scheduler_config.async_scheduling:
            return BudgetedSyncScheduler(*args, **kwargs)
        return super().__new__(cls)


class BudgetedSyncScheduler(_Budgeted, Scheduler):
    """vLLM's other scheduler under the budget."""


def _compile() -> None:
    """Have everything compiled before the first step."""
    policy = DraftLength([0, 1])
    for length in (0, 1, 1, 0) * 6:
        policy.choose(2)
        policy.observe(length, [1, 2], 0.01)
