"""The recorder in a server: what it writes, and that nothing that goes wrong with it reaches the server."""

from __future__ import annotations

import gzip
import logging
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from vllm_specplug.proposers.base import StepLoad

from vllm_specplug import options
from vllm_specplug.host import engine_args
from vllm_specplug.host import recorder as recorder_module
from vllm_specplug.host.lifecycle import Counters
from vllm_specplug.host.recorder import Admitted, Recorder, Seen
from vllm_specplug.host.recording import Recording
from vllm_specplug.trace import files
from vllm_specplug.trace.options import TraceOptions, as_config, check
from vllm_specplug.trace.writer import RotatingFiles


def make(folder, **settings):
    return Recorder(RotatingFiles(folder, 1 << 20, 4), server={"proposer": "Auto"}, now=lambda: 7.0, **settings)


def seen(emitted, drafted=None, seconds=0.02, paused=False, topk=None):
    """A step of requests by id, with the tokens each emitted."""
    counts = np.array(drafted or [0] * len(emitted), np.int32)
    rows = len(emitted) + int(counts.sum())
    load = StepLoad(len(emitted), rows, 10, 10 * rows)
    ids = list(emitted)
    return Seen(range(len(ids)), ids, list(emitted.values()), counts, load, seconds, 3e-4, 1e-4, paused, topk)


def admit(row, request_id, count, **fields):
    return Admitted(np.array([5, 6], np.int32), {"id": request_id, "max_tokens": 100}, **fields)


def test_a_request_is_recorded_with_its_steps(tmp_path):
    recorder = make(tmp_path / "t")
    recorder.step(seen({"a": [1]}, seconds=math.nan), admit)
    recorder.step(seen({"a": [2, 3, 4], "b": [9]}, [4, 0]), admit)
    recorder.step(seen({"a": [5], "b": [8]}, paused=True), admit)
    recorder.end(["a", "unknown"])
    recorder.close()
    (request,) = files.read([tmp_path / "t"]).requests
    assert request.prompt.tolist() == [5, 6] and request.output.tolist() == [1, 2, 3, 4, 5]
    steps = request.steps
    assert steps.number.tolist() == [1, 2, 3] and steps.paused.tolist() == [False, False, True]
    assert steps.emitted.tolist() == [1, 3, 1]
    assert steps.drafted.tolist() == [0, 4, 0] and steps.accepted.tolist() == [0, 2, 0]
    assert np.isnan(steps.us[0]) and steps.us[1] == 20000.0
    assert (steps.drafting_us[1], steps.proposer_us[1]) == (300.0, 100.0)
    assert steps.loads[1].tolist() == [2, 6, 10, 60, 0, 0]
    assert request.server == {"proposer": "Auto"} and request.max_tokens == 100
    assert recorder.stats()["trace_requests"] == 1.0 and recorder.stats()["trace_requests_left_out"] == 0.0


@pytest.mark.parametrize(
    ("fields", "out"), [({"stops": {3}}, [1, 2, 3]), ({"most_output": 2}, [1, 2]), ({"stops": {1}}, [1, 2, 3, 4])]
)
def test_tokens_after_the_end_are_left_out(tmp_path, fields, out):
    """A stop token that was emitted before the last step did not stop: the request was told to ignore it."""
    recorder = make(tmp_path / "t")
    recorder.step(seen({"a": [1]}), lambda *args: admit(*args, **fields))
    recorder.step(seen({"a": [2, 3, 4]}, [5]), admit)
    recorder.end(["a"])
    recorder.close()
    (request,) = files.read([tmp_path / "t"]).requests
    assert request.output.tolist() == out
    assert request.steps.emitted.tolist() == [1, len(out) - 1] and request.steps.accepted[1] == len(out) - 2


def test_topk_of_every_emitted_token(tmp_path):
    recorder = make(tmp_path / "t", topk=2)
    ids = np.arange(6, dtype=np.int32).reshape(3, 2)
    recorder.step(seen({"a": [1], "b": [7, 8]}, [0, 3], topk=(ids, -ids.astype(np.float32))), admit)
    recorder.step(seen({"b": [9]}, topk=(ids[:1], -ids[:1].astype(np.float32))), admit)
    recorder.end(["a", "b"])
    recorder.close()
    a, b = files.read([tmp_path / "t"]).requests
    assert a.topk_ids.tolist() == [[0, 1]]
    assert b.topk_ids.tolist() == [[2, 3], [4, 5], [0, 1]] and b.topk_logprobs[1].tolist() == [-4.0, -5.0]


def test_text_only_if_asked(tmp_path):
    recorder = make(tmp_path / "t", load_decoder=lambda: lambda ids: "-".join(map(str, ids)))
    recorder.step(seen({"a": [1]}), admit)
    recorder.end(["a"])
    recorder.close()
    (path,) = (tmp_path / "t").iterdir()
    assert b'"text":{"prompt":"5-6","out":"1"}' in gzip.decompress(path.read_bytes())


def test_without_a_tokenizer_there_is_no_text(tmp_path, caplog):
    def missing():
        raise OSError("no tokenizer")

    recorder = make(tmp_path / "t", load_decoder=missing)
    for name in "ab":
        recorder.step(seen({name: [1]}), admit)
        recorder.end([name])
    recorder.close()
    assert len(files.read([tmp_path / "t"]).requests) == 2
    assert sum("without text" in r.message for r in caplog.records) == 1


