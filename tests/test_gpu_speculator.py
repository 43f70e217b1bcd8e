"""Drafting in vLLM's Model Runner V2: the adapter, on tensors of the CPU, and what it uses of the installed vLLM."""

from __future__ import annotations

import gc
import inspect
import weakref
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from vllm_specplug.host import compat, engine_args

if compat.missing_for_device_drafts():
    pytest.skip("this vLLM has no Model Runner V2 with speculators of this kind", allow_module_level=True)

from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_specplug import options
from vllm_specplug.host import gpu_speculator, gpu_worker, patching

VOCAB, K = 40, 3


class States:
    """V2's request states, as far as they are used."""

    def __init__(self):
        self.all_token_ids = SimpleNamespace(gpu=torch.zeros(4, 32, dtype=torch.int32))
        self.total_len = SimpleNamespace(gpu=torch.zeros(4, dtype=torch.int32))

    def put(self, slot, tokens):
        self.all_token_ids.gpu[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.total_len.gpu[slot] = len(tokens)


def config(model="vllm_specplug.Auto", method="ngram_gpu", ranks=1):
    return SimpleNamespace(
        speculative_config=SimpleNamespace(method=method, model=model, num_speculative_tokens=K),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB),
        additional_config={},
    )


@pytest.fixture
def installed():
    gpu_speculator.install()
    gpu_speculator.install()  # once is enough
    yield
    gpu_speculator.uninstall()
    assert not patching.is_wrapped(model_runner, "init_speculator")
    assert not patching.is_wrapped(Sampler, "__call__") and not patching.is_wrapped(RejectionSampler, "__call__")


def batch(slots, rows):
    """A step of these requests' slots; ``rows``: input tokens, all of which the target answered."""
    return SimpleNamespace(
        num_reqs=len(slots),
        idx_mapping=torch.tensor(slots),
        input_ids=torch.tensor(rows),
        logits_indices=torch.arange(len(rows)),
    )


def propose(speculator, step, states, **changes):
    last = torch.zeros(4, 1, dtype=torch.int64)
    for slot in range(4):
        length = int(states.total_len.gpu[slot])
        last[slot] = states.all_token_ids.gpu[slot, length - 1] if length else 0
    nothing = torch.zeros(0)
    return speculator.propose(
        step, None, None, nothing, None, nothing, nothing, last, nothing, nothing, nothing, **changes
    )


def test_a_proposer_of_ours_is_built_and_learns_from_both_samplers(installed, monkeypatch):
    states = States()
    speculator = model_runner.init_speculator(config(), torch.device("cpu"), states)
    assert isinstance(speculator, gpu_speculator.DeviceSpeculator)
    seen = []
    plain = object.__new__(Sampler)
    plain.req_states = states
    rejecting = object.__new__(RejectionSampler)
    rejecting.sampler = plain
    for sampler, tokens, best in ((plain, [1, 2], [2, 3]), (rejecting, [3, 9], [1, 4])):
        name = type(sampler)
        original = getattr(name.__call__, "__specplug_original__")  # noqa: B009
        patching.unwrap(name, "__call__")
        monkeypatch.setattr(name, "__call__", lambda self, *args, **kwargs: seen.append((args, kwargs)))
        patching.wrap(name, "__call__", gpu_speculator._sampler_call)
        logits = torch.zeros(len(tokens), VOCAB)
        logits[torch.arange(len(best)), torch.tensor(best)] = 1.0
        sampler(logits, batch([0], tokens), None, more=1)
        assert seen[-1][0][0] is logits and seen[-1][1] == {"more": 1}
        patching.unwrap(name, "__call__")
        name.__call__ = original
        patching.wrap(name, "__call__", gpu_speculator._sampler_call)
    states.put(0, [7, 8, 1])
    states.put(3, [5, 6, 7, 8, 5, 6])
    step = batch([3, 0], [6, 1])
    assert propose(speculator, step, states).tolist() == [[7, 8, 5], [2, 3, 1]]
    # Where the budget wants none, nothing is drafted, and nothing learned until it does.
    none = propose(speculator, step, states, num_speculative_tokens=0)
    assert none.shape == (2, K)
    speculator.observe(torch.eye(VOCAB)[[9]], batch([0], [1]))
    assert propose(speculator, step, states, num_speculative_tokens=1).tolist() == [[7, 8, 5], [2, 3, 1]]
    speculator.observe(torch.eye(VOCAB)[[9]], batch([0], [1]))
    assert propose(speculator, step, states).tolist()[1][0] == 9
    speculator.observe(torch.eye(VOCAB)[[2]], batch([0], [1]))
    dummy = propose(speculator, step, states, dummy_run=True)
    assert dummy.shape == (2, K) and dummy.dtype == torch.int64
    assert propose(speculator, step, states, num_speculative_tokens=1).shape == (2, K), "vLLM cuts it"


