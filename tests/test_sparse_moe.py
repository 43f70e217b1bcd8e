"""Fewer experts in a real engine, on a mixture of experts made of the embedded model, with vLLM's own ngram drafts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import encode, engine, greedy, runner_of
from moe_model import NGRAM, kernel_calls, make_tiny_moe, moe_model, verify_groups
from vllm_specplug.proposers.sparse_verify import SparseVerifyOptions

from vllm_specplug.host import moe_layers
from vllm_specplug.host.sparse_moe import MoeTails, SparseMoe
from vllm_specplug.host.sparse_step import SparseStep

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MESSAGES = [
    "Repeat three times: the quick brown fox jumps over the lazy dog.",
    "List the numbers from one to twenty, in words.",
    "Repeat the word banana twenty times.",
    "Write the alphabet, and then write it again.",
]
LAYERS, EXPERTS, TOP_K = 20, 24, 12


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    # Two at a time: the later prompts are computed beside decoding requests.
    with engine(moe_model(), NGRAM, max_num_seqs=2, max_model_len=512) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts(llm: Any) -> list[dict[str, list[int]]]:
    return encode(llm, MESSAGES)


@pytest.fixture(scope="module")
def dense_outputs(llm: Any, prompts: Any) -> list[list[int]]:
    return run(llm, prompts)


@pytest.fixture(scope="module")
def calibration(llm: Any, prompts: Any) -> dict[str, Any]:
    tails = MoeTails()
    tails.attach(model_of(llm))
    run(llm, prompts)
    tails.detach()
    return tails.result()


def model_of(llm: Any) -> torch.nn.Module:
    return runner_of(llm).get_model()


def run(llm: Any, prompts: Any) -> list[list[int]]:
    return greedy(llm, prompts, max_tokens=24, concurrency=4)


def untouched(llm: Any) -> bool:
    layers = moe_layers.find(model_of(llm))
    return isinstance(layers, list) and all(layer.attribute not in vars(layer.owner) for layer in layers)


class Watch:
    """What vLLM's kernel was told to compute in each step, and the logits of the router."""

    def __init__(self, llm: Any, step: SparseStep) -> None:
        self.llm, self.step = llm, step
        self.groups: list[np.ndarray | None] = []
        self.calls: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []

    def run(self, prompts: Any) -> list[list[int]]:
        gates = [m for name, m in model_of(self.llm).named_modules() if name.endswith("mlp.gate")]
        hooks = [gate.register_forward_hook(lambda m, a, out: self.logits.append(out[0].clone())) for gate in gates]
        note = lambda: self.groups.append(self.step.groups)  # noqa: E731
        with verify_groups(self.llm, self.step, note), kernel_calls(self.calls):
            outputs = run(self.llm, prompts)
        for hook in hooks:
            hook.remove()
        assert len(self.calls) == len(self.logits) == LAYERS * len(self.groups)
        return outputs

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]]:
        """Of every call: verified rows, the others, the ids that were computed, the ids of the model's own choice."""
        for at, (ids, logits) in enumerate(zip(self.calls, self.logits, strict=True)):
            groups = self.groups[at // LAYERS]
            verified = np.zeros(len(ids), bool)
            for first, count in () if groups is None else groups:
                verified[first : first + count] = True
            yield np.flatnonzero(verified), np.flatnonzero(~verified), ids, logits.topk(TOP_K, dim=1).indices


def sets(ids: torch.Tensor) -> list[set[int]]:
    return [set(row) for row in ids.tolist()]


def test_layers_are_found_in_order(llm: Any) -> None:
    layers = moe_layers.find(model_of(llm))
    assert isinstance(layers, list)
    assert [layer.index for layer in layers] == list(range(LAYERS))
    assert all((layer.num_experts, layer.top_k) == (EXPERTS, TOP_K) for layer in layers)
    assert all(layer.plain and not layer.renormalize for layer in layers)
    assert SparseMoe(SparseVerifyOptions(moe_experts=0.5), SparseStep(), None).attach(torch.nn.Linear(2, 2)) == (
        "the model has no mixture-of-experts layers"
    )


def test_exact_options_leave_the_model_untouched(llm: Any, prompts: Any, dense_outputs: Any) -> None:
    step = SparseStep()
    sparse = SparseMoe(SparseVerifyOptions(moe_drop=0, moe_experts=1.0), step, None)
    assert sparse.attach(model_of(llm)) == ""
    assert untouched(llm)
    watch = Watch(llm, step)
    assert watch.run(prompts) == dense_outputs
    assert all(sets(ids) == sets(own) for _, _, ids, own in watch)
    sparse.detach()


def test_drops_need_a_calibration_of_this_model(llm: Any) -> None:
    options = SparseVerifyOptions(moe_drop=2)
    assert "no calibration" in SparseMoe(options, SparseStep(), None).attach(model_of(llm))
    assert "no calibration" in SparseMoe(options, SparseStep(), {}).attach(model_of(llm))
    other = {"beta": [[0.1, 0.2, 0.3]] * 4}
    assert "of a model of 4 mixture-of-experts layers" in SparseMoe(options, SparseStep(), other).attach(model_of(llm))
    assert untouched(llm)


@pytest.mark.parametrize("fast", [True, False])
def test_half_of_the_experts(llm: Any, prompts: Any, dense_outputs: Any, fast: bool, monkeypatch: Any) -> None:
    step = SparseStep()
    sparse = SparseMoe(SparseVerifyOptions(moe_experts=0.5), step, None)
    if not fast:  # the way of routers that the compiled kernel does not know
        find = moe_layers.find
        slow = [setattr(layer, "plain", False) or layer for layer in find(model_of(llm))]  # type: ignore[func-returns-value]
        monkeypatch.setattr(moe_layers, "find", lambda model: slow)
    assert sparse.attach(model_of(llm)) == ""
    watch = Watch(llm, step)
    watch.run(prompts)
    steps, mixed, several = 0, 0, 0
    exact, used = 0, 0
    for verified, others, ids, own in watch:
        assert all(a == b for a, b in zip(sets(ids[others]), sets(own[others]), strict=True)), "a prompt's row changed"
        if not len(verified):
            continue
        now, before = ids[verified].unique().numel(), own[verified].unique().numel()
        assert now <= EXPERTS // 2
        exact, used, steps = exact + before, used + now, steps + 1
        mixed += bool(len(others))
        several += before > EXPERTS // 2
        # Experts of few votes went, no token lost all that it chose, and none has fewer than it had.
        assert all(
            len(row) == TOP_K and row & mine for row, mine in zip(sets(ids[verified]), sets(own[verified]), strict=True)
        )
    assert mixed, "no step had both prompts and verified rows"
    assert several > steps / 2, "hardly any step had experts to spare"
    assert sparse.stats() == {
        "moe_layer_steps": steps,
        "moe_experts_exact": exact / steps,
        "moe_experts_used": used / steps,
        "moe_drops": 0,
    }
    sparse.detach()
    assert untouched(llm)
    assert run(llm, prompts) == dense_outputs


def test_nothing_happens_without_groups(llm: Any, prompts: Any, dense_outputs: Any) -> None:
    sparse = SparseMoe(SparseVerifyOptions(moe_experts=0.1), SparseStep(), None)
    assert sparse.attach(model_of(llm)) == ""
    assert not untouched(llm)
    assert run(llm, prompts) == dense_outputs
    assert sparse.stats()["moe_layer_steps"] == 0
    sparse.detach()
    assert untouched(llm)


def test_tail_drop(llm: Any, prompts: Any, calibration: dict[str, Any]) -> None:
    betas = calibration["beta"]
    assert len(betas) == LAYERS
    assert all(len(beta) == 3 and 0 < beta[0] < beta[1] < beta[2] < 1 for beta in betas)
    assert untouched(llm)
    step = SparseStep()
    sparse = SparseMoe(SparseVerifyOptions(moe_drop=3), step, calibration)
    assert sparse.attach(model_of(llm)) == ""
    watch = Watch(llm, step)
    watch.run(prompts)
    kept = []
    for verified, others, ids, own in watch:
        assert all(a == b for a, b in zip(sets(ids[others]), sets(own[others]), strict=True)), "a prompt's row changed"
        for row, mine in zip(sets(ids[verified]), sets(own[verified]), strict=True):
            assert row <= mine
            kept.append(len(row))
    assert min(kept) == TOP_K - 3
    # Medians of these very prompts and outputs: about half drop all three.
    assert 0.3 < np.mean(np.array(kept) == TOP_K - 3) < 0.7
    assert 1.0 < sparse.stats()["moe_drops"] * sparse.stats()["moe_layer_steps"] / len(kept) < 2.5
    sparse.detach()
    assert untouched(llm)


@pytest.mark.slow
def test_compiled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM compiles the model, the routing stays editable, and is its own where there is nothing to edit."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    tiny = make_tiny_moe(tmp_path / "tiny")
    prompts = [{"prompt_token_ids": [7, 8, 9, 7, 8, 9, 7, 8]}, {"prompt_token_ids": [100 + i for i in range(30)]}]
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    settings: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 2, "skip_tokenizer_init": True}
    with engine(tiny, NGRAM, enforce_eager=False, **settings) as llm:
        exact = run(llm, prompts)
        late = SparseMoe(SparseVerifyOptions(moe_experts=0.5), SparseStep(), None).attach(model_of(llm))
        assert late == "the model is already compiled"

    step = SparseStep()
    sparse = SparseMoe(SparseVerifyOptions(moe_experts=0.5), step, None)
    load = CPUModelRunner.load_model

    def load_model(self: Any, *args: Any, **others: Any) -> None:
        load(self, *args, **others)
        assert sparse.attach(self.get_model()) == ""

    with monkeypatch.context() as patched:
        patched.setattr(CPUModelRunner, "load_model", load_model)
        # The cache folder holds the model that was compiled without; it must not be taken.
        context = engine(tiny, NGRAM, enforce_eager=False, **settings)
        llm = context.__enter__()
    assert run(llm, prompts) == exact
    calls: list[torch.Tensor] = []
    with verify_groups(llm, step), kernel_calls(calls):
        run(llm, prompts)
    stats = sparse.stats()
    assert stats["moe_layer_steps"] > 20
    assert stats["moe_experts_used"] <= 4 < stats["moe_experts_exact"]
    assert sum(ids.unique().numel() <= 4 for ids in calls) >= stats["moe_layer_steps"]
    sparse.detach()
    with verify_groups(llm, step):
        assert run(llm, prompts) == exact
    context.__exit__(None, None, None)
