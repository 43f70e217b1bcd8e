"""`specplug sparse calibrate`: runs a model on text, in this process and exactly, and observes it.

The engine is vLLM's own, with SparseVerify set to attend everything; what is found out is what
:mod:`.sparse_calibration` keeps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Tokens computed after each prompt, and verify steps observed of them.
_OUTPUT, _STEPS = 48, 6
_DRAFTS = 7


class CannotCalibrate(ValueError):
    """The model or the texts do not allow it. The message is for the user."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run.

    Attributes:
        model, dtype, trust_remote_code: as for `vllm serve`.
        context: tokens per prompt.
        prompts: how many.
        unit: SparseVerify's option.
    """

    model: str
    context: int
    prompts: int
    dtype: str
    unit: int
    trust_remote_code: bool


def installed_texts() -> list[str]:
    """Prose and code that every installation has: PyTorch's reference, and vLLM's own sources."""
    import torch
    import vllm

    reference = [Path(torch.__file__).parent / name for name in ("_torch_docs.py", "_tensor_docs.py")]
    sources = sorted((Path(vllm.__file__).parent / "v1").rglob("*.py"), key=lambda p: -p.stat().st_size)[:24]
    texts = ["\n".join(p.read_text(errors="replace") for p in paths if p.is_file()) for paths in (reference, sources)]
    return [text for text in texts if text]


def _prompts(tokenizer: Any, texts: list[str], count: int, tokens: int) -> list[list[int]]:
    """``count`` prompts of ``tokens`` tokens, the texts by turns, each from where the last one ended."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ids = [found for found in ids if len(found) >= tokens]
    if not ids:
        raise CannotCalibrate(f"no text has {tokens} tokens; give longer ones or a smaller --context.")
    at, prompts = [0] * len(ids), []
    for n in range(count):
        which = n % len(ids)
        if at[which] + tokens > len(ids[which]):
            at[which] = 0
        prompts.append(ids[which][at[which] : at[which] + tokens])
        at[which] += tokens
    return prompts


def calibrate(
    settings: Settings, texts: Sequence[str] | None, requests: Sequence[str | list[int]] | None
) -> dict[str, Any]:
    """Run the model and observe it; see :func:`observe`.

    Args:
        texts: to read; None: what every installation has.
        requests: prompts, as text or token ids, instead of texts.

    Raises:
        CannotCalibrate: vLLM does not start the model, no text is long enough, or its attention cannot be observed.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    options = {"attention": True, "ratio": 0.999999, "dense_below": 0, "unit": settings.unit, "start_probe": False}
    try:
        llm = LLM(
            settings.model,
            dtype=settings.dtype,
            max_model_len=settings.context + _OUTPUT + _DRAFTS + 1,
            max_num_seqs=1,
            enforce_eager=True,
            trust_remote_code=settings.trust_remote_code,
            speculative_config={
                "method": "custom_class",
                "model": "vllm_specplug.SparseVerify",
                "num_speculative_tokens": _DRAFTS,
            },
            additional_config={"specplug": {"sparse_verify": {**options, "policy": "fixed", "length": _DRAFTS}}},
        )
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise CannotCalibrate(f"vLLM cannot start {settings.model}: {type(error).__name__}: {first}") from None
    tokenizer = llm.get_tokenizer()
    if requests is not None:
        ids = [tokenizer(r)["input_ids"] if isinstance(r, str) else r for r in requests[: settings.prompts]]
        return observe(llm, [found[: settings.context] for found in ids])
    return observe(
        llm, _prompts(tokenizer, installed_texts() if texts is None else texts, settings.prompts, settings.context)
    )


def observe(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Everything that can be calibrated of an engine whose core runs in this process.

    Args:
        llm: a ``vllm.LLM`` with SparseVerify, in eager mode.
        prompts: token ids.

    Raises:
        CannotCalibrate: its attention cannot be observed.
    """
    from vllm import SamplingParams

    from vllm_specplug.host.sparse_ffn import FfnQuantiles
    from vllm_specplug.host.sparse_moe import MoeTails
    from vllm_specplug.host.sparse_observer import AttentionObserver

    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    drafter, model = runner.drafter, runner.get_model()
    if drafter.trees.reason:
        raise CannotCalibrate(f"attention cannot be observed here: {drafter.trees.reason}.")
    attention = AttentionObserver(drafter.sparse.options.selection())
    left_out: dict[str, str] = {}
    parts: dict[str, Any] = {}
    try:
        attention.attach(model, runner.compilation_config.static_forward_context)
        for name, part in (("ffn", FfnQuantiles()), ("moe", MoeTails())):
            try:
                part.attach(model)
                parts[name] = part
            except ValueError as error:
                left_out[name] = str(error)
        for number, prompt in enumerate(prompts):
            params = SamplingParams(temperature=0.0, max_tokens=_OUTPUT, ignore_eos=True)
            llm.llm_engine.add_request(f"calibrate-{number}", {"prompt_token_ids": prompt}, params)
            steps, seen = 0, attention.steps
            while llm.llm_engine.has_unfinished_requests():
                attention.wanted = attention.steps < seen + _STEPS and steps % 4 == 3
                before = attention.steps
                llm.llm_engine.step()
                if attention.steps > before:
                    attention.contexts.append(len(prompt))
                steps += 1
            print(f"\rprompt {number + 1} of {len(prompts)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        found: dict[str, Any] = {"attention": attention.result(), "left_out": left_out}
        for name, part in parts.items():
            try:
                found[name] = part.result()
            except ValueError as error:
                left_out[name] = str(error)
        return found
    except ValueError as error:
        raise CannotCalibrate(str(error)) from None
    finally:
        attention.detach()
        for part in parts.values():
            part.detach()
