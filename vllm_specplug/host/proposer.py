"""The class vLLM builds for ``--spec-model vllm_specplug.<Name>``: a proposer with the engine around it.

vLLM's ``custom_class`` method (v1/spec_decode/custom_class_proposer.py) builds it with the engine's
configuration alone; the runner patches in :mod:`vllm_specplug.host.runner` hand it the rest.
"""

from __future__ import annotations

import collections
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from vllm_specplug import registry
from vllm_specplug.host import (
    compat,
    cpu_sampling,
    eligibility,
    forests,
    metrics,
    recording,
    runner,
    sampling_params,
    state_file,
    tree_plan,
    verification,
)
from vllm_specplug.host.arms_in_one import ArmChoice, Arms
from vllm_specplug.host.engine_requests import data_parallel_index, most_tokens, namespace_of, tokens_of
from vllm_specplug.host.lifecycle import Lifecycle, Rows, TopK, sample_group
from vllm_specplug.host.sparse import SparseHost
from vllm_specplug.host.step_clock import StepClock, load_of, probe
from vllm_specplug.host.trees import TreeHost
from vllm_specplug.kernels.logits_topk import LogitsTopK
from vllm_specplug.proposers.adaptive_length import AdaptiveLength
from vllm_specplug.proposers.base import Int32Array, Request
from vllm_specplug.proposers.sparse_verify import SparseVerify

logger = logging.getLogger("vllm.specplug")


