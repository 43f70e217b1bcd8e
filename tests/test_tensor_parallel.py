"""Tensor parallelism over two CPU workers: the same tokens as without speculation, drafted by one rank only."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tree_proposers
from server import environment, save_tiny_model

pytestmark = [
    pytest.mark.engine,
    # vLLM refuses two workers on one core.
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="tensor parallel 2 needs two cores"),
]

#: In a process of its own: its threads are bound to cores, and its workers are its children.
DRIVER = textwrap.dedent(
    """
    import json, sys

    import tree_proposers

    tree_proposers.register()  # in the workers too

    def counters(worker):
        return {"rank": worker.rank, **worker.model_runner.drafter.stats()}

    def main():
        from vllm import LLM, SamplingParams

        settings, prompts, truths = json.load(sys.stdin)
        llm = LLM(dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=8, disable_log_stats=False,
                  tensor_parallel_size=2, **settings)
        params = [
            SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, extra_args={"seed": i, "truth": truth})
            for i, truth in enumerate(truths)
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]
        ranks = llm.collective_rpc(counters) if "speculative_config" in settings else []
        found = {m.name: m.value for m in llm.get_metrics() if "spec_decode" in m.name and hasattr(m, "value")}
        print("RESULT " + json.dumps([outputs, ranks, found]), flush=True)

    if __name__ == "__main__":
        main()
    """
)


def run(tmp_path, settings, prompts, truths=None):
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    first, second = sorted(os.sched_getaffinity(0))[:2]
    env = environment(
        VLLM_CPU_OMP_THREADS_BIND=f"{first}|{second}",
        # The function that reads the counters goes to the workers by value.
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
        PYTHONPATH=str(Path(__file__).parent),
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(json.dumps([settings, prompts, truths or [[]] * len(prompts)]), timeout=400)
    finally:
        # Its session is its own: nothing else is in the group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    result = re.search(r"RESULT (.*)$", output, re.MULTILINE)
    assert result, f"exit code {process.returncode}\n{output[-5000:]}"
    return json.loads(result[1]), output


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model, prompts, and their outputs without speculation."""
    folder = tmp_path_factory.mktemp("plain")
    model = str(save_tiny_model(folder / "model"))
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 40) for _ in range(10)] * 4 for _ in range(6)]
    (expected, _, _), _ = run(folder, {"model": model}, prompts)
    assert [len(tokens) for tokens in expected] == [64] * len(prompts)
    return model, prompts, expected


def test_two_ranks(tmp_path, plain):
    model, prompts, expected = plain
    speculative = {"method": "custom_class", "model": "vllm_specplug.Retrieval", "num_speculative_tokens": 6}
    (outputs, ranks, metrics), log = run(tmp_path, {"model": model, "speculative_config": speculative}, prompts)

    assert outputs == expected
    assert metrics["vllm:spec_decode_num_draft_tokens"] > 0
    assert metrics["vllm:spec_decode_num_accepted_tokens"] > 0
    first, second = sorted(ranks, key=lambda r: r["rank"])
    assert first["requests"] == len(prompts)
    assert first["drafted"] >= metrics["vllm:spec_decode_num_draft_tokens"]
    assert (second["requests"], second["steps"], second["drafted"]) == (0, 0, 0)
    assert log.count("proposer retrieval is ready") == 1
    assert first["errors"] == 0 and "ERROR" not in log


def test_trees_on_two_ranks(tmp_path, plain):
    """One rank drafts; both place, attend, verify and move the same trees."""
    model, prompts, expected = plain
    config = {"specplug": {"trees": {"vocabulary": 256}}}
    settings = {"model": model, "speculative_config": tree_proposers.speculative(12), "additional_config": config}
    (outputs, ranks, metrics), log = run(tmp_path, settings, prompts, expected)

    assert outputs == expected
    first, second = sorted(ranks, key=lambda r: r["rank"])
    assert (second["requests"], second["drafted"]) == (0, 0)
    for name in ("tree_steps", "trees_verified", "tree_nodes_verified", "tree_nodes_accepted", "rows_moved"):
        assert first[name] == second[name] > 10, name
    assert first["errors"] == 0 and "ERROR" not in log
    assert log.count("drafts may be trees") == 1
    assert metrics["vllm:spec_decode_num_draft_tokens"] >= first["tree_nodes_verified"]
