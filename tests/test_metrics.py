"""Counts of drafts, and their road from the process that drafts into ``/metrics``. No engine is started here."""

from __future__ import annotations

import logging
import multiprocessing
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import prometheus_client
import pytest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from vllm_specplug.proposers.base import DraftForest

from vllm_specplug.host import metrics
from vllm_specplug.host.draft_counts import (
    ACCEPTED,
    DEPTHS,
    DRAFTED,
    KEPT_REQUESTS,
    MAX_NODES,
    SOURCES,
    VERIFIED,
    DraftCounts,
    accepted_nodes,
)
from vllm_specplug.host.metrics import Collector, Publisher, RequestStats, Snapshot

LABELS = {"proposer": "auto", "engine": "0"}
ONE = np.ones(1, np.int32)


def ints(*values):
    return np.array(values, np.int32)


def forest_of(trees):
    """The forest of ``[(parents, sources), ...]``."""
    offsets = np.cumsum([0, *(len(parents) for parents, _ in trees)])
    parents = np.array([p for tree, _ in trees for p in tree], np.int32)
    sources = np.array([s for _, tree in trees for s in tree], np.int8)
    size = len(parents)
    return DraftForest(
        np.arange(size, dtype=np.int32), parents, np.ones(size, np.float32), sources, offsets.astype(np.int32)
    )


def a_snapshot(verified=7, **totals):
    counts = np.zeros((3, len(SOURCES), DEPTHS), np.int64)
    counts[:, 0, 0] = 9, verified, 5
    counts[:, 2, DEPTHS - 1] = 4, 3, 1
    request = RequestStats("cmpl-1", "auto", False, 4, 10, 13, 10, 6, [[9, 4], [7, 3], [5, 1]])
    return Snapshot({"steps": 12.0, **totals}, SOURCES, counts, [request])


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """A directory for snapshots, as the front process makes it; and nothing logged yet."""
    path = tmp_path / "stats"
    path.mkdir(mode=0o700)
    monkeypatch.setenv(metrics.ENVIRONMENT, str(path))
    monkeypatch.setattr(metrics, "_logged", set())
    return path


