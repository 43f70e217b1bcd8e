"""The approximate parts of one engine: what SparseVerify's options ask for, wired to the model.

Which requests they touch is decided per request: those of the arm that is SparseVerify. Everything is exact in steps
and rows that do not verify.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_specplug.host import sparse_calibration
from vllm_specplug.host.sparse_attention import SparseAttention
from vllm_specplug.host.sparse_ffn import SparseFfn
from vllm_specplug.host.sparse_moe import SparseMoe
from vllm_specplug.host.sparse_step import SparseStep
from vllm_specplug.host.trees import rows_of
from vllm_specplug.proposers.base import Int32Array
from vllm_specplug.proposers.sparse_verify import SparseVerifyOptions

logger = logging.getLogger("vllm.specplug")


class SparseHost:
    """SparseVerify's parts of one engine.

    Attributes:
        attention: which part of their contexts requests attend; None: that is exact.
        step: which rows of the coming forward pass are verified, for the layers' hooks.
    """

    def __init__(self, vllm_config: Any, options: SparseVerifyOptions, applies: Callable[[str], bool]) -> None:
        """
        Args:
            applies: whether a request, by its id, may be verified approximately.

        Raises:
            options.OptionError: the calibration cannot be read.
        """
        self.options = options
        self.step = SparseStep()
        self._applies = applies
        found = sparse_calibration.load(options.calibration, vllm_config.model_config.model) or {}
        sparse = options.attention and options.ratio < 1.0
        self.attention = SparseAttention(options, found.get("attention"), applies) if sparse else None
        self._layers: dict[str, SparseFfn | SparseMoe] = {}
        if options.ffn_sparsity > 0.0:
            self._layers["feed-forward layers"] = SparseFfn(options, self.step, found.get("ffn"))
        if options.moe_drop > 0 or options.moe_experts < 1.0:
            self._layers["experts"] = SparseMoe(options, self.step, found.get("moe"))
        if sparse and not found and options.scorer != "streaming" and options.budgets == "calibrated":
            logger.warning(
                "vllm-specplug: there is no calibration for this model, so all KV heads attend the same share of a "
                "context; `specplug sparse calibrate MODEL` finds out what each needs, which is more faithful."
            )

    def on_model_loaded(self, model: Any) -> None:
        """Hook into the model's layers."""
        for what, part in list(self._layers.items()):
            if reason := part.attach(model):
                logger.warning("vllm-specplug: %s are computed exactly: %s.", what, reason)
                del self._layers[what]

    def on_kv_cache(self, reason: str) -> None:
        """The KV cache was made. ``reason``: why attention cannot be sparse with it; empty if it can."""
        if self.attention is None:
            return
        if why := reason or self.attention.reason:
            logger.warning("vllm-specplug: attention is exact: %s.", why)

    def begin(self, runner: Any, num_scheduled: Int32Array, metadata: Any) -> None:
        """Note which rows of the coming forward pass verify; after the runner has prepared its inputs."""
        self.step.clear()
        if not self._layers:
            return
        batch = runner.input_batch
        n = batch.num_reqs
        sizes = rows_of(metadata, n)
        verify = (num_scheduled[:n] == sizes) & (batch.num_computed_tokens_cpu[:n] >= batch.num_prompt_tokens[:n])
        verify &= np.fromiter((self._applies(i) for i in batch.req_ids), np.bool_, n)
        if not verify.any():
            return
        ends = np.asarray(runner.query_start_loc.np[1 : n + 1], np.int32)
        groups = np.stack([ends - sizes, sizes], axis=1)[verify]
        self.step.groups, self.step.num_rows = np.ascontiguousarray(groups, dtype=np.int32), int(ends[-1])

    def end(self) -> None:
        """Forward passes are exact from now on."""
        self.step.clear()

    def on_states_updated(self, scheduler_output: Any) -> None:
        """Requests ended, were preempted, or resumed."""
        if self.attention is None:
            return
        self.attention.drop(scheduler_output.finished_req_ids)
        self.attention.drop(getattr(scheduler_output, "preempted_req_ids", None) or ())
        cached = scheduler_output.scheduled_cached_reqs
        self.attention.drop(getattr(cached, "resumed_req_ids", None) or ())

    def stats(self) -> dict[str, float]:
        """Counters by name."""
        found = {} if self.attention is None else self.attention.stats()
        for part in self._layers.values():
            found |= part.stats()
        return found
