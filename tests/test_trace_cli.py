"""``specplug trace``: what it prints, and one clear line for everything that is wrong. No engine is started here."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import prometheus_client
import pytest
import traces
from test_stats import serving

from vllm_specplug import registry
from vllm_specplug.cli import main
from vllm_specplug.host import metrics
from vllm_specplug.host.draft_counts import DEPTHS, SOURCES
from vllm_specplug.host.recorder import Recorder
from vllm_specplug.trace.writer import RotatingFiles

TIMES = ("--step-times", "1:20,8:24")


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return str(traces.make(tmp_path_factory.mktemp("traces") / "t.jsonl.gz", 12, topk=8))


def run(capsys, *args):
    """What an invocation that must work prints."""
    assert main.main(["trace", *args]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def error_of(capsys, *args):
    """The single line that an invocation that must fail prints."""
    assert main.main(["trace", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("specplug: error: ")
    return captured.err


# record


def test_record_prints_a_setting_that_the_server_takes(tmp_path, capsys):
    folder = str(tmp_path / "traces")
    text = run(capsys, "record", "--dir", folder, "--topk", "8")
    setting = shlex.split(text.splitlines()[1])
    assert setting[0] == "--additional-config"
    trace = registry.parse_options(json.loads(setting[1])).trace
    assert (trace.dir, trace.topk, trace.text) == (folder, 8, False)
    config = json.loads(run(capsys, "record", "--dir", folder, "--text", "--json"))
    assert config == {"specplug": {"trace": {"dir": folder, "text": True}}}


def test_record_checks_what_it_is_given(tmp_path, capsys):
    assert "--dir is required" in error_of(capsys, "record")
    assert "specplug.trace.topk = 17 is not allowed" in error_of(capsys, "record", "--dir", "x", "--topk", "17")
    assert "there is no directory" in error_of(capsys, "record", "--dir", str(tmp_path / "a" / "b"))


def serve(tmp_path, monkeypatch, totals):
    """A server whose engine has published ``totals``."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv(metrics.ENVIRONMENT, str(tmp_path))
    counts = np.zeros((3, len(SOURCES), DEPTHS), np.int64)
    metrics.Publisher({"engine": "0"}, lambda: metrics.Snapshot(totals, SOURCES, counts, []))
    prometheus = prometheus_client.CollectorRegistry()
    prometheus.register(metrics.Collector())
    return serving(lambda: prometheus_client.generate_latest(prometheus).decode())


def test_record_asks_a_server(tmp_path, capsys, monkeypatch):
    writer = RotatingFiles(Path("/var/traces.d"), 1 << 20, 4)
    totals = Recorder(writer).stats() | {"trace_requests": 12.0, "trace_bytes": 3456.0, "steps": 5.0, "other": 5.0}
    with serve(tmp_path, monkeypatch, totals) as url:
        text = run(capsys, "record", "--url", url)
        (found,) = json.loads(run(capsys, "record", "--url", url, "--json"))["engines"]
    assert text == "engine 0 records to /var/traces.d: 12 requests, 3,456 bytes; 0 left out, 0 failures to write\n"
    assert found["dirs"] == ["/var/traces.d"] and found["trace_bytes"] == 3456 and "other" not in found


def test_record_asks_a_server_that_does_not_record(tmp_path, capsys, monkeypatch):
    with serve(tmp_path, monkeypatch, {"steps": 5.0}) as url:
        assert main.main(["trace", "record", "--url", url]) == 1
    assert "engine 0 does not record" in capsys.readouterr().out


# info


def test_info(trace, capsys):
    document = json.loads(run(capsys, "info", trace, "--json"))
    assert (document["requests"], document["topk"], document["cut_short"]) == (12, 8, [])
    *tasks, whole = document["tasks"]
    assert [t["task"] for t in tasks] == ["a", "b"] and whole["output tokens"] == 12 * 40
    assert whole["MAT"] == pytest.approx(1 + whole["accepted"] * whole["drafts/step"], rel=0.05)
    assert document["step_seconds_by_rows"]["1"] == pytest.approx(0.020, rel=0.1)
    text = run(capsys, "info", trace)
    assert "12 requests" in text and "recorded by Auto (K=8) with m, vLLM 0.32.0" in text


# replay


def test_replay_table_and_json(trace, capsys):
    document = json.loads(run(capsys, "replay", trace, "--json", "--limit", "4", "--limit", "8"))
    totals = [row for row in document["rows"] if row["task"] == "total"]
    assert totals[0]["proposer"] == "none" and totals[0]["speedup"] == 1.0 and totals[0]["mat"] == 1.0
    built_in = {"Auto", "AdaptiveLength", "Retrieval", "TokenRecycling"}
    assert {(row["proposer"], row["limit"]) for row in totals[1:]} >= {(n, k) for n in built_in for k in (4, 8)}
    assert document["step_times"].startswith("measured in ")
    for row in totals[1:]:
        assert row["mat"] >= 1.0 and row["drafts"] <= row["limit"]
        assert row["low"] <= row["speedup"] <= row["high"]
        assert row["replayed_tokens_per_s"] > 0
    lines = run(capsys, "replay", trace, "--proposer", "Retrieval:4", "--tasks", "--concurrency", "2").splitlines()
    names = [line.split()[0] for line in lines[4:-1] if line.strip()]
    assert names == ["a", "b", "none", "a", "b", "Retrieval"]
    assert "12 requests, 2 at once; step times measured in" in lines[0]
    assert lines[-1] == "note: steps of more than 1 requests were not recorded: their times are a guess"