def exported():
    """``{(name, labels...): value}`` of everything the collector shows, through Prometheus's text format."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector())
    text = prometheus_client.generate_latest(registry).decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    found = {(s.name, *sorted(s.labels.items())): s.value for s in samples}
    assert len(found) == len(samples), "two samples with the same labels: Prometheus refuses that"
    return found


def value(found, metric, /, **labels):
    return found[(metrics.PREFIX + metric, *sorted({**LABELS, **labels}.items()))]


# Counts


def count_slowly(steps):
    """What :class:`DraftCounts` must count in ``[(slots, trees, drafted, accepted nodes)]``: totals, and by slot."""
    total = np.zeros((3, len(SOURCES), DEPTHS), np.int64)
    by_slot: dict[int, np.ndarray] = {}
    for slots, trees, drafted, accepted in steps:
        for slot, (parents, sources), cut, path in zip(slots, trees, drafted, accepted, strict=True):
            mine = by_slot.setdefault(slot, np.zeros((3, DEPTHS), np.int64))
            depths = []
            for node, (parent, source) in enumerate(zip(parents, sources, strict=True)):
                depths.append(1 if parent < 0 else depths[parent] + 1)
                column = min(depths[-1], DEPTHS) - 1
                row = source if 0 <= source < len(SOURCES) - 1 else len(SOURCES) - 1
                for kind, counted in ((DRAFTED, True), (VERIFIED, node < cut), (ACCEPTED, node in path)):
                    total[kind, row, column] += counted
                    mine[kind, column] += counted
    return total, by_slot


def random_step(rng, slots, branching):
    trees, drafted, accepted = [], [], []
    for _ in slots:
        size = int(rng.integers(0, MAX_NODES + 1)) if rng.random() < 0.2 else int(rng.integers(0, 9))
        # Parents near the node make trees deeper than DEPTHS.
        parents = [int(rng.integers(max(-1, j - 3), j)) if branching else j - 1 for j in range(size)]
        trees.append((parents, rng.integers(-1, len(SOURCES) + 2, size).tolist()))
        cut = int(rng.integers(0, size + 1))
        drafted.append(cut)
        path, node = [], -1
        while rng.random() < 0.8:
            children = [j for j in range(cut) if parents[j] == node]
            if not children:
                break
            node = int(rng.choice(children))
            path.append(node)
        accepted.append(path)
    return slots, trees, drafted, accepted


@pytest.mark.parametrize("branching", [True, False], ids=["trees", "chains"])
def test_counts_are_those_of_a_slow_count(branching):
    rng = np.random.default_rng(1)
    counts, steps = DraftCounts("auto"), []
    for _ in range(60):
        slots = rng.permutation(150)[: rng.integers(0, 8)].astype(np.int32)
        slots, trees, drafted, accepted = step = random_step(rng, slots, branching)
        steps.append(step)
        counts.note(slots, forest_of(trees))
        path = None
        if branching:
            flat = np.array([node for nodes in accepted for node in nodes], np.int32)
            path = flat, np.cumsum([0, *map(len, accepted)]).astype(np.int32)
        counts.verified(slots, ints(*drafted), ints(*(len(nodes) + 1 for nodes in accepted)), path)
    total, by_slot = count_slowly(steps)
    assert total[ACCEPTED].sum() > 50 and total[:, -1].any() and total[:, :, -1].any()
    np.testing.assert_array_equal(counts.total, total)
    live = {str(slot): int(slot) for slot in by_slot}
    for request in counts.snapshot({}, live).requests:
        mine = by_slot[int(request.request_id)]
        deepest = len(request.by_depth[0])
        np.testing.assert_array_equal(request.by_depth, mine[:, :deepest])
        assert not mine[:, deepest:].any()
        assert [request.drafted, request.verified, request.accepted] == mine.sum(axis=1).tolist()
        assert request.live


def test_accepted_nodes_of_paths():
    # Row r is node r - 1: rows 0, 3, 4; rows 0; rows 0, 1.
    nodes, offsets = accepted_nodes(np.array([[0, 3, 4], [0, -1, -1], [0, 1, -1]], np.int32), ints(3, 1, 2))
    assert nodes.tolist() == [2, 3, 0] and offsets.tolist() == [0, 2, 2, 3]


def test_a_draft_counts_once():
    """Verified in one step, not again in a step without drafts; and a newer draft takes its place."""
    counts = DraftCounts("auto")
    chain = forest_of([([-1, 0, 1], [0, 0, 0])])
    counts.note(ints(2), chain)
    counts.verified(ints(2), ints(3), ints(3))
    counts.verified(ints(2), ints(3), ints(4))
    assert counts.total[:, 0, :4].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]]
    counts.note(ints(2), chain)
    counts.note(ints(2), forest_of([([-1], [1])]))
    counts.verified(ints(2), ints(3), ints(1))
    assert counts.total[:, 0].sum(axis=1).tolist() == [6, 3, 2]
    assert counts.total[:, 1].sum(axis=1).tolist() == [1, 1, 0]


def test_ended_requests_are_kept_and_bounded():
    counts = DraftCounts("auto")
    for i in range(KEPT_REQUESTS + 3):
        counts.note(ints(0), forest_of([([-1, 0], [0, 1])]))
        counts.verified(ints(0), ints(2), ints(2))
        counts.finish(0, f"r{i}")
    counts.finish(10_000, "never seen")
    requests = counts.snapshot({"steps": 1.0}, {"new": 0, "unseen": 10_000}).requests
    assert [r.request_id for r in requests] == [f"r{i}" for i in range(3, KEPT_REQUESTS + 3)] + ["new"]
    assert requests[0] == RequestStats("r3", "auto", False, 1, 2, 2, 2, 1, [[1, 1], [1, 1], [1, 0]])
    # The slot's next request begins at nothing.
    assert requests[-1] == RequestStats("new", "auto", True, 0, 0, 0, 0, 0, [[], [], []])


def test_a_snapshot_does_not_change():
    counts = DraftCounts("auto")
    counts.note(ints(0), forest_of([([-1], [0])]))
    before = counts.snapshot({}, {})
    counts.note(ints(0), forest_of([([-1], [0])]))
    assert before.by_source_depth.sum() == 1 and counts.total.sum() == 2


def test_misfitting_forests_are_refused():
    counts, good = DraftCounts("auto"), forest_of([([-1, 0], [0, 0])])
    with pytest.raises(ValueError, match=r"1 requests.*2 slots"):
        counts.note(ints(0, 1), good)
    short = DraftForest(good.tokens, good.parents, good.probs, good.sources[:1], good.offsets)
    with pytest.raises(ValueError, match="1 sources"):
        counts.note(ints(0), short)
    assert not counts.total.any()


def test_warm_up_counts_nothing():
    counts = DraftCounts("auto")
    counts.warm_up()
    assert not counts.total.any() and counts.snapshot({}, {}).requests == []


# Snapshots


def test_a_snapshot_comes_back(directory):
    snapshot = a_snapshot(**{"auto.store_bytes": 8.0})
    Publisher(LABELS, lambda: snapshot)
    (published,) = metrics.read_directory(directory)
    assert published.labels == LABELS and published.started <= published.written
    assert published.snapshot.totals == snapshot.totals
    assert tuple(published.snapshot.sources) == SOURCES
    assert published.snapshot.by_source_depth == snapshot.by_source_depth.tolist()
    assert published.snapshot.requests == snapshot.requests
    assert [path.suffix for path in directory.iterdir()] == [".json"]


def test_published_at_most_once_per_interval(directory):
    taken = []

    def source():
        taken.append(len(taken))
        return a_snapshot(requests=float(len(taken)))

    publisher = Publisher(LABELS, source)
    assert len(taken) == 1
    start = 5 * metrics.INTERVAL_NS
    for now in range(start, start + metrics.INTERVAL_NS, metrics.INTERVAL_NS // 10):
        publisher.tick(now)
    assert len(taken) == 2
    publisher.tick(start + metrics.INTERVAL_NS)
    assert len(taken) == 3
    publisher.publish()
    publisher.close()
    publisher.tick(start + 9 * metrics.INTERVAL_NS)
    publisher.publish()
    assert len(taken) == 5
    assert value(exported(), "requests_total") == 5


@pytest.mark.parametrize("state", ["unset", "missing", "open to others"])
def test_without_a_private_directory_nothing_is_taken(state, directory, monkeypatch):
    if state == "unset":
        monkeypatch.delenv(metrics.ENVIRONMENT)
    elif state == "missing":
        directory.rmdir()
    else:
        directory.chmod(0o777)

    def source():
        raise AssertionError("asked")

    publisher = Publisher(LABELS, source)
    publisher.tick(1 << 62)
    publisher.close()
    assert exported() == {}


def test_a_failing_source_is_logged_once(caplog, directory):
    caplog.set_level(logging.WARNING, "vllm.specplug")

    def source():
        raise RuntimeError("no figures today")

    publisher = Publisher(LABELS, source)
    publisher.tick(metrics.INTERVAL_NS)
    publisher.close()
    assert [record.getMessage() for record in caplog.records] == [
        "vllm-specplug: no snapshot for metrics (RuntimeError: no figures today)"
    ]
    assert exported() == {}


def test_a_directory_that_goes_away_ends_publishing(caplog, directory):
    calls = []

    def source():
        calls.append(1)
        return a_snapshot()

    publisher = Publisher(LABELS, source)
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    publisher.tick(metrics.INTERVAL_NS)
    publisher.tick(3 * metrics.INTERVAL_NS)
    assert len(calls) == 2 and caplog.records == []


# Export


def test_export(directory):
    totals = {
        **{"emitted": 50.0, "errors": 2.0, "live": 3.0, "propose_ns": 2.5e9, "requests_without_drafts": 1.0},
        **{"auto.steps": 11.0, "auto.paused_steps": 4.0, "auto.budget_nodes": 6.0, "auto.expected_gain": 1.5},
        **{"auto.step_time_error": 0.05, "auto.step_time_predicted_seconds": 0.02, "auto.store_bytes": 1024.0},
        **{"without_drafts.thinking_token_budget": 1.0, "chains_only.engine": 2.0, "rows_moved": 7.0},
    }
    Publisher(LABELS, lambda: a_snapshot(**totals))
    found = exported()
    expected = {
        ("drafted_tokens_total", "context", "1"): 9,
        ("verified_tokens_total", "context", "1"): 7,
        ("accepted_tokens_total", "context", "1"): 5,
        ("drafted_tokens_total", "recycling", "16+"): 4,
        ("verified_tokens_total", "recycling", "16+"): 3,
        ("accepted_tokens_total", "recycling", "16+"): 1,
    }
    by_depth = {
        (key[0].removeprefix(metrics.PREFIX), dict(key[1:])["source"], dict(key[1:])["depth"]): count
        for key, count in found.items()
        if "depth" in dict(key[1:])
    }
    assert by_depth == expected
    assert value(found, "steps_total") == 12
    assert value(found, "emitted_tokens_total") == 50
    assert value(found, "errors_total") == 2
    assert value(found, "live_requests") == 3
    assert value(found, "drafting_seconds_total", phase="propose") == 2.5
    assert value(found, "paused_steps_total") == 4
    assert value(found, "budget_nodes") == 6
    assert value(found, "gain_ratio") == 1.5
    assert value(found, "step_time_error_ratio") == 0.05
    assert value(found, "step_time_predicted_seconds") == 0.02
    assert value(found, "store_bytes") == 1024
    assert value(found, "requests_without_drafts_total", reason="proposer_failed") == 1
    assert value(found, "requests_without_drafts_total", reason="thinking_token_budget") == 1
    assert value(found, "requests_with_chains_only_total", reason="engine") == 2
    assert value(found, "stat", name="rows_moved") == 7
    assert value(found, "stat", name="auto.steps") == 11
    assert value(found, "snapshot_info", path=str(directory)) == 1
    assert "cmpl-1" not in str(found), "labels with request ids grow without bound"


def test_engines_are_told_apart_and_a_restarted_one_replaces_itself():
    Publisher({"proposer": "auto", "engine": "1"}, lambda: a_snapshot(requests=1.0))
    Publisher(LABELS, lambda: a_snapshot(requests=2.0))
    old = Publisher(LABELS, lambda: a_snapshot(requests=3.0))
    Publisher(LABELS, lambda: a_snapshot(requests=4.0))
    old.close()
    found = exported()
    assert value(found, "requests_total") == 4
    assert value(found, "requests_total", engine="1") == 1


def test_a_corrupt_snapshot_is_left_out_and_logged_once(caplog, directory):
    caplog.set_level(logging.WARNING, "vllm.specplug")
    Publisher(LABELS, a_snapshot)
    (directory / "1-1.json").write_text('{"version": 1, "labels"')
    (directory / "2-2.json").write_text('{"version": 99}')
    (directory / "3-3.json").write_text('{"version": 1, "labels": {}}')
    (directory / "4-4.json").write_bytes(b"\xff\xfe")
    assert value(exported(), "steps_total") == 12
    exported()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4 and all("cannot be read" in message for message in messages)


def test_a_snapshot_of_nonsense_costs_the_metrics_only(caplog, directory):
    caplog.set_level(logging.WARNING, "vllm.specplug")
    wrong = (
        '{"version":1,"labels":{},"started":1,"written":1,"totals":[],"sources":[1],"by_source_depth":2,"requests":[]}'
    )
    (directory / "1-1.json").write_text(wrong)
    assert exported() == {} == exported()
    assert len(caplog.records) == 1


def test_no_directory_no_metrics(directory, monkeypatch):
    directory.rmdir()
    assert exported() == {}
    monkeypatch.delenv(metrics.ENVIRONMENT)
    assert exported() == {}


def test_single_metrics_can_be_asked_for():
    """``/metrics?name[]=...`` goes by the names that a collector describes."""
    Publisher(LABELS, a_snapshot)
    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector())
    name = metrics.PREFIX + "steps_total"
    text = prometheus_client.generate_latest(registry.restricted_registry([name])).decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines == [name + '{engine="0",proposer="auto"} 12.0']


# The front process


@pytest.fixture
def front(monkeypatch):
    """A process that has not started an engine yet, with a default registry of its own."""
    monkeypatch.delenv(metrics.ENVIRONMENT)
    monkeypatch.setattr(metrics, "_made", None)
    monkeypatch.setattr(prometheus_client, "REGISTRY", prometheus_client.CollectorRegistry(auto_describe=True))
    yield
    made = metrics._made
    metrics.uninstall()
    if made is not None:
        metrics._remove_directory(*made)
        assert not Path(made[0]).exists()


ENGINE_ARGS = SimpleNamespace(disable_log_stats=False)


def in_child(function, *args):
    child = multiprocessing.get_context("spawn").Process(target=function, args=args)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def publish_once(requests):
    Publisher(LABELS, lambda: a_snapshot(requests=float(requests)))


def serve_multiprocess(files, answer):
    """What an API server's process does that is one of several: vLLM's route makes a registry for each scrape."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(files)
    inherited = os.environ[metrics.ENVIRONMENT]
    for _ in range(2):  # vLLM checks its engine arguments twice
        metrics.install_front(ENGINE_ARGS)
    assert os.environ[metrics.ENVIRONMENT] == inherited and metrics._made is None
    registry = prometheus_client.CollectorRegistry()
    MultiProcessCollector(registry)
    answer.write_bytes(prometheus_client.generate_latest(registry))


