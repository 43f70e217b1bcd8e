"""When this plugin's kernel attends long contexts: the faster one does, as timed when the engine starts."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from vllm_specplug.host import chain_attention, cpu_attention


class Clock:
    """Time that passes by what is run."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(chain_attention.time, "perf_counter", lambda: self.now)

    def runs(self, *seconds):
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_the_faster_one_is_so_by_enough_and_compiling_does_not_count(monkeypatch):
    clock = Clock(monkeypatch)
    assert chain_attention.faster(clock.runs(100.0, 0.9), clock.runs(1.0))
    assert not chain_attention.faster(clock.runs(0.97), clock.runs(1.0))
    assert chain_attention.faster(clock.runs(0.9), clock.runs(0.1, 1.0))
    assert not chain_attention.faster(clock.runs(1.0), clock.runs(0.9))


@pytest.mark.parametrize(
    ("own", "longest", "found"),
    [
        ({1: 0.5, 8: 0.5}, 8192, True),
        ({1: 1.5, 8: 0.5}, 8192, False),
        ({1: 0.5, 8: 1.5}, 8192, False),
        ({1: 0.5, 8: 0.5}, chain_attention.LONG, False),
    ],
)
def test_it_must_be_faster_at_every_number_of_rows(monkeypatch, own, longest, found):
    clock = Clock(monkeypatch)
    seen = []

    def of_own(rows, common, trees):
        seen.append((rows, common.max_seq_len, trees.sizes.tolist(), trees.contexts.tolist()))
        assert common.block_table_tensor.max() < 7 and common.block_table_tensor.shape == (1, -(-(2048 + rows) // 128))
        return clock.runs(own[rows])

    assert chain_attention.long_contexts(7, 128, of_own, lambda *_: clock.runs(1.0), longest) == found
    assert seen[:1] == ([(1, 2049, [1], [2048])] if longest > chain_attention.LONG else [])


@pytest.mark.parametrize(
    ("attention", "faster", "found"),
    [
        ("auto", [True, True], chain_attention.LONG),
        ("auto", [True, False], None),
        ("auto", [TypeError("another signature")], None),
        ("own", [], chain_attention.LONG),
        ("vllm", [], None),
    ],
)
def test_every_group_must_be_faster_and_a_kernel_that_cannot_be_timed_stays_vllms(
    monkeypatch, attention, faster, found
):
    left = list(faster)

    def is_faster(builder, layer):
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(cpu_attention, "_warm_up_kernel", lambda builder: None)
    monkeypatch.setattr(cpu_attention.kernels, "move_rows", lambda *args: None)
    monkeypatch.setattr(cpu_attention, "_is_faster", is_faster)
    backend = cpu_attention.CpuTrees(attention=attention)
    backend._groups, backend._first_layers = [(None, None)] * 2, [None] * 2
    backend.warm_up()
    assert backend.long_from == found and left == []
