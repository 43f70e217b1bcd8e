"""Verification of a step's drafts beside vLLM's rejection sampler, on the same logits, in one run; no model.

    python benchmarks/bench_verification.py [--vocab 49152] [--repeats 30] [--csv FILE]

Chains, of which each request accepts ``--accepted`` drafts (the rejection sampler verifies nothing else), and for the
plugin also trees of the same size. Greedy, and sampled at temperature 0.8 with a top-p of 0.9. The ways of verifying
take turns, so that a noisy machine disturbs all alike; figures are the median (p20, p80) time of a step, logits copied
outside of it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from replay import write_rows

SEED = 0


def sampling_metadata(requests: int, greedy: bool) -> Any:
    """What the runner would have of ``requests`` requests."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    zeros = torch.zeros(requests)
    return SamplingMetadata(
        temperature=None if greedy else torch.full((requests,), 0.8),
        all_greedy=greedy,
        all_random=not greedy,
        top_p=None if greedy else torch.full((requests,), 0.9),
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=zeros,
        presence_penalties=zeros,
        repetition_penalties=zeros + 1,
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
        spec_token_ids=[[] for _ in range(requests)],
    )


def spec_metadata(drafts: np.ndarray) -> Any:
    """What the runner would have of ``drafts`` (``int32[requests, K]``)."""
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    requests, k = drafts.shape
    metadata = SpecDecodeMetadata.make_dummy(drafts.tolist(), torch.device("cpu"))
    rows = np.arange(requests * (k + 1), dtype=np.int32).reshape(requests, k + 1)
    metadata.target_logits_indices = torch.from_numpy(rows[:, :-1].flatten())
    metadata.bonus_logits_indices = torch.from_numpy(rows[:, -1].copy())
    metadata.logits_indices = torch.from_numpy(rows.flatten())
    return metadata


def measure(
    ways: dict[str, Callable[[torch.Tensor], Any]], logits: torch.Tensor, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds per call of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 2):
        for name, way in ways.items():
            copy = logits.clone()
            start = time.perf_counter()
            way(copy)
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--accepted", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()

    from vllm.platforms import current_platform
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    from vllm_specplug.host import cpu_sampling, numba_guard, verification

    numba_guard.protect()
    cpu_sampling.install()
    current_platform.register_triton_kernel_overrides()
    sampler = Sampler()
    stock = RejectionSampler(sampler)
    verification.warm_up()
    rng = np.random.default_rng(SEED)
    rows: list[dict[str, Any]] = []
    for requests, size in ((1, 7), (16, 7), (64, 17)):
        for kind, dtype in (("greedy", torch.bfloat16), ("greedy", torch.float32), ("sampled", torch.float32)):
            k = size - 1
            logits = torch.randn(requests * size, args.vocab, generator=torch.Generator().manual_seed(SEED)).to(dtype)
            drafts = rng.integers(0, args.vocab, (requests, k)).astype(np.int32)
            # The drafts to accept are made near certain, the next one is not drafted.
            for i in range(requests):
                for m in range(args.accepted):
                    logits[i * size + m, drafts[i, m]] = 60.0
            metadata, spec = sampling_metadata(requests, kind == "greedy"), spec_metadata(drafts)
            runner = SimpleNamespace(sampler=sampler, input_batch=SimpleNamespace(sampling_metadata=metadata))
            # The accepted chain first, then each further node below a node of it.
            parents = np.arange(-1, k, dtype=np.int32)
            parents[args.accepted + 1 :] = np.arange(k - args.accepted) % (args.accepted + 1)
            parents = np.tile(parents, requests)

            def plugin(x: torch.Tensor, runner: Any = runner, spec: Any = spec, parents: Any = None) -> Any:
                return verification.verify(runner, x, spec, parents)

            ways: dict[str, Callable[[torch.Tensor], Any]] = {
                "vllm": lambda x, spec=spec, metadata=metadata: stock(spec, None, x, metadata),
                "chains": plugin,
                "trees": lambda x, plugin=plugin, parents=parents: plugin(x, parents=parents),
            }
            emitted = {"vllm": ways["vllm"](logits.clone()).sampled_token_ids}
            emitted |= {way: ways[way](logits.clone()).output.sampled_token_ids for way in ("chains", "trees")}
            counts = {way: int((tokens >= 0).sum()) for way, tokens in emitted.items()}
            assert set(counts.values()) == {requests * (args.accepted + 1)}, counts
            for way, times in measure(ways, logits, args.repeats).items():
                low, median, high = np.percentile(times, [20, 50, 80])
                name = str(dtype).removeprefix("torch.")
                print(f"{requests:3}x{size:<3} {kind:8} {name:9} {way:7} {median:8.3f} ms  ({low:.3f}, {high:.3f})")
                rows.append(
                    {
                        "benchmark": "verification",
                        "provider": way,
                        "task": f"{requests}x{size} {kind} {name}",
                        "metric": "time_per_step",
                        "unit": "ms",
                        "value": f"{median:.4f}",
                        "p20": f"{low:.4f}",
                        "p80": f"{high:.4f}",
                        "config": f"vocab={args.vocab} accepted={args.accepted} threads={torch.get_num_threads()}",
                        "seed": SEED,
                    }
                )
    if args.csv:
        write_rows(args.csv, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