def test_an_engine_process_publishes_to_its_parents_registry(front):
    metrics.install_front(ENGINE_ARGS)
    metrics.install_front(ENGINE_ARGS)
    assert stat.S_IMODE(os.stat(os.environ[metrics.ENVIRONMENT]).st_mode) == 0o700
    in_child(publish_once, 6)
    lines = prometheus_client.generate_latest(prometheus_client.REGISTRY).decode().splitlines()
    assert lines.count('vllm_specplug:requests_total{engine="0",proposer="auto"} 6.0') == 1


def test_every_one_of_several_api_servers_shows_the_same(front, tmp_path):
    metrics.install_front(ENGINE_ARGS)
    publish_once(8)
    for rank in range(2):
        in_child(serve_multiprocess, tmp_path, tmp_path / str(rank))
        lines = (tmp_path / str(rank)).read_text().splitlines()
        assert lines.count('vllm_specplug:requests_total{engine="0",proposer="auto"} 8.0') == 1
    assert Path(os.environ[metrics.ENVIRONMENT]).is_dir(), "removed by a process that did not make it"


def test_a_server_started_from_a_servers_process_has_its_own_directory(front, directory, monkeypatch):
    monkeypatch.setenv(metrics.ENVIRONMENT, str(directory))
    metrics.install_front(ENGINE_ARGS)
    assert os.environ[metrics.ENVIRONMENT] != str(directory)