def test_replay_with_given_times_and_options(trace, capsys):
    args = ("replay", trace, *TIMES, "--proposer", "Retrieval", "--first", "5", "--json")
    few, many = (json.loads(run(capsys, *args, "--option", f"retrieval.min_prob={p}"))["rows"][-1] for p in (0.9, 0.03))
    assert few["requests"] == many["requests"] == 5
    assert few["drafts"] < many["drafts"]


@pytest.fixture
def known(monkeypatch):
    """The built-in proposers only, whatever other tests have registered; to be added to."""
    own = {name: entry for name, entry in registry.proposers().items() if entry.origin == registry.OWN}
    monkeypatch.setattr(registry, "proposers", lambda: own)
    return own


def test_replay_leaves_out_what_fails_and_is_not_ours(tmp_path, capsys, known):
    path = tmp_path / "old.jsonl"
    path.write_text('{"prompt": [1, 2, 3], "out": [1, 2, 3, 1, 2, 3, 1, 2, 3]}\n')
    known["Broken"] = registry.Entry("Broken", "no_such_module:Broken", "another-package")
    document = json.loads(run(capsys, "replay", str(path), "--json"))
    assert {"none", "Auto", "Retrieval"} <= {row["proposer"] for row in document["rows"]}
    assert any("Broken is left out" in note and "another-package" in note for note in document["notes"])
    assert main.main(["trace", "replay", str(path), "--proposer", "Broken"]) == 2
    assert "another-package" in capsys.readouterr().err


def test_replay_without_step_times_or_topk(tmp_path, capsys, known):
    path = tmp_path / "old.jsonl"
    path.write_text('{"prompt": [1, 2, 3], "out": [1, 2, 3, 1, 2, 3, 1, 2, 3]}\n')
    document = json.loads(run(capsys, "replay", str(path), "--json"))
    assert document["step_times"] is None
    assert all(row["speedup"] is None for row in document["rows"])
    assert "TokenRecycling" not in {row["proposer"] for row in document["rows"]}
    no_times, no_topk = document["notes"]
    assert "the times of 0 steps" in no_times and "--step-times gives them" in no_times
    assert "Auto learns from the target's 8 likeliest tokens, and the trace has none" in no_topk
    assert "specplug.trace.topk = 8" in no_topk
    text = run(capsys, "replay", str(path), "--proposer", "TokenRecycling")
    assert "note: TokenRecycling learns from" in text


def test_replay_of_a_trace_cut_short_says_so(trace, tmp_path, capsys):
    cut = tmp_path / "cut.gz"
    with open(trace, "rb") as whole:
        cut.write_bytes(whole.read()[:-2000])
    assert "its end is missing" in run(capsys, "replay", str(cut), "--proposer", "Retrieval", *TIMES)
    assert "its end is missing" in run(capsys, "info", str(cut))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--proposer", "Retreival"), "Did you mean 'Retrieval'"),
        (("--proposer", "Auto:many"), "--proposer = 'Auto:many' is not allowed"),
        (("--proposer", "Auto:0"), "expected a whole number from 1 to 128"),
        (("--limit", "129"), "--limit = 129 is not allowed"),
        (("--option", "auto.nonsense=1"), "unknown option specplug.auto.nonsense"),
        (("--option", "nonsense"), "is not SECTION.NAME=VALUE"),
        (("--step-times", "soon"), "--step-times: step times 'soon'"),
        (("--concurrency", "0"), "--concurrency = 0"),
        (("--first", "0"), "--first = 0"),
    ],
)
def test_wrong_arguments_of_replay(trace, capsys, args, words):
    assert words in error_of(capsys, "replay", trace, *args)


@pytest.mark.parametrize("command", ["info", "replay", "tune"])
def test_files_that_are_none(command, tmp_path, capsys):
    assert "there is no file" in error_of(capsys, command, str(tmp_path / "missing.gz"))
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("a,b\n1,2\n")
    assert f"{foreign}, line 1: no JSON, so this is no trace" in error_of(capsys, command, str(foreign))


# tune


def test_tune_writes_a_setting(trace, tmp_path, capsys):
    output = tmp_path / "config.json"
    times = ("--step-times", "1:10,2:18")
    args = ("tune", trace, "--proposer", "Retrieval", *times, "--budget", "20", "--output", str(output))
    document = json.loads(run(capsys, *args, "--json"))
    assert document["requests"] == {"training": 8, "held_out": 4} and document["evaluations"] > 5
    assert json.loads(output.read_text()) == document["additional_config"]
    assert registry.parse_options(document["additional_config"])
    assert not document["adopted"] and document["additional_config"] == {"specplug": {}}  # too few to tell
    text = run(capsys, "tune", trace, "--proposer", "Retrieval", *times, "--limit", "4", "--budget", "0.001")
    assert "Fewer than 10 requests held out tell nothing: keep the defaults." in text
    assert "--spec-model vllm_specplug.Retrieval --spec-tokens 4\n" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--proposer", "Atuo"), "Did you mean 'Auto'"),
        (("--held-out", "1"), "--held-out = 1 is not allowed"),
        (("--budget", "0"), "--budget = 0 is not allowed"),
        (("--limit", "0"), "--limit = 0 is not allowed"),
        (("--first", "1"), "tune needs step times, and the trace has the times of"),
        (("--first", "1", *TIMES), "too few"),
        (("--output", "none/there/config.json"), "--output: there is no directory none/there"),
    ],
)
def test_wrong_arguments_of_tune(trace, capsys, args, words):
    assert words in error_of(capsys, "tune", trace, *args)