def test_other_methods_are_vllms(installed):
    called = []
    original = model_runner.init_speculator
    assert original.__wrapped__ is not None
    for other in (config(model="ngram_gpu"), config(method="ngram", model="vllm_specplug.Auto")):
        assert gpu_speculator.proposer_of(other.speculative_config) is None
    wrapped = gpu_speculator._init_speculator(lambda *args: called.append(args) or "vllm's")
    assert wrapped(config(model="ngram_gpu"), "cpu", None) == "vllm's" and len(called) == 1


def test_ranks_that_see_some_requests_logits_learn_nothing():
    states, sharded = States(), config()
    sharded.parallel_config.enable_batch_sharded_sampling = True
    speculator = gpu_speculator.DeviceSpeculator(sharded, torch.device("cpu"), states, "TokenRecycling")
    speculator.observe(torch.eye(VOCAB)[:1], batch([0], [1]))
    states.put(0, [5, 6, 1, 5, 6])
    assert propose(speculator, batch([0], [6]), states).tolist() == [[1, 5, 6]]


class Ranks:
    """One of two tensor-parallel ranks; what the first one sends lies in ``sent`` until the other one takes it."""

    sent: ClassVar[list[torch.Tensor]] = []

    def __init__(self, is_first):
        self.is_first = is_first

    def share_on_device(self, values):
        if self.is_first:
            self.sent.append(values.clone())
        else:
            values.copy_(self.sent.pop())


@pytest.fixture
def ranks(monkeypatch):
    """Speculators of both ranks, which see the same requests, and those."""
    states, made = States(), []
    for is_first in (True, False):
        monkeypatch.setattr(gpu_speculator, "Ranks", lambda is_first=is_first: Ranks(is_first))
        made.append(gpu_speculator.DeviceSpeculator(config(ranks=2), torch.device("cpu"), states, "Auto"))
    return *made, states


def test_of_several_ranks_the_first_drafts(ranks, monkeypatch):
    first, second, states = ranks
    for what in ("propose", "observe"):
        monkeypatch.setattr(second.drafts, what, lambda *args: pytest.fail("one rank drafts"))
    guesses = torch.zeros(2, VOCAB)
    guesses[0, 7] = guesses[1, 8] = 1.0
    for slot, tokens in ((0, [5, 6, 1, 5, 6]), (2, [2, 3, 4])):
        states.put(slot, tokens)
    step = batch([2, 0], [4, 6])
    for speculator in (first, second):
        speculator.observe(guesses, step)
    first.drafts.trees[2] = torch.tensor([0, 0, 1], dtype=torch.int32)
    monkeypatch.setattr(first.drafts, "propose", lambda *args: torch.tensor([[7, 8, 9], [1, 5, 6]]))
    drafts = [propose(speculator, step, states) for speculator in (first, second)]
    assert drafts[0].tolist() == drafts[1].tolist() == [[7, 8, 9], [1, 5, 6]] and drafts[1].dtype == torch.int64
    assert torch.equal(first.drafts.trees, second.drafts.trees) and second.drafts.trees[2].tolist() == [0, 0, 1]
    # Where nothing is drafted, nothing is sent.
    for speculator in (first, second):
        propose(speculator, step, states, num_speculative_tokens=0)
        propose(speculator, step, states, dummy_run=True)
    assert not Ranks.sent


def test_a_failure_on_one_rank_lets_none_run_other_tokens(ranks, monkeypatch):
    first, second, states = ranks
    states.put(0, [5, 6, 1, 5, 6])
    step = batch([0], [6])
    second.failed = True
    assert [propose(speculator, step, states).tolist() for speculator in (first, second)] == [[[1, 5, 6]]] * 2
    monkeypatch.setattr(first.drafts, "propose", lambda *args: 1 / 0)
    assert [propose(speculator, step, states).tolist() for speculator in (first, second)] == [[[0] * K]] * 2
    assert first.failed


@pytest.mark.parametrize("what", ["propose", "observe"])
def test_a_failure_costs_drafts_only(what, monkeypatch, caplog):
    caplog.set_level("ERROR", "vllm.specplug")  # before anything is said: an engine of this process may have set INFO
    monkeypatch.setattr(gpu_speculator.logger, "propagate", True)
    states = States()
    states.put(0, [5, 6, 1, 5, 6])
    speculator = gpu_speculator.DeviceSpeculator(config(), torch.device("cpu"), states, "Auto")

    def broken(*args):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(speculator.drafts, what, broken)
    step = batch([0], [6])
    propose(speculator, step, states, num_speculative_tokens=0).fill_(-1)  # as vLLM marks what is not drafted
    propose(speculator, step, states)
    for _ in range(2):
        speculator.observe(torch.eye(VOCAB)[:1], step)
        assert propose(speculator, step, states).tolist() == [[0] * K], "tokens that the model has"
    assert speculator.failed and len(caplog.records) == 1 and "on purpose" in caplog.text


