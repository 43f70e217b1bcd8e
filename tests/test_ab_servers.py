"""``specplug ab`` with real vLLM servers of a small random model: what a user sees of a whole comparison, and that
nothing of vLLM's many processes stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from server import save_tiny_model

from vllm_specplug.ab import results
from vllm_specplug.cli import ab, main

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SERVE = "--enforce-eager --dtype=float32 --max-model-len=512 --max-num-seqs=8"
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
OUTPUT_TOKENS = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("ab-model") / "tiny")


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    file = tmp_path_factory.mktemp("ab-workload") / "trace.jsonl"
    rows = [{"cat": "abc"[i % 3], "prompt": [10 + i, *range(30, 40)] * 4} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arguments(model, workload, out, *arms):
    return [
        "ab",
        str(model),
        *(f"--arm={arm}" for arm in arms),
        f"--workload={workload}",
        f"--serve-args={SERVE}",
        f"--output-tokens={OUTPUT_TOKENS}",
        "--ignore-eos",
        "--concurrency=2",
        "--repeats=1",
        "--together",
        f"--out={out}",
    ]


def left_running(model, within_s=3.0):
    """Names of processes of servers of this model that are still there after a moment."""
    deadline = time.monotonic() + within_s
    while True:
        found = [p.info["name"] for p in processes_of(model)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def processes_of(model):
    """Servers of this model, and their descendants, which carry other names."""
    roots = [
        p
        for p in psutil.process_iter(["name", "cmdline", "status"])
        if p.info["status"] != psutil.STATUS_ZOMBIE
        and str(model) in (p.info["cmdline"] or ())
        and any("vllm.entrypoints" in word for word in p.info["cmdline"])
    ]
    found = list(roots)
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in root.children(recursive=True):
                child.info = {"name": child.name(), "cmdline": child.cmdline()}
                found.append(child)
    return found


@pytest.fixture(scope="module")
def compared(model, workload, tmp_path_factory):
    """Exit code, plan and cells of one comparison, with an arm whose flags vLLM rejects."""
    out = tmp_path_factory.mktemp("ab") / "out"
    patch = pytest.MonkeyPatch()
    for name, value in ENVIRONMENT.items():
        patch.setenv(name, value)
    try:
        code = main.main(arguments(model, workload, out, "none", "retrieval", "wrong=--no-such-flag 3"))
    finally:
        patch.undo()
    return code, *results.read(out), out


def test_an_arm_whose_flags_vllm_rejects(compared):
    code, plan, cells, _ = compared
    assert code == 1
    assert list(plan.failures) == ["wrong"]
    first = plan.failures["wrong"].split("\n")[0]
    assert "ended at its start (exit code 2)" in first and "--no-such-flag" in first
    assert {cell.arm for cell in cells} == {"none", "retrieval"}


def test_the_others_answer_all_requests_with_the_same_tokens(compared):
    _, _, cells, _ = compared
    replies = {
        arm: {r.index: r for cell in cells if cell.arm == arm for r in cell.replies} for arm in ("none", "retrieval")
    }
    assert sorted(replies["none"]) == sorted(replies["retrieval"]) == list(range(6))
    for index, reply in replies["none"].items():
        assert reply.error == "" and reply.output_tokens == OUTPUT_TOKENS and reply.prompt_tokens == 44
        assert reply.tokens is not None and len(reply.tokens) == OUTPUT_TOKENS
        assert replies["retrieval"][index].tokens == reply.tokens
        assert 0 < reply.first_s < reply.total_s
    assert all(len(r.gaps_s) < OUTPUT_TOKENS - 1 for r in replies["retrieval"].values()), "several tokens in a step"


def test_counters_and_memory(compared):
    _, _, cells, _ = compared
    by_arm = {}
    for cell in cells:
        counts = by_arm.setdefault(cell.arm, {})
        for name, value in cell.counters.items():
            counts[name] = counts.get(name, 0) + value
    assert by_arm["none"]["vllm:generation_tokens"] == 6 * OUTPUT_TOKENS
    assert by_arm["none"]["vllm:iteration_tokens_total_count"] > OUTPUT_TOKENS
    assert "vllm:spec_decode_num_drafts" not in by_arm["none"]
    assert by_arm["retrieval"]["vllm:spec_decode_num_accepted_tokens"] > 0
    assert by_arm["retrieval"]['vllm:spec_decode_num_accepted_tokens_per_pos{position="0"}'] > 0
    assert any(name.startswith("vllm_specplug:drafted_tokens{depth=") for name in by_arm["retrieval"])
    assert all(cell.memory_bytes > 200e6 for cell in cells)


def test_reports_are_written_and_nothing_is_left(compared, model):
    *_, out = compared
    for name in (ab.SUMMARY_JSON, ab.SUMMARY_CSV, ab.REPORT):
        assert (out / name).stat().st_size > 500
    assert left_running(model) == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["the run", "an engine"])
def test_kills(model, workload, tmp_path, victim):
    """Ctrl-C for the run; SIGKILL for the engine process of one server, whose API process lives on for a while."""
    out = tmp_path / "out"
    run = subprocess.Popen(
        [sys.executable, "-m", "vllm_specplug.cli.main", *arguments(model, workload, out, "none", "retrieval")],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 240
        while not (out / results.CELLS).exists():
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if victim == "the run":
            run.send_signal(signal.SIGINT)
        else:
            servers = [p for p in processes_of(model) if "--spec-model=vllm_specplug.Retrieval" in p.info["cmdline"]]
            engines = [c for c in servers[0].children(recursive=True) if "EngineCore" in c.name()]
            assert engines
            engines[0].kill()
        printed = run.communicate(timeout=120)[0]
    finally:
        run.kill()
    assert left_running(model) == [], printed
    plan, cells = results.read(out)
    assert len(cells) >= 1
    if victim == "the run":
        assert run.returncode == 130, printed
    else:
        assert run.returncode == 1, printed
        assert list(plan.failures) == ["retrieval"]
        assert sum(len(cell.replies) for cell in cells if cell.arm == "none") == 6
