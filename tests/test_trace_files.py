"""The trace format: what is written is read; what is damaged, foreign or cut short is named."""

from __future__ import annotations

import gzip
import json
import os
import stat

import numpy as np
import pytest
import traces

from vllm_specplug.trace import files
from vllm_specplug.trace.files import TraceError
from vllm_specplug.trace.writer import RotatingFiles


def test_what_is_written_is_read(tmp_path):
    rng = np.random.default_rng(1)
    made = [traces.request(rng, topk=3, task="qa"), traces.request(rng)]
    made[0]["facts"] |= {"temperature": 0.5, "namespace": "n", "trees": False}
    trace = files.read([traces.write(tmp_path / "t.jsonl.gz", made)])
    first, second = trace.requests
    assert (first.task, first.temperature, first.namespace, first.trees) == ("qa", 0.5, "n", False)
    assert first.prompt.tolist() == made[0]["prompt"] and first.output.tolist() == made[0]["out"]
    assert first.max_tokens == len(made[0]["prompt"]) + len(made[0]["out"])
    np.testing.assert_array_equal(first.topk_ids, made[0]["topk"][0])
    np.testing.assert_allclose(first.topk_logprobs, made[0]["topk"][1], atol=1e-4)
    assert first.steps.emitted.tolist() == made[0]["steps"]["emitted"]
    assert first.steps.loads.tolist() == made[0]["steps"]["loads"]
    assert np.isnan(first.steps.us[0]) and first.steps.us[1] == pytest.approx(made[0]["steps"]["us"][1])
    assert second.topk_ids is None and trace.topk == 0 and trace.cut == []
    assert first.server["draft_tokens"] == 8


def test_older_traces_have_only_tokens(tmp_path):
    path = tmp_path / "old.jsonl"
    path.write_text(
        '{"cat": "qa", "prompt": [1, 2], "out": [3], "topk": [[[3, -0.1], [4, -2.5]]]}\n{"prompt": [], "out": [1]}\n'
    )
    first, second = files.read([path]).requests
    assert first.topk_ids.tolist() == [[3, 4]] and first.steps is None and first.max_tokens is None
    assert (second.task, len(second.prompt)) == ("all", 0)
    assert files.read([path], topk=False).requests[0].topk_ids is None


def test_a_file_cut_short_is_read_as_far_as_it_goes(tmp_path):
    whole = traces.make(tmp_path / "whole.jsonl.gz", 30).read_bytes()
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    trace = files.read([cut])
    assert 0 < len(trace.requests) < 30 and trace.cut == [cut]
    plain = tmp_path / "cut.jsonl"
    plain.write_bytes(gzip.decompress(whole)[:-200])
    trace = files.read([plain])
    assert len(trace.requests) == 29 and trace.cut == [plain]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no recorded request: it is empty"),
        (b"\x1f\x8b\x08garbage", "its beginning is damaged"),
        (b"id,task\n1,qa\n", "line 1: no JSON"),
        (b'{"prompt": [1], "out": [2]}\nnonsense\n', "line 2: no JSON"),
        (b'{"question_id": 1, "turns": ["Hi"]}\n', "line 1: no recorded request, which has the fields prompt and out"),
        (b"[1, 2]\n", "line 1: no recorded request"),
        (b'{"prompt": [1], "out": []}\n', "line 1: no recorded request: out is empty"),
        (b'{"prompt": "text", "out": [1]}\n', "must be lists of token ids"),
        (b'{"prompt": [1.5], "out": [1]}\n', "must be lists of token ids"),
        (b'{"prompt": [1], "out": [99999999999]}\n', "does not fit 32 bits"),
        (b'{"prompt": [1], "out": [1, 2], "topk": [[[1, -0.5]]]}\n', "topk must have"),
        (b'{"prompt": [1], "out": [1], "steps": {"number": [1]}}\n', "emitted"),
        (b'{"v": 2, "prompt": [1], "out": [1]}\n', "version 2 of the format; this program reads 1"),
    ],
)
def test_what_is_no_trace_is_named(tmp_path, content, words):
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(TraceError) as caught:
        files.read([path])
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_and_empty_directories_are_named(tmp_path):
    with pytest.raises(TraceError, match=r"there is no file .*nothing"):
        files.read([tmp_path / "nothing"])
    with pytest.raises(TraceError, match="directory without recorded files"):
        files.read([tmp_path])


def lines(writer, count, size=300):
    rng = np.random.default_rng(0)
    for number in range(count):
        line = json.dumps({"prompt": [number], "out": rng.integers(0, 1 << 30, size).tolist()})
        writer.add([line, "\n"])
        writer.flush()


def test_files_are_private_rotated_and_bounded(tmp_path):
    folder = tmp_path / "traces"
    writer = RotatingFiles(folder, max_bytes=1 << 16, files=4, now=lambda: 0.0)
    lines(writer, 100)
    there = sorted(folder.iterdir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in there} == {0o600}
    assert len(there) == 4 and sum(path.stat().st_size for path in there) <= 1 << 16
    kept = [int(r.prompt[0]) for r in files.read([folder]).requests]
    assert kept == list(range(kept[0], 100)) and kept[0] > 0
    # Another process goes on: what is there counts.
    lines(RotatingFiles(folder, max_bytes=1 << 16, files=4, now=lambda: 1e9), 1)
    assert len(list(folder.iterdir())) == 4
    # Another engine has files of its own.
    lines(RotatingFiles(folder, max_bytes=1 << 16, files=4, engine=1), 1)
    assert len(list(folder.iterdir())) == 5


def test_a_line_too_long_is_lost_alone(tmp_path):
    writer = RotatingFiles(tmp_path / "t", max_bytes=1 << 16, files=8)
    writer.add(['{"prompt": [1], "out": [1]}\n'])
    big = json.dumps({"prompt": [2], "out": np.random.default_rng(0).integers(0, 1 << 30, 9000).tolist()}) + "\n"
    writer.add([big])
    with pytest.raises(OSError, match="where a file may have 8192"):
        writer.add(['{"prompt": [3], "out": [1]}\n'])
    writer.flush()
    assert [int(r.prompt[0]) for r in files.read([tmp_path / "t"]).requests] == [1, 3]
    assert writer.lost == 1


def test_a_write_that_fails_leaves_whole_files(tmp_path, monkeypatch):
    writer = RotatingFiles(tmp_path / "t", max_bytes=1 << 20, files=2)
    lines(writer, 3)
    write, calls = os.write, []

    def full(handle, data):
        calls.append(len(data))
        if len(calls) == 1:
            return write(handle, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        lines(writer, 1)
    monkeypatch.undo()
    lines(writer, 1)
    trace = files.read([tmp_path / "t"])
    assert len(calls) == 2 and len(trace.requests) == 4 and trace.cut == [] and writer.lost == 1
