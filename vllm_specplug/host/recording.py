"""Shows a :class:`~vllm_specplug.host.recorder.Recorder` what vLLM's model runner does. Imports no vLLM."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_specplug.host import eligibility
from vllm_specplug.host.engine_requests import data_parallel_index, most_tokens, namespace_of, tokens_of
from vllm_specplug.host.lifecycle import Counters
from vllm_specplug.host.recorder import Admitted, Decode, Recorder, Seen, TopK
from vllm_specplug.host.step_clock import load_of
from vllm_specplug.proposers.base import Int32Array
from vllm_specplug.trace.files import TASK
from vllm_specplug.trace.options import TASK_ARG, TraceOptions
from vllm_specplug.trace.writer import RotatingFiles


class Recording:
    """The recording of one engine."""

    def __init__(
        self, vllm_config: Any, trace: TraceOptions, proposer: str, facts: dict[str, Any], trees: Callable[[], bool]
    ) -> None:
        """
        Args:
            trace: says where to.
            proposer: its registered name; ``none`` where nothing is drafted.
            facts: of the server, recorded with every request.
            trees: whether the engine can verify trees.
        """
        assert trace.dir is not None
        model, self._max_model_len = vllm_config.model_config, int(vllm_config.model_config.max_model_len)
        self._trees = trees
        self._spent_ns = 0  # in the proposer, until the last step

        def load_decoder() -> Decode:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
            )
            return lambda tokens: str(tokenizer.decode(list(tokens)))

        index = data_parallel_index(vllm_config)
        files = RotatingFiles(Path(os.path.realpath(trace.dir)), trace.max_bytes, trace.files, index)
        server = {
            "proposer": proposer,
            "model": str(model.model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "engine": index,
            "started": round(time.time(), 3),
            **facts,
        }
        self._recorder = Recorder(files, trace.topk, server, load_decoder if trace.text else None)

    @property
    def topk(self) -> int:
        """Likeliest tokens to record."""
        return self._recorder.topk

    def step(
        self,
        runner: Any,
        sampled_token_ids: Sequence[Sequence[int]],
        verified: Int32Array,
        topk: TopK | None,
        paths: np.ndarray | None,
        seconds: float,
        drafting: float,
        counters: Counters,
        paused: bool,
    ) -> None:
        """Record a step, before the proposer is shown it. Never raises.

        Args:
            sampled_token_ids: emitted tokens by batch row; a row may have none.
            verified: ``int32[n]`` draft tokens verified, by batch row.
            topk: the target's likeliest tokens, ids and log-probabilities, ``[R, k]`` in the order of the logits.
            paths: ``int32[n, W]`` the row, among its request's, that emitted each token; None: all drafts were chains.
            seconds, drafting, paused: as in :class:`~vllm_specplug.host.recorder.Seen`.
        """
        try:
            rows = [i for i, tokens in enumerate(sampled_token_ids) if tokens]
            before, self._spent_ns = self._spent_ns, counters.observe_ns + counters.propose_ns + counters.admit_ns
            if not rows:
                return
            emitted = [sampled_token_ids[i] for i in rows]
            if topk is not None and self.topk:
                starts = np.cumsum(verified + 1) - verified - 1
                nodes = [
                    np.arange(len(tokens)) if paths is None else paths[i, : len(tokens)]
                    for i, tokens in zip(rows, emitted, strict=True)
                ]
                which = np.concatenate([starts[i] + path for i, path in zip(rows, nodes, strict=True)])
                topk = topk[0][which, : self.topk], topk[1][which, : self.topk]
            seen = Seen(
                rows=rows,
                ids=[runner.input_batch.req_ids[i] for i in rows],
                emitted=emitted,
                drafted=verified[rows],
                load=load_of(runner, verified),
                seconds=seconds,
                drafting=0.0 if paused else drafting,
                proposer=(self._spent_ns - before) * 1e-9,
                paused=paused,
                topk=topk if self.topk else None,
            )
            self._recorder.step(seen, lambda row, request_id, count: self._admit(runner, row, request_id, count))
        except Exception:
            self._recorder.stop()

    def _admit(self, runner: Any, row: int, request_id: str, count: int) -> Admitted:
        state = runner.requests[request_id]
        params = state.sampling_params
        tokens, num_output = tokens_of(runner, row, request_id)
        prompt = tokens[: len(tokens) - count].copy()
        most = most_tokens(params, len(tokens) - num_output, self._max_model_len)
        facts = {
            "id": request_id,
            "cat": str((params.extra_args or {}).get(TASK_ARG) or TASK),
            "temperature": float(params.temperature),
            "max_tokens": most,
            "trees": bool(eligibility.limits_for(params)[0] == "tree" and self._trees()),
            "namespace": namespace_of(state),
        }
        return Admitted(prompt, facts, params.all_stop_token_ids, most - len(prompt))

    def end(self, request_ids: Collection[str]) -> None:
        """See :meth:`~vllm_specplug.host.recorder.Recorder.end`."""
        self._recorder.end(request_ids)

    def stats(self) -> dict[str, float]:
        """See :meth:`~vllm_specplug.host.recorder.Recorder.stats`."""
        return self._recorder.stats()

    def close(self) -> None:
        """See :meth:`~vllm_specplug.host.recorder.Recorder.close`."""
        self._recorder.close()