class HostProposer:
    """One proposer inside one vLLM worker, and the arms beside it. Subclasses are made by :func:`host_class`, one per
    registry entry.

    Attributes:
        arms: every proposer of the worker, and which requests are whose.
        lifecycle: of the server's own proposer, one of the arms.
    """

    is_specplug = True
    entry: registry.Entry

    def __init__(self, vllm_config: Any) -> None:
        """Build the proposer.

        Raises:
            options.OptionError: a setting is wrong (servers find that out earlier, in the front process).
            patching.HostSymbolMissing: this vLLM lacks something the plugin relies on.
        """
        compat.require()
        runner.install()
        sampling_params.install_worker()
        cpu_sampling.install()
        user = registry.parse_options(vllm_config.additional_config)
        self.max_draft_tokens = int(vllm_config.speculative_config.num_speculative_tokens)
        self.max_model_len = int(vllm_config.model_config.max_model_len)
        self._dtype = vllm_config.model_config.dtype
        self.arms = self._make_arms(user, int(vllm_config.model_config.get_vocab_size()))
        self.lifecycle = self.arms.default
        self._drafts = user.general.enabled and _reports_to_scheduler(vllm_config.parallel_config)
        self.sparse = self._make_sparse(vllm_config) if user.general.enabled else None
        # Before the model's layers are made, which is when they choose their attention.
        attention = None if self.sparse is None else self.sparse.attention
        general = user.general
        self.trees = TreeHost(
            vllm_config, self._drafts, general.enabled, attention, general.attention, general.gpu_trees
        )
        self._recording = self._make_recording(vllm_config, user)
        self._read_topk = LogitsTopK(max(self.arms.topk, self._recording.topk if self._recording else 0))
        self._topk: tuple[np.ndarray, np.ndarray] | None = None
        self._discarded: dict[int, torch.Tensor] = {}
        self._clock = StepClock()
        self._resting = False
        self._paths: np.ndarray | None = None
        self._wanted = user.general.enabled
        self._keeper = self._make_keeper(vllm_config, user.general) if self._drafts else None
        self._probed = False
        #: Requests that may get no drafts or chains only, by reason.
        self._restricted: collections.Counter[str] = collections.Counter()
        self._publisher = self._make_publisher(vllm_config) if self._drafts else None

    def _make_arms(self, user: registry.PluginOptions, vocab_size: int) -> Arms:
        lifecycles = {
            name: Lifecycle(user.build(entry), vocab_size, self.max_model_len)
            for name, entry in user.arms(self.entry).items()
        }
        shares = user.split(self.entry)
        names, own = user.arm_names(self.entry), self.entry.section
        return Arms(lifecycles, ArmChoice(names, own, shares, user.ab.by, user.ab.seed), shown=bool(shares))

    def _make_sparse(self, vllm_config: Any) -> SparseHost | None:
        """What verifies approximately, if an arm of this server does."""
        options: Any = next((p.options for p in self.arms.proposers if isinstance(p, SparseVerify)), None)
        if options is None:
            return None
        return SparseHost(vllm_config, options, lambda request: self.arms.of(request) == SparseVerify.name)

    def load_model(self, target_model: Any) -> None:
        """Called once by the runner after it has loaded the target model: compile before the first request."""
        self.trees.on_model_loaded()
        if self.sparse is not None:
            self.sparse.on_model_loaded(target_model)
        if not self._drafts:
            return
        start = time.perf_counter()
        forests.warm_up()
        self.lifecycle.counts.warm_up()
        for proposer in self.arms.proposers:
            proposer.warm_up()
        verification.warm_up()
        if self.arms.wants_topk:
            self._read_topk(torch.zeros((1, 64), dtype=self._dtype))
            one = np.ones(1, np.int32)
            tree_plan.gather_rows(one, one * 0, np.zeros(1, np.int64), one, None)
        if self._keeper is not None:
            self._keeper.resume(self.arms.restore)
        for proposer in self.arms.proposers:
            logger.info(
                "vllm-specplug: proposer %s is ready (at most %d draft tokens per request and step, warm-up %.1f s).%s",
                proposer.name,
                self.max_draft_tokens,
                time.perf_counter() - start,
                "" if proposer.lossless else " Its output is APPROXIMATE, as asked for by name.",
            )

    def _make_keeper(self, vllm_config: Any, general: registry.GeneralOptions) -> state_file.StateKeeper | None:
        if general.state_file is None:
            return None
        path = state_file.path_for(general.state_file, data_parallel_index(vllm_config))
        identity = state_file.identity_of(vllm_config, self.lifecycle.proposer.name)
        return state_file.StateKeeper(path, identity, self.arms.state, general.save_every_s)

    def _make_publisher(self, vllm_config: Any) -> metrics.Publisher:
        labels = {
            "proposer": self.lifecycle.proposer.name,
            "engine": str(data_parallel_index(vllm_config)),
        }
        return metrics.Publisher(labels, lambda: self.arms.snapshot(self._own_stats()))

    def _make_recording(self, vllm_config: Any, user: registry.PluginOptions) -> recording.Recording | None:
        if user.trace.dir is None or not _reports_to_scheduler(vllm_config.parallel_config):
            return None
        facts = {"draft_tokens": self.max_draft_tokens, "vllm": compat.vllm_version()}
        proposer = self.entry.name if self._drafts else "none"
        return recording.Recording(vllm_config, user.trace, proposer, facts, lambda: self.trees.available)

    def close(self) -> None:
        """See :class:`vllm_specplug.host.runner.RunnerHooks`."""
        if self._recording is not None:
            self._recording.close()
        if self._publisher is not None:
            self._publisher.close()
        if self._keeper is not None:
            self._keeper.close()

    def propose(self, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        """vLLM's own call, which :mod:`vllm_specplug.host.runner` replaces by :meth:`draft`."""
        raise RuntimeError(
            "vllm-specplug's patch of the model runner is not in effect in this process: was it undone by another "
            f"plugin? (vLLM {compat.vllm_version()}; run `specplug doctor`)"
        )

    def on_kv_cache(self, runner: Any) -> None:
        """See :class:`vllm_specplug.host.runner.RunnerHooks`."""
        self.trees.on_kv_cache(runner)
        if self.sparse is not None:
            self.sparse.on_kv_cache(self.trees.reason)
        self._probe(runner)

    def _probe(self, runner: Any) -> None:
        """Time steps of a few sizes, where the proposer has use for it. On CPUs, where the model has been compiled and
        warmed up by now; elsewhere its graphs are captured later, and times are learned from requests alone."""
        budgeted = [p for p in self.arms.proposers if isinstance(p, AdaptiveLength) and p.options.start_probe]
        if self._probed or not self._wanted or not budgeted:
            return
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        self._probed = True
        start = time.perf_counter()
        try:
            loads, seconds = probe(runner)
        except Exception:
            logger.warning("vllm-specplug: timing steps at start failed; their times are learned later.", exc_info=True)
            return
        for proposer in budgeted:
            proposer.times.prime(loads, seconds)
        logger.info("vllm-specplug: timed steps of %d sizes in %.1f s.", len(loads), time.perf_counter() - start)

    def on_inputs(
        self, runner: Any, scheduler_output: Any, num_scheduled_tokens: Any, spec_decode_metadata: Any
    ) -> None:
        """See :class:`vllm_specplug.host.runner.RunnerHooks`."""
        self._clock.forward()
        if self.sparse is not None:
            self.sparse.begin(runner, num_scheduled_tokens, spec_decode_metadata)
        self.trees.begin(runner, scheduler_output, num_scheduled_tokens, spec_decode_metadata, self.arms.trees)

    def row_parents(self, runner: Any, spec_decode_metadata: Any) -> Int32Array | None:
        """``int32[R]`` parent of each verified row among its request's rows (-1 for its last token), in order of the
        logits; None if all drafts of the step are chains."""
        return self.trees.row_parents()

    def after_verify(self, runner: Any, verified: Any) -> None:
        """To be called once the accepted paths of a step with drafts are known, on every rank."""
        self.trees.after_verify(verified.paths, verified.lengths)

    def stats(self) -> dict[str, float]:
        """Every counter, by name."""
        return self.arms.stats() | self._own_stats()

    def _own_stats(self) -> dict[str, float]:
        recorded = {} if self._recording is None else self._recording.stats()
        sparse = {} if self.sparse is None else self.sparse.stats()
        return sparse | self.trees.stats() | {name: float(count) for name, count in self._restricted.items()} | recorded

    def on_states_updated(self, scheduler_output: Any) -> None:
        """See :class:`vllm_specplug.host.runner.RunnerHooks`."""
        if self.sparse is not None:
            self.sparse.end()
            self.sparse.on_states_updated(scheduler_output)
        if scheduler_output.finished_req_ids:
            if self._recording is not None:
                self._recording.end(scheduler_output.finished_req_ids)
            self.arms.end(list(scheduler_output.finished_req_ids))
            if self._publisher is not None and not self.arms.live:
                self._publisher.publish()  # no step may come for long
        for new in scheduler_output.scheduled_new_reqs if self._drafts or self.sparse is not None else ():
            self.arms.begin(new.req_id, getattr(new.sampling_params, "extra_args", None))

    def verify(self, runner: Any, logits: Any, spec_decode_metadata: Any, original: Callable[..., Any]) -> Any:
        """See :class:`vllm_specplug.host.runner.RunnerHooks`."""
        if self.sparse is not None:
            self.sparse.end()
        self._keep_topk(logits)
        self._discarded = cpu_sampling.discarded_draws(runner)
        verification.sample_plainly(runner.input_batch.sampling_metadata)
        if spec_decode_metadata is None or not any(spec_decode_metadata.num_draft_tokens):
            # vLLM 0.32 sends every step of a speculating server through its rejection sampler. Without drafts that only
            # costs time, and with a top-k and no top-p in the batch it ends the engine on CPUs: ``max()`` of no rows
            # (v1/sample/ops/topk_topp_sampler.py:apply_top_k_only).
            self.trees.end()
            return original(runner, logits, None)
        likeliest = None if self._topk is None else self._topk[0][:, 0]
        parents = self.row_parents(runner, spec_decode_metadata)
        verified = verification.verify(runner, logits, spec_decode_metadata, parents, likeliest)
        self._paths = None if parents is None else verified.paths
        self.after_verify(runner, verified)
        return verified.output

    def bookkeeping(self, runner: Any) -> AbstractContextManager[None]:
        """See :class:`vllm_specplug.host.runner.RunnerHooks`."""
        return cpu_sampling.taking_back(runner, self._discarded)

    def _keep_topk(self, logits: Any) -> None:
        """Keep the target's top-k of every verified row, where a proposer or the recorder asks for it."""
        wanted = self._drafts and not self._resting and self.arms.wants_topk
        if logits is None or not (wanted or (self._recording is not None and self._recording.topk)):
            return
        start = self._clock.read()
        self._topk = self._read_topk(logits)
        if wanted:
            self._clock.spent(start)

    def draft(
        self, runner: Any, scheduler_output: Any, sampled_token_ids: list[list[int]], spec_decode_metadata: Any
    ) -> list[list[int]]:
        """One step: what the target emitted in, drafts for the next step out, both by batch row."""
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        seconds = self._clock.lap()
        paths, self._paths = self._paths, None
        verified = np.zeros(len(sampled_token_ids), np.int32)
        if spec_decode_metadata is not None:
            verified[:] = spec_decode_metadata.num_draft_tokens[: len(sampled_token_ids)]
        if self._recording is not None:
            counters, paused = self.arms.counters, self._resting or not self._drafts
            overhead = self._clock.counted()
            self._recording.step(
                runner, sampled_token_ids, verified, self._topk, paths, seconds, overhead, counters, paused
            )
        if not self._drafts:
            return drafts
        start = self._clock.read()
        if self._keeper is not None:
            self._keeper.tick(time.monotonic())
        if self._publisher is not None:
            self._publisher.tick(start)
        batch = runner.input_batch
        rows = [i for i, tokens in enumerate(sampled_token_ids) if tokens]  # a prefill chunk emits nothing
        if not rows:
            return drafts
        ids = [batch.req_ids[i] for i in rows]
        emitted = [sampled_token_ids[i] for i in rows]
        was_resting, self._resting = self._resting, self.arms.asleep(ids, emitted, seconds)
        if self._resting:
            self._topk = None
            return drafts
        index = np.array(rows, np.int32)
        totals = batch.num_tokens_no_spec[index].astype(np.int32)
        asked = getattr(scheduler_output, "num_spec_tokens_to_schedule", self.max_draft_tokens)
        limit = self.max_draft_tokens if asked is None else min(self.max_draft_tokens, int(asked))
        overhead = self._clock.overhead()
        step = Rows(
            rows=index,
            ids=ids,
            emitted=emitted,
            totals=totals,
            drafted=verified[index],
            limits=np.full(len(rows), limit, np.int32),
            topk=self._take_topk(batch, index, totals, sampled_token_ids, verified, spec_decode_metadata),
            load=load_of(runner, verified),
            seconds=seconds,
            overhead=math.nan if was_resting else overhead,
            paths=None if paths is None else paths[index],
        )
        found = self.arms.step(step, lambda arm, row, rid, slot: self._request(runner, arm, row, rid, slot))
        for row, tokens in zip(rows, found, strict=True):
            drafts[row] = tokens
        self._clock.spent(start)
        return drafts

    def _take_topk(
        self,
        batch: Any,
        index: Int32Array,
        totals: Int32Array,
        sampled_token_ids: list[list[int]],
        verified: Int32Array,
        spec_decode_metadata: Any,
    ) -> TopK | None:
        """What :meth:`_keep_topk` kept, with the input token of each row, for the requests of ``index``."""
        if self._topk is None:
            return None
        (ids, logprobs), self._topk = self._topk, None
        if not self.arms.wants_topk:
            return None
        if ids.shape[1] > self.arms.topk:  # the recorder wants more
            ids, logprobs = (np.ascontiguousarray(x[:, : self.arms.topk]) for x in (ids, logprobs))
        drafted = tree_plan.NO_DRAFTS
        if spec_decode_metadata is not None:
            drafted = spec_decode_metadata.draft_token_ids.cpu().numpy().astype(np.int64)
        roots = np.fromiter(
            (batch.token_ids_cpu[i, t - len(sampled_token_ids[i]) - 1] for i, t in zip(index, totals, strict=True)),
            np.int32,
            len(index),
        )
        tokens, offsets, parents, rows = tree_plan.gather_rows(
            verified, index, drafted, roots, self.trees.row_parents()
        )
        if len(rows) < len(ids):  # some requests are only part of the way through their prompt
            ids, logprobs = ids[rows], logprobs[rows]
        return tokens, offsets, parents, ids, logprobs

    def _request(self, runner: Any, arm: Lifecycle, row: int, request_id: str, slot: int) -> Request:
        """The engine's request in ``row``, with every token it holds now, for its arm."""
        state = runner.requests[request_id]
        tokens, num_output = tokens_of(runner, row, request_id)
        params = state.sampling_params
        shape, reason = eligibility.limits_for(params)
        if shape == "tree" and not self.trees.available:
            shape, reason = "chain", "engine"
        if reason:
            self._restricted[f"{'without_drafts' if shape == 'none' else 'chains_only'}.{reason}"] += 1
        if shape == "none":
            arm.mute(slot)
        return Request(
            slot=slot,
            request_id=request_id,
            prompt=tokens,
            num_output=num_output,
            max_tokens=most_tokens(params, len(tokens) - num_output, self.max_model_len),
            temperature=float(params.temperature),
            namespace=namespace_of(state),
            group=sample_group(request_id),
            branching=shape == "tree",
            extra_args=params.extra_args or {},
        )


def _reports_to_scheduler(parallel_config: Any) -> bool:
    """Whether this rank's drafts are read: under tensor parallelism the executor asks the first rank only
    (v1/executor/multiproc_executor.py), except where every rank runs its own scheduler."""
    if parallel_config.tensor_parallel_size == 1 or parallel_config.distributed_executor_backend == "external_launcher":
        return True
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank() == 0


def host_class(entry: registry.Entry) -> type[HostProposer]:
    """The class for ``vllm_specplug.<entry.name>``."""
    doc = f"vLLM proposer class of {entry.target}."
    return type(entry.name, (HostProposer,), {"entry": entry, "__module__": registry.PACKAGE, "__doc__": doc})
