"""One arm's engine, in a process of its own. Started by :mod:`vllm_specplug.ab.arms`, never imported by it.

A process per arm keeps an arm's compiled code, thread settings, plugins and failures to itself. The engine runs
in this very process (no second engine process), so that a token's time is the time it left the engine's step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_specplug.ab.arms import Arm, Block, EngineSettings, Work


def serve(connection: Connection, arm: Arm, settings: EngineSettings, log_path: str) -> None:
    """Start the engine, then answer ``("generate", Work)`` messages until the parent hangs up.

    Replies are ``("ready", facts)``, ``("block", Block)`` or ``("failed", reason)``; everything printed here goes to
    ``log_path``.
    """
    import signal

    # Ctrl-C reaches the whole process group; the parent decides, and hanging up is its way to say so.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        if settings.cpus and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, settings.cpus)
        os.environ.update(settings.environment())
        os.environ.update(arm.env)
        engine = _Engine(arm, settings)
        connection.send(("ready", engine.facts()))
        while True:
            _, work = connection.recv()
            connection.send(("block", engine.generate(work)))
    except (EOFError, BrokenPipeError):
        pass
    except BaseException as error:
        # SystemExit too: it is how the plugin refuses a setting, with its message.
        import traceback

        traceback.print_exc()
        connection.send(("failed", _reason(error)))


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class _Engine:
    def __init__(self, arm: Arm, settings: EngineSettings) -> None:
        from vllm import LLM

        started = time.perf_counter()
        self._llm = LLM(
            model=settings.model,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            enforce_eager=settings.eager,
            speculative_config=arm.speculative_config,
            additional_config=arm.additional_config or {},
            seed=settings.seed,
            disable_log_stats=False,  # the draft counters are part of the statistics
        )
        self._start_s = time.perf_counter() - started
        self._sent = 0

    def facts(self) -> dict[str, Any]:
        import torch
        import vllm

        return {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "start_s": self._start_s,
        }

    def _counter(self, name: str) -> int:
        return sum(int(m.value) for m in self._llm.get_metrics() if m.name == f"vllm:spec_decode_{name}")

    def generate(self, work: Work) -> Block:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from vllm_specplug.ab.arms import Block

        tokenizer, engine = self._llm.get_tokenizer(), self._llm.llm_engine
        ids = [self._tokens(prompt) for prompt in work.prompts]
        count = len(ids)
        after = list(work.after) or [0] * count
        drafted, accepted = self._counter("num_draft_tokens"), self._counter("num_accepted_tokens")

        index: dict[str, int] = {}
        sent_at = [0.0] * count
        waits = [0.0] * count

        def send(i: int) -> None:
            request_id = str(self._sent)
            self._sent += 1
            index[request_id] = i
            params = SamplingParams(
                temperature=work.temperature,
                seed=i if work.temperature else None,
                max_tokens=work.max_tokens[i],
                ignore_eos=work.ignore_eos,
                output_kind=RequestOutputKind.DELTA,
            )
            sent_at[i] = time.perf_counter()
            engine.add_request(request_id, {"prompt_token_ids": ids[i]}, params)

        outputs: list[list[int]] = [[] for _ in ids]
        timeline: list[tuple[float, int, int]] = []
        first = last = None
        at_first = steps = finished = 0
        cpu_first = cpu_last = 0.0
        waiting = sorted(range(count), key=lambda i: after[i])
        while waiting or engine.has_unfinished_requests():
            while waiting and (after[waiting[0]] <= len(outputs[0]) or not engine.has_unfinished_requests()):
                send(waiting.pop(0))
            running = sum(map(bool, outputs)) - finished
            results = engine.step()
            now, cpu_now = time.perf_counter(), time.process_time()
            emitted = 0
            for output in results:
                tokens = output.outputs[0].token_ids
                finished += output.finished
                if not tokens:
                    continue
                i = index[output.request_id]
                mine = outputs[i]
                if mine:
                    steps += 1  # a request's first tokens come from its prefill, not from a decode step
                else:
                    waits[i] = now - sent_at[i]
                mine.extend(tokens)
                emitted += len(tokens)
                last, cpu_last = now, cpu_now
            if emitted:
                timeline.append((now - sent_at[0], emitted, running))
            if first is None and last is not None:
                first, cpu_first, at_first = last, cpu_last, sum(map(len, outputs))
        seconds = last - first if first is not None and last is not None else 0.0
        return Block(
            outputs=outputs,
            texts=[tokenizer.decode(tokens) for tokens in outputs],
            first_s=(first - sent_at[0]) if first is not None else 0.0,
            seconds=seconds,
            cpu_seconds=cpu_last - cpu_first,
            timed_tokens=sum(map(len, outputs)) - at_first,
            decoded=sum(len(tokens) - 1 for tokens in outputs if tokens),
            steps=steps,
            drafted=self._counter("num_draft_tokens") - drafted,
            accepted=self._counter("num_accepted_tokens") - accepted,
            waits=waits,
            timeline=timeline,
            stats=self._drafter_stats(),
        )

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        chat = [{"role": "user", "content": prompt}]
        tokenizer = self._llm.get_tokenizer()
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return tokenizer.encode(text, add_special_tokens=False)

    def _drafter_stats(self) -> dict[str, float]:
        worker = self._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        drafter = getattr(worker.model_runner, "drafter", None)
        return drafter.stats() if getattr(drafter, "is_specplug", False) else {}
