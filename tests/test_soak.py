"""Long runs and long starts: memory over thousands of requests, and vLLM's default compiled mode."""

from __future__ import annotations

import concurrent.futures
import itertools
import time

import pytest
from server import MODEL, Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

REQUESTS = 2000
#: From here on the store of past outputs is full and every buffer has its size.
SETTLED = 200
CONCURRENT = 16
#: What the engine's processes may gain from request 200 to 2,000. Leaking the state of ended requests would show:
#: one request's suffix automaton alone is some 20 KB, 36 MB over 1,800 requests.
ALLOWED_GROWTH = 16 << 20

ARGUMENTS = ["--spec-model=vllm_specplug.Retrieval", "--spec-tokens=8", "--max-model-len=1024"]
CONFIG = {"specplug": {"retrieval": {"store_bytes": 1 << 20}}}

SUBJECTS = ("tides", "bees", "bread", "trams", "chess", "glaciers", "windmills", "soap", "bridges", "maps", "owls")
TASKS = ("Name three things about {}.", "Write a line of verse on {}.", "Count to {1} and mention {0}.", "What are {}?")


def prompts(count):
    """Distinct user messages."""
    subjects = itertools.product(TASKS, range(count), SUBJECTS)
    return [task.format(f"{subject} number {i}", i) for task, i, subject in itertools.islice(subjects, count)]


def chat(client, content, max_tokens, **settings):
    answer = client.chat.completions.create(
        model="model", messages=[{"role": "user", "content": content}], max_tokens=max_tokens, **settings
    )
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens > 0
    return answer.choices[0].message.content


def resident(server):
    """Resident bytes of the engine's processes: all of the server's but the one that speaks HTTP."""
    return sum(p.memory_info().rss for p in server.family() if p.pid != server.process.pid)


def test_memory_stays_flat_over_2000_requests(tmp_path):
    args = [*ARGUMENTS, "--enforce-eager", "--dtype=bfloat16", f"--max-num-seqs={CONCURRENT}"]
    # Otherwise memory grows as the prefix cache touches its pages for the first time: not what is looked for.
    args.append("--num-gpu-blocks-override=96")
    with (
        Server(MODEL, tmp_path / "vllm.log", args, CONFIG) as server,
        server.client() as client,
        concurrent.futures.ThreadPoolExecutor(CONCURRENT) as pool,
    ):
        started = time.monotonic()
        sizes = {}
        done = 0
        todo = iter(prompts(REQUESTS))
        while batch := list(itertools.islice(todo, 100)):
            # Every fifth is sampled; lengths vary.
            jobs = [
                pool.submit(chat, client, text, 8 + i % 17, temperature=0.8 if i % 5 == 0 else 0.0, seed=i)
                for i, text in enumerate(batch)
            ]
            for job in jobs:
                job.result()
            done += len(batch)
            server.wait_idle()
            sizes[done] = resident(server)
        print(f"{time.monotonic() - started:.0f} s; MiB: " + ", ".join(f"{n}: {b >> 20}" for n, b in sizes.items()))
        assert server.metric("vllm:request_success_total") == REQUESTS
        assert server.drafted() > REQUESTS
        assert server.accepted() > REQUESTS / 2
        growth = max(sizes[n] for n in sizes if n > SETTLED) - sizes[SETTLED]
        assert growth < ALLOWED_GROWTH, sizes
        code, left = server.terminate()
        assert (code, left) == (0, [])
        assert server.trouble() == []


def test_compiled_mode_answers_as_eager_mode_does(tmp_path):
    """vLLM's default compilation, whose first start takes minutes. Float32 and greedy: the same text."""
    wanted = prompts(8)
    texts = {}
    for mode, flags in (("eager", ["--enforce-eager"]), ("compiled", [])):
        args = [*ARGUMENTS, "--dtype=float32", *flags]
        with Server(MODEL, tmp_path / f"{mode}.log", args, CONFIG, start_s=1200) as server, server.client() as client:
            texts[mode] = [chat(client, text, 32, temperature=0.0) for text in wanted for _ in range(2)]
            assert server.accepted() > 0
            assert server.trouble() == []
            print(f"{mode}: started in {server.start_seconds:.0f} s")
    assert texts["compiled"] == texts["eager"]
    assert len(set(texts["eager"])) == len(wanted)
