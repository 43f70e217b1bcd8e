"""The exact refresh of SparseVerify: accepted tokens are computed again, exactly, before their error adds up.

What a sparse step writes to the KV cache is approximate, and every later token attends it. vLLM computes whatever a
request lacks, so it is enough to say that the last accepted tokens are lacking: they become rows of the request's next
step, before its drafts, and a step with such rows is exact (:mod:`.sparse_attention`). All tokens before them were made
exact by earlier refreshes, so what is written is what the exact model would have written.

vLLM's own extension point ``scheduler_cls``; set by :mod:`.engine_args` where ``refresh`` is asked for.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_specplug import registry

logger = logging.getLogger("vllm.specplug")


class RefreshingScheduler(Scheduler):
    """vLLM's scheduler, which has accepted tokens of long requests computed again every so often.

    Attributes:
        refreshes: so far.
        refreshed_tokens: so far.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.refreshes = self.refreshed_tokens = 0
        user = registry.parse_options(self.vllm_config.additional_config)
        options = user.section(registry.find("SparseVerify"))
        self._every, self._above = options.refresh, options.dense_below
        groups = self.kv_cache_config.kv_cache_groups
        if any(type(group.kv_cache_spec) is not FullAttentionSpec for group in groups):
            # Blocks that slid out of a window are gone.
            logger.warning("vllm-specplug: no exact refresh: not every layer attends its whole context.")
            self._every = 0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """See vLLM's."""
        if self._every:
            for request in self.running:
                self._rewind(request)
        return super().schedule(*args, **kwargs)

    def _rewind(self, request: Any) -> None:
        """Have the tokens since the last refresh computed again, if they are enough."""
        computed = request.num_computed_tokens
        # Tokens whose K/V is exact: the prompt's, and after a preemption all that were computed anew.
        exact = getattr(request, "specplug_exact", None)
        if request.is_prefill_chunk or computed < request.num_prompt_tokens:
            request.specplug_exact = None
        elif exact is None or exact > computed or getattr(request, "specplug_refreshed", False):
            request.specplug_exact, request.specplug_refreshed = computed, False
        elif computed > self._above and computed - exact >= self._every:
            request.num_computed_tokens = exact
            request.specplug_refreshed = True
            self.refreshes += 1
            self.refreshed_tokens += computed - exact