def test_without_statistics_of_vllms_there_are_none_of_ours(front):
    metrics.install_front(SimpleNamespace(disable_log_stats=True))
    assert metrics.ENVIRONMENT not in os.environ and metrics._made is None
    assert prometheus_client.generate_latest(prometheus_client.REGISTRY) == b""


def test_the_directory_is_there_before_a_fork_server(front, monkeypatch):
    metrics.install()
    assert metrics.ENVIRONMENT not in os.environ
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "forkserver")
    metrics.install()
    path = os.environ[metrics.ENVIRONMENT]
    metrics.install_front(ENGINE_ARGS)
    assert os.environ[metrics.ENVIRONMENT] == path and Path(path).is_dir()


def test_no_room_for_a_directory_is_logged_once(front, caplog, monkeypatch):
    def refuse(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.tempfile, "mkdtemp", refuse)
    caplog.set_level(logging.WARNING, "vllm.specplug")
    metrics.install_front(ENGINE_ARGS)
    metrics.install_front(ENGINE_ARGS)
    assert len(caplog.records) == 1 and "No space left" in caplog.text


def test_uninstall(front):
    original = MultiProcessCollector.collect
    metrics.install_front(ENGINE_ARGS)
    assert MultiProcessCollector.collect is not original
    metrics.uninstall()
    assert MultiProcessCollector.collect is original
