"""Runs of ``specplug ab`` on stand-ins for vLLM servers: what is measured and kept, and that nothing is left running,
whatever ends a run."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import time

import ab_driver
import fake_vllm
import psutil
import pytest

from vllm_specplug.ab import compare, load, plan, results, servers, workloads
from vllm_specplug.ab.results import Load
from vllm_specplug.cli import ab, main

pytest.importorskip("vllm", reason="the client of vLLM's own benchmark sends the requests")

#: Fast enough to be over soon, slow enough to be interrupted.
STEP = "--fake step=2"


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr(servers, "vllm_command", servers.vllm_command)  # put back afterwards
    ab_driver.fake_vllm()


@pytest.fixture
def tag(tmp_path):
    """On the command line of every server of the test; none of them may outlive it."""
    name = f"--tag={tmp_path}"
    yield name
    assert left_running(name) == []


def left_running(tag, within_s=3.0):
    """Command lines of the servers that are still there after a moment."""
    deadline = time.monotonic() + within_s
    while (found := tagged(tag)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [process.info["cmdline"] for process in found]


def tagged(tag):
    value = tag.removeprefix("--tag=")
    return [
        p
        for p in psutil.process_iter(["cmdline", "status"])
        if p.info["status"] != psutil.STATUS_ZOMBIE
        and p.pid != os.getpid()
        and any("fake_vllm.py" in word or word.startswith("import time") for word in p.info["cmdline"] or ())
        and any(word.endswith(value) for word in p.info["cmdline"] or ())
    ]


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr(ab, "write_reports", lambda folder, console: 0)


def command(tmp_path, tag, *arguments):
    return [
        "ab",
        "fake-model",
        f"--serve-args={tag}",
        f"--out={tmp_path / 'out'}",
        "--requests=6",
        "--output-tokens=8",
        "--timeout-s=20",
        *arguments,
    ]


class Watcher:
    """A progress that remembers."""

    def __init__(self):
        self.states, self.notes, self.left = [], [], []

    def state(self, arm, state, detail=""):
        self.states.append((arm, state))

    def advance(self, arm, requests, left_s):
        self.left.append(left_s)

    def note(self, text):
        self.notes.append(text)


def run(tmp_path, tag, arms, **options):
    """A run through :mod:`compare`; the plan, the cells and the watcher."""
    given = {"model": "fake-model", "serve_args": tag, "output_tokens": 8, "timeout_s": 20, "arms": arms, **options}
    settings, _ = plan.build(given)
    requests = workloads.sample(workloads.read(None), 6, 0)
    watcher = Watcher()
    compare.run(settings, requests, "test", tmp_path, watcher)
    return *results.read(tmp_path), watcher


def test_every_arm_gets_the_same_requests_in_turns(tmp_path, tag):
    arms = ["none", "fast=--fake per-step=4", "wrong=--fake wrong"]
    made, cells, watcher = run(tmp_path, tag, arms, concurrency="1,3", repeats=1, blocks=4)
    assert made.failures == {}
    assert made.facts["complete"] and made.facts["interleaved"]
    assert [a.name for a in made.arms] == ["none", "fast", "wrong"]
    # Four blocks at concurrency 1, two of three requests at concurrency 3; each with every arm.
    sizes = [(cell.load.concurrency, len(cell.replies)) for cell in cells[::3]]
    assert sizes == [(1, 1), (1, 2), (1, 1), (1, 2), (3, 3), (3, 3)]
    assert len(cells) == 6 * 3
    assert all(cell.failure == "" for cell in cells)
    turns = [cells[i : i + 3] for i in range(0, len(cells), 3)]
    for turn in turns:
        assert {cell.arm for cell in turn} == {"none", "fast", "wrong"}
        assert len({(cell.load, cell.repeat, cell.block) for cell in turn}) == 1
        assert len({tuple(reply.index for reply in cell.replies) for cell in turn}) == 1
        by_arm = {cell.arm: cell for cell in turn}
        outputs = {arm: [reply.tokens for reply in cell.replies] for arm, cell in by_arm.items()}
        assert outputs["none"] == outputs["fast"] != outputs["wrong"]
        assert by_arm["none"].replies[0].text == by_arm["fast"].replies[0].text
    assert len({turn[0].arm for turn in turns}) == 3, "the first one changes"
    assert watcher.left[0] is not None and watcher.left[-1] == 0


def test_a_reply_has_tokens_times_and_counts(tmp_path, tag):
    _, cells, _ = run(tmp_path, tag, ["fast=--fake step=20 --fake per-step=4"], concurrency="1", repeats=1, blocks=1)
    (cell,) = cells
    reply = cell.replies[0]
    asked = [{"role": "user", "content": [{"type": "text", "text": prompt_of(reply.index)}]}]
    assert reply.tokens == fake_vllm.output(asked, 8, False)
    assert reply.text == "".join(f" w{token}" for token in reply.tokens)
    assert (reply.prompt_tokens, reply.output_tokens, reply.error) == (7, 8, "")
    # Two pieces of 4 tokens, 20 ms each, after an opening without tokens.
    assert len(reply.gaps_s) == 1 and reply.gaps_s[0] > 0.01
    assert reply.total_s > 0.03
    assert cell.seconds >= sum(r.total_s for r in cell.replies)
    assert cell.replies[1].sent_s >= reply.total_s
    drafts = {name: value for name, value in cell.counters.items() if "num_drafts" in name}
    assert drafts == {"vllm:spec_decode_num_drafts": 2.0 * 6}
    assert cell.counters['vllm:spec_decode_num_accepted_tokens_per_pos{position="0"}'] == 6 * 6
    assert not any("running" in name for name in cell.counters)
    assert cell.memory_bytes is not None and 2**22 < cell.memory_bytes < 2**30
    assert cell.cpu_busy is None or 0 <= cell.cpu_busy <= 1


def prompt_of(index):
    return next(r.prompt for r in workloads.read(None) if r.index == index)


def test_servers_one_after_another(tmp_path, tag):
    made, cells, watcher = run(tmp_path, tag, ["none", "b=none"], together=False, concurrency="2", repeats=2)
    up, most = set(), 0
    for arm, state in watcher.states:
        up = up | {arm} if state == "starting" else up - {arm} if state == "stopped" else up
        most = max(most, len(up))
    assert (most, up) == (1, set())
    assert not made.facts["interleaved"]
    assert "one after another" in watcher.notes[0] and made.facts["notes"] == watcher.notes
    assert [(c.arm, c.repeat) for c in cells if c.block == 0] == [("none", 0), ("b", 0), ("b", 1), ("none", 1)]


def test_memory_decides_whether_servers_run_together(tmp_path, tag, monkeypatch):
    monkeypatch.setattr(servers, "has_accelerator", lambda: False)
    monkeypatch.setattr(compare, "available_gib", lambda: 0.5)
    made, cells, watcher = run(tmp_path, tag, ["none", "b=none"], concurrency="2", repeats=1)
    assert not made.facts["interleaved"]
    assert "GiB of memory are missing to run all at once" in watcher.notes[0]
    assert {cell.arm for cell in cells} == {"none", "b"}


def test_every_pass_has_fresh_servers_unless_asked_otherwise(tmp_path, tag):
    for folder, options, starts in (("a", {}, 2), ("b", {"keep_servers": True}, 1)):
        (tmp_path / folder).mkdir()
        made, _, watcher = run(tmp_path / folder, tag, ["none"], concurrency="2", repeats=2, **options)
        assert watcher.states.count(("none", "starting")) == starts
        assert made.facts["keep_servers"] is (starts == 1)  # the verdict reads it


def test_token_ids_are_sent_as_they_are(tmp_path, tag):
    settings, _ = plan.build(
        {"model": "fake-model", "serve_args": tag, "output_tokens": 4, "arms": ["none"], "repeats": 1}
    )
    requests = [workloads.Request(0, "x", [5, 6, 7])]
    compare.run(settings, requests, "test", tmp_path, Watcher())
    _, cells = results.read(tmp_path)
    assert cells[0].replies[0].tokens == fake_vllm.output([5, 6, 7], 4, False)


def test_a_rate_is_the_same_arrivals_for_every_arm(tmp_path, tag):
    _, cells, _ = run(tmp_path, tag, ["none", "b=none"], rate="50", repeats=1, blocks=1)
    first, second = ([reply.sent_s for reply in cell.replies] for cell in cells)
    assert first == pytest.approx(second, abs=0.05)
    assert first == pytest.approx(load.arrivals(6, 50, (0, 0, 0, 0)), abs=0.05)


def test_arrivals_are_a_poisson_process():
    times = load.arrivals(20000, 4.0, (1, 2))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert times[0] == 0 and mean == pytest.approx(0.25, rel=0.03) and spread == pytest.approx(0.25, rel=0.05)
    assert load.arrivals(5, 4.0, (1, 2)) == times[:5] != load.arrivals(5, 4.0, (1, 3))


# Arms that fail


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("bad=--fake fail", ["ended at its start (exit code 1): ValueError: no such model here", "last lines of"]),
        ("bad=--fake die=5", ["ended while it was measured", "exit code 3", "  RuntimeError: the fake model is tired"]),
        ("bad=--fake hang=5", ["did not answer a request within 3 s"]),
        ("bad=--fake refuse", ["400 Bad Request: this request is not to my taste"]),
        ("bad=http://127.0.0.1:1", ["no server at http://127.0.0.1:1: "]),
    ],
)
def test_an_arm_that_fails_says_why_and_the_others_go_on(tmp_path, tag, no_report, capsys, arm, said):
    arguments = ["--arm=none", f"--arm={arm}", "--arm=c=none", "--concurrency=2", "--repeats=2", "--timeout-s=3"]
    assert main.main(command(tmp_path, tag, *arguments)) == 1
    made, cells = results.read(tmp_path / "out")
    assert list(made.failures) == ["bad"]
    printed = capsys.readouterr().out
    for text in said:
        assert text in made.failures["bad"] and text in printed
    whole = [cell for cell in cells if not cell.failure]
    counted = {name: sum(len(c.replies) for c in whole if c.arm == name) for name in ("none", "c")}
    assert counted == {"none": 12, "c": 12}


def test_the_same_failure_of_all_arms_is_said_once(tmp_path, tag, no_report, capsys):
    arguments = ["--arm=a=--fake fail", "--arm=b=--fake fail", "--concurrency=1", "--repeats=1"]
    assert main.main(command(tmp_path, tag, *arguments)) == 1
    assert capsys.readouterr().out.count("no such model here") == 1


def test_replies_before_a_death_are_kept(tmp_path, tag, no_report):
    # Warm-up takes two requests.
    arguments = ["--arm=bad=--fake die=6", "--concurrency=1", "--repeats=1", "--blocks=1"]
    assert main.main(command(tmp_path, tag, *arguments)) == 1
    (cell,) = results.read(tmp_path / "out")[1]
    assert [reply.error == "" for reply in cell.replies] == [True] * 3 + [False] * 3
    assert cell.failure == "ended"


def test_a_port_in_use_is_said_before_anything_starts(tmp_path, tag, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main.main(command(tmp_path, tag, "--arm=none", f"--port={port}")) == 2
    assert f"port {port}, for arm none, cannot be used" in capsys.readouterr().err


@contextlib.contextmanager
def running(tag, *flags):
    """A server that the run does not start."""
    port = servers.choose_ports(plan.build({"arms": ["a=none"]})[0])["a"]
    arguments = [*servers.vllm_command(), "--host=127.0.0.1", f"--port={port}", tag, *flags]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.mark.parametrize("behaviour", ["refuse-ids", "no-ids"])
def test_a_server_by_url_that_tells_no_token_ids(tmp_path, tag, behaviour):
    with running(tag, "--fake", behaviour) as (process, url):
        made, cells, watcher = run(tmp_path, tag, ["none", f"there={url}"], concurrency="2", repeats=1)
        assert process.poll() is None, "a server that was not started is not stopped"
    assert made.failures == {}
    assert "by URL are not started anew" in watcher.notes[0]
    there = [cell for cell in cells if cell.arm == "there"]
    assert all(reply.tokens is None and reply.text and not reply.error for cell in there for reply in cell.replies)
    assert all(cell.memory_bytes is None for cell in there)
    assert [r.text for r in there[0].replies] == [r.text for r in cells[0].replies if cells[0].block == there[0].block]


# Runs that are ended


class Driven:
    """A run of the command in its own process, with a slow server and one that has a child and ignores SIGTERM."""

    def __init__(self, tmp_path, tag, *arguments, prepare=ab_driver.no_reports):
        self.out, self.printed = tmp_path / "out", tmp_path / "printed"
        slow = "--fake step=10"
        arms = [f"--arm=a={slow}", f"--arm=b={slow} --fake child --fake stubborn", "--concurrency=1", "--blocks=3"]
        self.process = ab_driver.start(command(tmp_path, tag, *arms, *arguments), self.printed, prepare)

    def wait_for_cells(self, count):
        deadline = time.monotonic() + 60
        while len(self.cells()) < count:
            assert self.process.is_alive(), self.printed.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def cells(self):
        return results.read(self.out)[1] if (self.out / results.PLAN).exists() else []

    def send(self, number):
        os.kill(self.process.pid, number)

    def end(self):
        """Exit code, and what was printed."""
        try:
            self.process.join(60)
        finally:
            self.process.kill()
        return self.process.exitcode, self.printed.read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_its_results_and_leaves_nothing(tmp_path, tag, number, code):
    driven = Driven(tmp_path, tag, prepare=lambda: None)
    driven.wait_for_cells(2)
    driven.send(number)
    returned, printed = driven.end()
    assert returned == code, printed
    assert "Interrupted: the servers are stopped, what was measured is kept." in printed
    assert "Traceback" not in printed
    assert left_running(tag) == []
    assert len(driven.cells()) >= 2
    assert (driven.out / ab.REPORT).exists() and (driven.out / ab.SUMMARY_JSON).exists()


@pytest.mark.parametrize(("number", "said"), [(signal.SIGKILL, "killed by SIGKILL"), (signal.SIGSTOP, "within 2 s")])
def test_a_server_killed_or_stopped_from_outside(tmp_path, tag, number, said):
    driven = Driven(tmp_path, tag, "--timeout-s=2", "--repeats=1")
    driven.wait_for_cells(2)
    (victim,) = [p for p in tagged(tag) if "stubborn" in p.info["cmdline"]]
    victim.send_signal(number)
    returned, printed = driven.end()
    assert returned == 1, printed
    assert left_running(tag) == []
    made, cells = results.read(driven.out)
    assert list(made.failures) == ["b"] and said in made.failures["b"]
    assert sum(len(cell.replies) for cell in cells if cell.arm == "a") == 6


def test_a_full_disk(tmp_path, tag):
    driven = Driven(tmp_path, tag, prepare=ab_driver.full_disk(4))
    returned, printed = driven.end()
    assert returned == 2, printed
    assert "results cannot be written: No space left on device. What was written is kept." in printed
    assert "Traceback" not in printed
    assert left_running(tag) == []
    assert len(driven.cells()) == 3


def test_a_killed_run_takes_its_servers_along(tmp_path, tag):
    driven = Driven(tmp_path, "--tag=killed", "--repeats=1")
    # Nobody is left to see to a server that ignores SIGTERM: this is about the other one.
    driven.wait_for_cells(1)
    driven.send(signal.SIGKILL)
    driven.end()
    (stubborn,) = [p for p in tagged("--tag=killed") if "stubborn" in p.info["cmdline"]]
    children = [p for p in tagged("--tag=killed") if "fake_vllm.py" not in " ".join(p.info["cmdline"])]
    deadline = time.monotonic() + 5
    while [p for p in tagged("--tag=killed") if p.pid != stubborn.pid and p not in children]:
        assert time.monotonic() < deadline, "the other server still runs"
        time.sleep(0.05)
    for process in (stubborn, *children):
        process.kill()


# Parts


@pytest.mark.parametrize(
    ("log", "decisive"),
    [
        (["INFO 11-21 13:00:00 [a.py:1] hello", "vllm serve: error: unrecognized arguments: --x"], 1),
        (["vllm-specplug: error: specplug.auto.min_prob = 2 is not allowed."], 0),
        (
            [
                "(EngineCore pid=12) ERROR 11-21 13:00:00 [core.py:1] ValueError: not enough memory",
                "Traceback (most recent call last):",
                "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
            ],
            0,
        ),
        (
            [
                "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
                "  Value error, Invalid repository ID or local directory specified: './x'",
                "    For further information visit https://errors.pydantic.dev",
            ],
            1,
        ),
        (["INFO 11-21 13:00:00 [a.py:1] no error: all is well"], None),
    ],
)
def test_the_line_of_a_log_that_says_most(log, decisive):
    expected = "" if decisive is None else log[decisive].split("] ")[-1].strip()
    assert servers.decisive_line(log) == expected


def test_counters_are_summed_over_engines_and_told_by_their_labels():
    text = (
        "# TYPE vllm_specplug:accepted_tokens_total counter\n"
        'vllm_specplug:accepted_tokens_total{depth="1",engine="0",model_name="m",source="own"} 3\n'
        'vllm_specplug:accepted_tokens_total{depth="1",engine="1",model_name="m",source="own"} 4\n'
        "# TYPE vllm_specplug:paused gauge\nvllm_specplug:paused 1\n"
        "# TYPE vllm:iteration_tokens_total histogram\n"
        'vllm:iteration_tokens_total_bucket{le="+Inf"} 9\n'
        "vllm:iteration_tokens_total_count 9\nvllm:iteration_tokens_total_sum 99\n"
        "# TYPE vllm:generation_tokens_total counter\n"
        'vllm:generation_tokens_total{model_name="m"} 5\nvllm:generation_tokens_created{model_name="m"} 1e9\n'
    )
    assert servers.read_counters(text) == {
        'vllm_specplug:accepted_tokens{depth="1",source="own"}': 7.0,
        "vllm:iteration_tokens_total_count": 9.0,
        "vllm:generation_tokens": 5.0,
    }
    assert servers.increase({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 5.0, "c": 1.0}) == {"b": 3.0, "c": 1.0}


def test_a_chat_templates_absence_is_explained(tmp_path, tag, monkeypatch):
    settings, _ = plan.build({"model": "m", "arms": ["none"], "serve_args": tag})
    comparison = compare.Comparison(settings, [workloads.Request(0, "", "x")], "t", tmp_path, Watcher())
    monkeypatch.setattr(servers.Server, "alive", lambda self: True)
    monkeypatch.setattr(servers.Server, "_family", lambda self: [])
    comparison._fail_after("none", "400 Bad Request: a chat template is required")
    assert "--api completions" in comparison.failures["none"]


def test_reports_of_an_earlier_run(tmp_path, tag, capsys):
    run(tmp_path, tag, ["none", "fast=--fake per-step=4"], concurrency="2", repeats=2)
    assert main.main(["ab", "report", str(tmp_path)]) == 0
    for name in (ab.SUMMARY_JSON, ab.SUMMARY_CSV, ab.REPORT):
        assert (tmp_path / name).stat().st_size > 100
    assert "fast" in json.loads((tmp_path / ab.SUMMARY_JSON).read_text())["results"][-1]["arm"]
    assert "Written:" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_is_said(tmp_path, tag, capsys):
    run(tmp_path, tag, ["none"], concurrency="2", repeats=1)
    (tmp_path / ab.SUMMARY_CSV).mkdir()
    assert main.main(["ab", "report", str(tmp_path)]) == 1
    assert "summary.csv could not be written: Is a directory" in capsys.readouterr().out
    assert (tmp_path / ab.REPORT).exists()


def test_how_long_it_takes_is_estimated_from_what_was_measured():
    times = compare._Times(per_request={Load(concurrency=1): [2.0, 4.0]})
    assert times.request_s(Load(concurrency=1)) == 3.0
    assert times.request_s(Load(concurrency=4)) == 1.5
    assert times.request_s(Load(rate=0.5)) == 2.0
    assert compare._Times().request_s(Load(concurrency=1)) is None
    assert (ab._left(None), ab._left(20.0), ab._left(600.0)) == ("", ", about 20 s left", ", about 10 min left")
