# ruff: noqa: E402 - vLLM is to be imported after the interpreter is prepared
"""Engines that draft on the device, in vLLM's Model Runner V2, on this machine's CPU. For drivers (:mod:`interpreted`).

A driver imports this first, before vLLM. Everything of this plugin is as on a GPU, its worker class and the checks at
start included, but for this: the platform passes for CUDA while it is asked about in those checks, the worker is vLLM's
CPU worker underneath, and asynchronous scheduling, which vLLM's CPU platform turns off, stays as it is asked for.
"""

from __future__ import annotations

import contextlib
import tempfile
import unittest.mock
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import interpreted

interpreted.prepare()

from engines import make_tiny_llama
from vllm import LLM, SamplingParams, platforms
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_specplug.host import engine_args, gpu_worker

VOCAB = 97
#: The tiny model's greedy outputs run into loops, so drafts are accepted.
PROMPTS = [list(range(3, 20)), [5, 6, 7, 5, 6], [40, 41, 42, 43, 44, 45, 46], [9] * 12]


class DeviceWorker(gpu_worker.DeviceDraftWorker, CPUWorker):
    """This plugin's worker over vLLM's CPU worker, in whose place it stands."""

    def init_device(self) -> Any:
        interpreted.attend_as_parent()
        return super().init_device()


@contextlib.contextmanager
def _like_cuda() -> Iterator[None]:
    """Let this plugin's checks pass, and ask for the worker above; vLLM itself sees the CPU that there is."""
    platform = platforms.current_platform
    update = platform.check_and_update_config
    check = engine_args.check

    def check_like_cuda(arguments: Any) -> list[str]:
        with unittest.mock.patch.object(platform, "is_cuda", lambda: True):
            return check(arguments)

    def update_but_scheduling(config: Any) -> None:
        asynchronous = config.scheduler_config.async_scheduling
        update(config)
        config.scheduler_config.async_scheduling = asynchronous

    worker = f"{__name__}.{DeviceWorker.__name__}"
    with (
        unittest.mock.patch.object(engine_args, "DEVICE_WORKER", worker),
        unittest.mock.patch.object(engine_args, "check", check_like_cuda),
        unittest.mock.patch.object(platform, "check_and_update_config", update_but_scheduling),
    ):
        yield


def model() -> Path:
    """A tiny model of :data:`VOCAB` tokens, made once per process."""
    global _folder
    if _folder is None:
        _folder = tempfile.TemporaryDirectory(prefix="specplug-tiny-")
        make_tiny_llama(Path(_folder.name), VOCAB)
    return Path(_folder.name)


_folder: tempfile.TemporaryDirectory[str] | None = None
#: An engine that is dropped destroys the process groups that every engine of this process uses.
_kept: list[LLM] = []


def engine(proposer: str | None = "Auto", tokens: int = 4, **settings: Any) -> LLM:
    """An engine in this process.

    Args:
        proposer: of this plugin's; None: no drafts.
        tokens: K.
        settings: of ``vllm.LLM``; ``speculative_config`` is added to what the two before say; ``model``: another than
            the tiny one.
    """
    path = settings.pop("model", None) or model()
    speculative = settings.pop("speculative_config", {})
    if proposer is not None:
        ours = {"method": "ngram_gpu", "model": f"vllm_specplug.{proposer}", "num_speculative_tokens": tokens}
        speculative = ours | speculative
    defaults = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 4,
        "block_size": 32,  # the least that the CPU attention backend takes
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "async_scheduling": True,
        "seed": 0,
    }
    with _like_cuda():
        llm = LLM(model=str(path), speculative_config=speculative or None, **(defaults | settings))
    _kept.append(llm)
    return llm


def greedy(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Greedy tokens of requests that run together."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return [list(out.outputs[0].token_ids) for out in llm.generate(inputs, params, use_tqdm=False)]


def runner_of(llm: LLM) -> Any:
    """The V2 model runner of an engine."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def scheduler_of(llm: LLM) -> Any:
    """Its scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def metric(llm: LLM, name: str) -> float:
    """One of vLLM's own counters, summed over its labels."""
    return sum(m.value for m in llm.get_metrics() if m.name == name)