def test_a_failing_disk_disturbs_nobody(tmp_path, caplog, monkeypatch):
    """Logged once, counted, and recording goes on when the disk does."""
    monkeypatch.setattr(recorder_module, "FLUSH_S", 0.0)
    writer = RotatingFiles(tmp_path / "t", 1 << 20, 4)
    append, broken = writer._append, [True]

    def failing(member):
        if broken[0]:
            raise OSError(28, "No space left on device")
        append(member)

    writer._append = failing
    recorder = Recorder(writer)
    with caplog.at_level(logging.WARNING):
        for name in "abc":
            recorder.step(seen({name: [1]}), admit)
            recorder.end([name])
            wait_for(lambda name=name: recorder.stats()["trace_failures"] >= "abc".index(name) + 1)
    broken[0] = False
    recorder.step(seen({"d": [1]}), admit)
    recorder.end(["d"])
    recorder.close()
    assert [len(files.read([tmp_path / "t"]).requests)] == [1]
    stats = recorder.stats()
    assert (stats["trace_failures"], stats["trace_requests"], stats["trace_requests_left_out"]) == (3.0, 1.0, 3.0)
    assert sum("left out of the trace" in r.message for r in caplog.records) == 1


def wait_for(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_what_memory_does_not_hold_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder_module, "MOST_HELD", 5000)
    recorder = make(tmp_path / "t")
    recorder.step(seen({"small": [1]}), admit)
    for _ in range(30):
        recorder.step(seen({"large": [1] * 5}), admit)
    recorder.end(["small", "large"])
    recorder.close()
    (request,) = files.read([tmp_path / "t"]).requests
    assert request.output.tolist() == [1] and recorder.stats()["trace_requests_left_out"] == 1.0


def test_a_step_that_cannot_be_recorded_ends_recording_only(tmp_path, caplog):
    def broken(row, request_id, count):
        raise KeyError(request_id)

    recorder = make(tmp_path / "t")
    recorder.step(seen({"a": [1]}), broken)
    recorder.step(seen({"a": [1]}), admit)
    recorder.end(["a"])
    recorder.close()
    assert not (tmp_path / "t").exists()
    assert sum("recording ends" in r.message for r in caplog.records) == 1


def test_the_engines_thread_never_waits_for_the_disk(tmp_path):
    """While a write hangs, steps go on; what finished meanwhile is written afterwards."""
    go = threading.Event()
    writer = RotatingFiles(tmp_path / "t", 1 << 20, 4)
    add = writer.add

    def hanging(line):
        assert go.wait(30)
        add(line)

    writer.add = hanging
    recorder = Recorder(writer)
    for number in range(50):
        recorder.step(seen({f"r{number}": [1]}), admit)
        recorder.end([f"r{number}"])
    assert not (tmp_path / "t").exists()
    go.set()
    recorder.close()
    assert len(files.read([tmp_path / "t"]).requests) == 50


def test_unfinished_requests_are_not_recorded(tmp_path):
    recorder = make(tmp_path / "t")
    recorder.step(seen({"a": [1]}), admit)
    recorder.close()
    recorder.close()
    recorder.step(seen({"a": [1]}), admit)
    assert not (tmp_path / "t").exists()


# The options of a server that records


def test_the_setting_names_what_differs(tmp_path):
    assert as_config(TraceOptions(dir="/x", topk=8)) == {"specplug": {"trace": {"dir": "/x", "topk": 8}}}


def test_the_directory_is_checked_before_the_server_starts(tmp_path):
    check(TraceOptions())
    check(TraceOptions(dir=str(tmp_path / "new")))
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    check(TraceOptions(dir=str(private)))
    file = tmp_path / "file"
    file.write_text("")
    private.chmod(0o755)
    for wrong, words in (
        (str(private), "only this user can enter, as after chmod 700 (its mode is 755)"),
        (str(file), "expected the path of a directory"),
        ("", "expected the path of a directory"),
        (str(tmp_path / "none" / "new"), f"there is no directory {tmp_path / 'none'}"),
    ):
        with pytest.raises(options.OptionError) as caught:
            check(TraceOptions(dir=wrong))
        assert words in str(caught.value) and "specplug.trace.dir = " in str(caught.value)
        with pytest.raises(options.OptionError):
            engine_args._prepare_trace(TraceOptions(dir=wrong))


def test_a_runner_that_is_not_understood_ends_recording_only(tmp_path, caplog):
    """Whatever the shape of what vLLM hands over: a step must not fail for a trace."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=64, model="m", dtype="float32"),
        parallel_config=SimpleNamespace(data_parallel_rank=0),
    )
    trace = TraceOptions(dir=str(tmp_path / "t"), topk=2)
    recording = Recording(config, trace, "Auto", {}, lambda: True)
    zero = np.zeros(1, np.int32)
    for _ in range(2):
        recording.step(object(), [[1]], zero, None, None, 0.02, 0.0, Counters(), False)
    recording.end(["a"])
    recording.close()
    assert sum("recording ends" in r.message for r in caplog.records) == 1
    assert not (tmp_path / "t").exists()
