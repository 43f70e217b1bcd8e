"""``specplug stats`` against small HTTP servers that answer as vLLM's would."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
import time

import numpy as np
import prometheus_client
import pytest

from vllm_specplug.cli import main, stats
from vllm_specplug.host import metrics
from vllm_specplug.host.draft_counts import DEPTHS, SOURCES
from vllm_specplug.host.metrics import Collector, Publisher, RequestStats, Snapshot

VLLM = '# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine="0"} 1.0\n'


@contextlib.contextmanager
def serving(answer, status=200):
    """A server whose ``/metrics`` is ``answer()``; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/metrics"
            body = answer().encode() if found else b"nothing here"
            self.send_response(status if found else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def error_of(capsys, *args):
    """The single line that ``specplug stats`` prints when it must fail."""
    assert main.main(["stats", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("specplug: error: ")
    return captured.err


def a_snapshot():
    counts = np.zeros((3, len(SOURCES), DEPTHS), np.int64)
    for depth in range(9):
        counts[:, 0, depth] = 100, 80, 60 - 5 * depth
    counts[:, 1, 0] = 10, 10, 1
    totals = {
        **{"steps": 1234.0, "emitted": 2000.0, "errors": 0.0, "live": 2.0, "requests_without_drafts": 3.0},
        **{"auto.budget_nodes": 6.0, "auto.paused": 0.0, "auto.expected_gain": 1.5, "auto.step_time_error": 0.034},
        **{"auto.step_time_predicted_seconds": 0.02, "auto.step_time_measured_seconds": 0.021},
        **{"auto.store_bytes": 3 * 2.0**20, "auto.oddity": float("nan")},
    }
    requests = [
        RequestStats("cmpl-ended", "auto", False, 4, 10, 13, 10, 6, [[9, 4], [7, 3], [5, 1]]),
        RequestStats("cmpl-live", "auto", True, 1, 1, 2, 0, 0, [[2], [0], [0]]),
    ]
    return Snapshot(totals, SOURCES, counts, requests)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    path = tmp_path / "stats"
    path.mkdir(mode=0o700)
    monkeypatch.setenv(metrics.ENVIRONMENT, str(path))
    return path


@pytest.fixture
def server(directory):
    """A server with an engine that has published :func:`a_snapshot`."""
    Publisher({"proposer": "auto", "engine": "0"}, a_snapshot)
    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector())
    with serving(lambda: VLLM + prometheus_client.generate_latest(registry).decode()) as url:
        yield url


def test_json(server, capsys, directory):
    assert main.main(["stats", "--url", server + "/", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (engine,) = document["engines"]
    assert engine["labels"] == {"proposer": "auto", "engine": "0"}
    assert engine["snapshots"] == str(directory)
    assert engine["totals"]["steps"] == 1234
    assert engine["totals"]["step_time_measured_seconds"] == 0.021
    assert engine["sources"]["store"] == {"1": {"drafted": 10, "verified": 10, "accepted": 1}}
    assert list(engine["sources"]["context"]) == [str(depth) for depth in range(1, 10)]
    assert engine["sources"]["context"]["3"] == {"drafted": 100, "verified": 80, "accepted": 50}
    assert engine["requests_without_drafts"] == {"proposer_failed": 3}
    assert engine["stat"] == {"auto.oddity": None}
    assert "requests" not in document


def test_tables(server, capsys):
    assert main.main(["stats", "--url", server]) == 0
    text = capsys.readouterr().out
    rows = {line.strip().rpartition("  ")[0].strip(): line.split()[-1] for line in text.splitlines() if line.strip()}
    assert max(map(len, text.splitlines())) <= 80
    assert rows["draft tokens drafted"] == "910"
    assert rows["draft tokens verified"] == "730"
    assert rows["draft tokens accepted"] == "361"
    assert rows["accepted of verified"] == "49.5%"
    assert rows["steps"] == "1,234"
    assert rows["budget, draft tokens kept"] == "6"
    assert rows["drafting paused"] == "no"
    assert "20.00 ms" in text and "21.00 ms" in text and "1.50x" in text and "3.4%" in text and "3.0 MiB" in text
    assert rows["requests without drafts, proposer_failed"] == "3"
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    # Verified; accepted of it: in all, at depths 1 to 5, deeper.
    assert lines["context"][1:] == ["720", "50.0%", "75.0%", "68.8%", "62.5%", "56.2%", "50.0%", "34.4%"]
    assert lines["store"][1:] == ["10", "10.0%", "10.0%"]
    assert lines["all"][1:4] == ["730", "49.5%", "67.8%"]
    assert "cmpl-" not in text and "Arms" not in text


def test_an_engine_that_has_drafted_nothing_yet(directory, capsys):
    Publisher({"engine": "0"}, lambda: Snapshot({"steps": 0.0}, SOURCES, np.zeros((3, 5, DEPTHS), np.int64), []))
    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector())
    with serving(lambda: prometheus_client.generate_latest(registry).decode()) as url:
        assert main.main(["stats", "--url", url, "--requests"]) == 0
    text = capsys.readouterr().out
    assert "draft tokens verified" in text and "accepted of verified" not in text


def test_arms(directory, capsys):
    shown = {"requests": 3.0, "emitted": 900.0, "verified": 800.0, "accepted": 600.0, "drafted": 1000.0, "errors": 0.0}
    totals = {
        **a_snapshot().totals,
        **{f"arm.auto.{key}": value for key, value in shown.items()},
        **{"arm.auto.decode_steps": 250.0, "arm.auto.decode_tokens": 750.0, "arm.auto.decode_seconds": 6.0},
        **{"arm.off.requests": 1.0, "arm.off.emitted": 1.0, "arm.off.decode_steps": 0.0, "arm.off.decode_tokens": 0.0},
        **{"arm_stat.retrieval.store_bytes": 5.0, "arm_stat.retrieval.oddity": 7.0, "arm_unknown_requests": 2.0},
    }
    Publisher({"engine": "0"}, lambda: Snapshot(totals, SOURCES, a_snapshot().by_source_depth, []))
    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector())
    with serving(lambda: prometheus_client.generate_latest(registry).decode()) as url:
        assert main.main(["stats", "--url", url, "--json"]) == 0
        [engine] = json.loads(capsys.readouterr().out)["engines"]
        assert main.main(["stats", "--url", url]) == 0
    text = capsys.readouterr().out
    assert engine["arms"]["auto"]["accepted_tokens"] == 600 and engine["arms"]["auto"]["decode_seconds"] == 6
    assert engine["arms"]["retrieval"] == {"store_bytes": 5} and engine["totals"]["store_bytes"] == 3 << 20
    assert engine["stat"]["retrieval.oddity"] == 7 and engine["totals"]["arm_unknown_requests"] == 2
    table = text[text.index("Arms") :]
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line.strip()}
    assert rows["auto"] == ["3", "900", "3.00", "8.00", "800", "75.0%"]
    assert rows["off"] == ["1", "1", "0"]
    assert max(map(len, text.splitlines())) <= 80


def test_requests(server, capsys):
    assert main.main(["stats", "--url", server, "--requests", "--json"]) == 0
    ended, live = json.loads(capsys.readouterr().out)["requests"]
    assert (ended["request_id"], ended["live"], ended["engine"]) == ("cmpl-ended", False, "0")
    assert (ended["drafted"], ended["verified"], ended["accepted"], ended["emitted"]) == (13, 10, 6, 10)
    assert ended["by_depth"] == [[9, 4], [7, 3], [5, 1]]
    assert (live["request_id"], live["live"]) == ("cmpl-live", True)
    assert main.main(["stats", "--url", server, "--requests"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cmpl-ended", "ended", "10", "4", "13", "10", "6", "60.0%"] in lines
    assert ["cmpl-live", "live", "1", "1", "2", "0", "0"] in lines


def test_requests_of_a_server_elsewhere(server, directory, capsys, monkeypatch):
    shown = stats._fetch(server + "/metrics").replace(str(directory), "/nowhere/specplug-stats-x")
    with serving(lambda: shown) as url:
        error = error_of(capsys, "--url", url, "--requests")
    assert "/nowhere/specplug-stats-x" in error and "on the server's machine" in error


def test_watch_prints_again(server, capsys, monkeypatch):
    def sleep(seconds):
        assert seconds == 0.5
        if len(slept) == 2:
            raise KeyboardInterrupt
        slept.append(seconds)

    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", sleep)
    assert main.main(["stats", "--url", server, "--watch", "0.5", "--json"]) == 130
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(json.loads(line)["engines"] for line in lines)


def test_no_server(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: nobody answers there
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert f"no server at {url}/metrics" in error_of(capsys, "--url", url)


def test_something_that_does_not_speak_http(capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk():
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.sendall(b"220 mail.example ESMTP\r\n")
            connection.close()

        thread = threading.Thread(target=talk)
        thread.start()
        assert "no server at" in error_of(capsys, "--url", f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()


def test_not_a_vllm_server(capsys):
    with serving(lambda: "<html>welcome</html>") as url:
        assert "is this a vLLM server?" in error_of(capsys, "--url", url)
    with serving(lambda: "python_gc_objects_collected_total 1.0\n") as url:
        assert "no metrics of vLLM's" in error_of(capsys, "--url", url)
    with serving(lambda: "", status=404) as url:
        assert "answers 404" in error_of(capsys, "--url", url)


def test_the_plugin_is_not_active(capsys):
    with serving(lambda: VLLM) as url:
        error = error_of(capsys, "--url", url)
    assert "not active" in error and "--spec-model vllm_specplug.Auto" in error


@pytest.mark.parametrize(
    "args, named",
    [
        (("--url", "localhost:8000"), "--url = 'localhost:8000'"),
        (("--url", "ftp://127.0.0.1"), "--url"),
        (("--watch", "0"), "--watch = 0"),
        (("--watch", "nan"), "--watch = nan"),
    ],
)
def test_wrong_arguments(args, named, capsys):
    error = error_of(capsys, *args)
    assert named in error and "expected" in error