def test_an_engine_that_ended_is_forgotten():
    states = States()
    speculator = gpu_speculator.DeviceSpeculator(config(), torch.device("cpu"), states, "Auto")
    assert gpu_speculator._speculators[states] is speculator
    ended = weakref.ref(states), weakref.ref(speculator)
    del states, speculator
    gc.collect()
    assert [reference() for reference in ended] == [None, None]


def test_it_is_what_the_installed_vllm_expects():
    own, theirs = (
        inspect.signature(c.propose).parameters for c in (gpu_speculator.DeviceSpeculator, NgramGPUSpeculator)
    )
    assert list(own) == list(theirs)
    assert [p.default for p in own.values()] == [p.default for p in theirs.values()]
    for name in ("supports_mm_inputs", "draft_logits", "num_query_per_req", "num_extra_query_per_req"):
        assert getattr(gpu_speculator.DeviceSpeculator, name) == getattr(NgramGPUSpeculator, name)
    assert not gpu_speculator.DeviceSpeculator.__abstractmethods__
    assert gpu_worker.DeviceDraftWorker.__mro__[1].__module__ == "vllm.v1.worker.gpu_worker"
    assert f"{gpu_worker.__name__}.DeviceDraftWorker" == engine_args.DEVICE_WORKER
    assert set(engine_args.DEVICE_PROPOSERS) == set(gpu_speculator.SOURCES)


def arguments(proposer="Auto", method="ngram_gpu", additional=None, worker_cls="auto"):
    from vllm.engine.arg_utils import EngineArgs

    speculative = {"method": method, "model": f"vllm_specplug.{proposer}", "num_speculative_tokens": 4}
    return EngineArgs(
        "m", speculative_config=speculative, additional_config={"specplug": additional or {}}, worker_cls=worker_cls
    )


def test_front_process_asks_for_the_worker(monkeypatch):
    from vllm import platforms

    with pytest.raises(options.OptionError, match="needs a CUDA GPU"):
        engine_args.check(arguments())
    cuda = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False, device_name="a GPU")
    monkeypatch.setattr(platforms, "current_platform", cuda)
    given = arguments()
    arms = ["off", "default", "auto"]
    assert engine_args.check(given) == arms and given.worker_cls == engine_args.DEVICE_WORKER
    assert engine_args.check(given) == arms, "checked again, by the next entry point"


@pytest.mark.parametrize("flags", [True, False])
def test_one_option_is_enough(monkeypatch, flags):
    """With the flags that any proposer is chosen by, and vLLM's own form of them."""
    from vllm import platforms
    from vllm.engine.arg_utils import EngineArgs

    cuda = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False, device_name="a GPU")
    monkeypatch.setattr(platforms, "current_platform", cuda)
    said = {"spec_model": "vllm_specplug.Auto", "spec_tokens": 4}
    if not flags:
        said = {"speculative_config": {"model": "vllm_specplug.Auto", "num-speculative-tokens": 4}}
    given = EngineArgs("m", additional_config={"specplug": {"on_device": True}}, **said)
    for _ in range(2):
        assert "off" in engine_args.check(given)
        assert given.spec_model is given.spec_tokens is None and given.worker_cls == engine_args.DEVICE_WORKER
        wanted = {"method": "ngram_gpu", "model": "vllm_specplug.Auto", "num_speculative_tokens": 4}
        assert wanted.items() <= given.speculative_config.items()
    fixed = EngineArgs("m", additional_config={"specplug": {"on_device": True, "auto": {"policy": "fixed"}}}, **said)
    assert engine_args.check(fixed) == ["default", "auto"], "no scheduler of ours could leave drafts out"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "ngram"}, "expected custom_class, or ngram_gpu"),
        ({"proposer": "SparseVerify"}, "expected one of"),
        ({"additional": {"ab": {"arms": ["retrieval"]}}}, "ab.arms is not available"),
        ({"additional": {"state_file": "/tmp/x.npz"}}, "state_file is not available"),
        ({"additional": {"enabled": False}}, "enabled = false is not available"),
        ({"worker_cls": "my.Worker"}, "--worker-cls my.Worker"),
    ],
)
def test_what_does_not_go_together_is_said(changes, words):
    with pytest.raises(options.OptionError, match=words):
        engine_args.check(arguments(**changes))
