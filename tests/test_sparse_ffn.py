"""Sparse feed-forward layers in a real engine in float32: exact where they must be, the reference's where they skip."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import MODEL, engine, greedy, make_tiny_llama, runner_of
from vllm_specplug.kernels.ffn_union import ffn_union_reference
from vllm_specplug.proposers.sparse_verify import SparseVerifyOptions

from vllm_specplug.host import gated_ffn, sparse_ffn
from vllm_specplug.host.sparse_ffn import LEVELS, NO_CALIBRATION, FfnQuantiles, SparseFfn, crossing
from vllm_specplug.host.sparse_step import SparseStep

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
COUNT, LENGTH = 3, 24


def options(**changes):
    return SparseVerifyOptions(**({"ffn_sparsity": 0.5, "ffn_rows": 16} | changes))


@contextlib.contextmanager
def described(llm, step, rows=None):
    """Fill ``step`` as the host does before forward passes, and empty it after each; ``rows`` notes their numbers."""
    runner = runner_of(llm)
    prepare, execute = runner._prepare_inputs, runner.execute_model

    def _prepare_inputs(scheduler_output, num_scheduled_tokens):
        result = prepare(scheduler_output, num_scheduled_tokens)
        batch = runner.input_batch
        n = len(num_scheduled_tokens)
        starts = np.concatenate(([0], np.cumsum(num_scheduled_tokens)[:-1]))
        decodes = batch.num_computed_tokens_cpu[:n] >= batch.num_prompt_tokens[:n]
        groups = np.stack((starts, num_scheduled_tokens), 1).astype(np.int32)[decodes]
        step.groups, step.num_rows = (groups if len(groups) else None), int(np.sum(num_scheduled_tokens))
        if rows is not None and decodes.all():
            rows.append(step.num_rows)
        return result

    def execute_model(*args, **kwargs):
        try:
            return execute(*args, **kwargs)
        finally:
            step.clear()

    runner._prepare_inputs, runner.execute_model = _prepare_inputs, execute_model
    try:
        yield
    finally:
        del runner._prepare_inputs, runner.execute_model


@pytest.fixture(scope="module")
def llm():
    with engine(MODEL, NGRAM) as made:
        yield made


def model_of(llm):
    return runner_of(llm).get_model()


@pytest.fixture(scope="module")
def baseline(llm, prompts):
    return greedy(llm, prompts[:COUNT], LENGTH, 1)


@pytest.fixture(scope="module")
def calibration(llm, prompts, baseline):
    """Thresholds from a few prompts, and the activations they were found from."""
    seen: list[torch.Tensor] = []
    quantiles = FfnQuantiles()
    quantiles.attach(model_of(llm))
    last = gated_ffn.find(model_of(llm))[-1]
    hook = last.module.gate_up_proj.register_forward_hook(lambda m, a, out: seen.append(out[0][:, :1536].clone()))
    greedy(llm, prompts[10:14], 4, 1)
    hook.remove()
    quantiles.detach()
    count = sum(x.numel() for x in seen)
    greedy(llm, prompts[10:11], 4, 1)
    result = quantiles.result()
    assert result["values"] == [count] * 30  # nothing after detach
    return result, torch.nn.functional.silu(torch.cat(seen)).abs()


@contextlib.contextmanager
def attached(llm, calibration, break_even=2.0, **changes):
    """A sparse FFN that always pays unless told otherwise, so that no clock decides."""
    step = SparseStep()
    sparse = SparseFfn(options(**changes), step, calibration)
    assert sparse.attach(model_of(llm)) == ""
    sparse.break_even[1:] = break_even
    try:
        yield sparse, step
    finally:
        sparse.detach()


def untouched(model):
    return not any("forward" in vars(m) for m in model.modules())


def test_crossing():
    assert crossing(dense=3.0, half=1.5, full=2.5, share=0.5) == 2.0
    assert crossing(dense=2.0, half=1.5, full=2.5, share=0.5) == pytest.approx(0.75)
    assert crossing(dense=1.0, half=1.5, full=2.5, share=0.5) == pytest.approx(0.25)
    assert crossing(dense=0.5, half=1.5, full=2.5, share=0.5) == 0.0
    assert crossing(dense=1.0, half=1.5, full=1.4, share=0.5) == 0.0


def test_a_layer_that_opens_too_much_rests_and_is_looked_at_again():
    ffn = SimpleNamespace(dense=None)
    layer = sparse_ffn._Layer(None, 0, ffn, None, 0.1)
    assert layer.pays(3, 0.5) and not layer.pays(3, 0.0)
    layer._note(3, 0.9)
    assert sum(layer.pays(3, 0.5) for _ in range(640)) == 10
    assert layer.pays(3, 2.0) and layer.pays(3, 0.95) and layer.pays(2, 0.5)
    for _ in range(200):
        layer._note(3, 0.4)
    assert layer.pays(3, 0.5)


def test_quantiles_of_a_known_distribution():
    quantiles = FfnQuantiles()
    assert quantiles.LOW < 0 < quantiles.HIGH
    quantiles._counts = torch.zeros(1, (quantiles.HIGH - quantiles.LOW) * quantiles.STEPS, dtype=torch.int64)
    gate = torch.linspace(0.0, 20.0, 200_001)
    quantiles._observer(0, len(gate))(None, None, (torch.cat((gate, gate)), None))
    wanted = torch.nn.functional.silu(gate).quantile(torch.tensor(LEVELS)).tolist()
    assert quantiles.result()["quantiles"][0] == pytest.approx(wanted, rel=0.005)
    with pytest.raises(ValueError, match="no forward pass"):
        FfnQuantiles().result()


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (None, NO_CALIBRATION),
        ({}, NO_CALIBRATION),
        ({"quantiles": [[0.1, 0.2]]}, "19 thresholds"),
        ({"quantiles": [[0.1] * 19]}, "no feed-forward layers"),
    ],
)
def test_reasons_without_a_model(calibration, words):
    pytest.importorskip("vllm")
    sparse = SparseFfn(options(), SparseStep(), calibration)
    assert words in sparse.attach(torch.nn.Linear(2, 2))
    assert sparse.stats()["ffn_bytes"] == 0


@pytest.mark.engine
def test_calibration_is_the_quantiles(calibration):
    result, acts = calibration
    rows = np.array(result["quantiles"])
    assert rows.shape == (30, 19) and (np.diff(rows, axis=1) > 0).all() and (rows > 0).all()
    wanted = np.quantile(acts.double().numpy().ravel(), LEVELS)
    np.testing.assert_allclose(rows[-1], wanted, rtol=0.02)


@pytest.mark.engine
def test_exact_option_changes_nothing(llm, prompts, baseline, calibration):
    with attached(llm, calibration[0], ffn_sparsity=0.0) as (sparse, step):
        assert untouched(model_of(llm)) and sparse.stats()["ffn_bytes"] == 0
        with described(llm, step):
            assert greedy(llm, prompts[:COUNT], LENGTH, 1) == baseline


@pytest.mark.engine
def test_reasons_of_a_real_model(llm, calibration):
    model = model_of(llm)
    ffn = gated_ffn.find(model)[7]
    other = {"quantiles": calibration[0]["quantiles"][:-1]}
    assert "29 feed-forward layers, this one has 30" in SparseFfn(options(), SparseStep(), other).attach(model)

    def reason(owner, name, value):
        before = getattr(owner, name)
        setattr(owner, name, value)
        try:
            return SparseFfn(options(), SparseStep(), calibration[0]).attach(model)
        finally:
            setattr(owner, name, before)

    assert "model.layers.7.mlp.down_proj is quantised (object)" in reason(
        ffn.module.down_proj, "quant_method", object()
    )
    assert "tensor parallelism" in reason(ffn.module.gate_up_proj, "tp_size", 2)
    assert "bias" in reason(ffn.module.down_proj, "bias", torch.nn.Parameter(torch.zeros(576)))
    assert "float16" in reason(ffn.module.gate_up_proj, "params_dtype", torch.float16)
    assert "layers.7.mlp is not" in reason(ffn.module.act_fn, "forward_native", lambda x: x[:, :1536] * x[:, 1536:])
    assert untouched(model)


@pytest.mark.engine
def test_weights_are_the_checkpoints(llm):
    from safetensors import safe_open

    ffns = gated_ffn.find(model_of(llm))
    assert [f.name for f in ffns] == [f"model.layers.{i}.mlp" for i in range(30)]
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        for ffn in (ffns[0], ffns[17]):
            for part, weight in zip(("gate", "up", "down"), ffn.weights(), strict=True):
                assert torch.equal(weight, file.get_tensor(f"{ffn.name}.{part}_proj.weight").float())


def first_logprobs(llm, prompts):
    """Of the tokens after each prompt, as the prompt's own forward pass gives them."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=2, logprobs=5)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [{token: entry.logprob for token, entry in o.outputs[0].logprobs[0].items()} for o in outputs]


@pytest.mark.engine
def test_prompts_are_exact(llm, prompts, calibration):
    plain = first_logprobs(llm, prompts[:COUNT])
    with attached(llm, calibration[0], ffn_sparsity=0.9) as (_, step), described(llm, step):
        assert first_logprobs(llm, prompts[:COUNT]) == plain


@pytest.mark.engine
@pytest.mark.parametrize(("sparsity", "concurrency"), [(0.5, 1), (0.8, 8)])
def test_layers_are_the_references(llm, prompts, calibration, sparsity, concurrency):
    """Every layer of every step beside the reference of the checkpoint's weights, on the same rows. (Tokens of two
    engines would not do: a sum in another order may move an activation across its threshold.)"""
    model, rows, shares, near = model_of(llm), [], [], 0
    thresholds = [np.interp(sparsity, LEVELS, row) for row in calibration[0]["quantiles"]]

    def beside(ffn, tau):
        weights, forward = ffn.weights(), ffn.module.forward

        def both(x):
            nonlocal near
            groups = step.groups
            out = forward(x)
            if groups is None or groups[:, 1].sum() != len(x) or len(x) > 16:
                assert torch.equal(out, type(ffn.module).forward(ffn.module, x))
                return out
            wanted, union = ffn_union_reference(x, *weights, tau)
            shares.append(float(union.float().mean()))
            act = torch.nn.functional.silu(x @ weights[0].T).abs()
            if bool(((act.amax(0) - tau).abs() < 3e-6).any()):
                near += 1
            else:
                assert (out - wanted).abs().max() <= 1e-5 * max(float(wanted.abs().max()), 1.0)
            return out

        return both

    ffns = gated_ffn.find(model)
    with attached(llm, calibration[0], ffn_sparsity=sparsity) as (sparse, step):
        replaced = [ffn.module.forward for ffn in ffns]
        for ffn, tau in zip(ffns, thresholds, strict=True):
            ffn.module.forward = beside(ffn, float(tau))
        try:
            with described(llm, step, rows):
                greedy(llm, prompts[:COUNT], LENGTH // 2, concurrency)
        finally:
            for ffn, forward in zip(ffns, replaced, strict=True):
                ffn.module.forward = forward
        stats = sparse.stats()
    assert max(rows) > 1  # drafts really were verified
    assert stats["ffn_steps_sparse"] == len(rows) == len(shares) / 30
    assert 1 - sparsity < stats["ffn_union_share"] < 1
    assert stats["ffn_union_share"] == pytest.approx(np.mean(shares), abs=1e-4)
    assert near < len(shares) / 10


@pytest.mark.engine
def test_off_where_it_does_not_pay_and_after_detach(llm, prompts, baseline, calibration):
    model = model_of(llm)
    with attached(llm, calibration[0], break_even=0.0) as (sparse, step), described(llm, step):
        assert not untouched(model)
        assert sparse.stats()["ffn_bytes"] == 30 * 3 * 576 * 1536 * 4
        assert greedy(llm, prompts[:COUNT], LENGTH, 1) == baseline
        assert sparse.stats()["ffn_union_share"] == 0
    assert untouched(model) and sparse.stats()["ffn_bytes"] == 0
    step = SparseStep()
    with described(llm, step):
        assert greedy(llm, prompts[:COUNT], LENGTH, 1) == baseline


@pytest.mark.engine
def test_steps_of_more_rows_and_steps_with_prompts_are_exact(llm, prompts, baseline, calibration):
    rows = []
    with attached(llm, calibration[0], ffn_sparsity=0.9, ffn_rows=1) as (sparse, step), described(llm, step, rows):
        x = torch.randn(3, 576)
        module = gated_ffn.find(model_of(llm))[0].module
        with torch.inference_mode():
            plain = type(module).forward(module, x)
            step.groups, step.num_rows = np.array([[0, 3]], np.int32), 3
            assert torch.equal(module(x), plain)  # too many rows
            step.groups, step.num_rows = np.array([[0, 1]], np.int32), 1
            assert not torch.equal(module(x[:1]), plain[:1])
            step.groups, step.num_rows = np.array([[0, 1]], np.int32), 3
            assert torch.equal(module(x), plain)  # two rows of a prompt
            step.clear()
            assert torch.equal(module(x), plain)
        assert sparse.stats()["ffn_steps_sparse"] == 1 and sparse.stats()["ffn_steps_dense"] == 2


@pytest.mark.engine
def test_measured_break_even_is_a_share(llm, calibration):
    sparse = SparseFfn(options(ffn_rows=3), SparseStep(), calibration[0])
    try:
        assert sparse.attach(model_of(llm)) == ""
        assert len(sparse.break_even) == 4
        assert all(0 <= share <= 1 or share == 2 for share in sparse.break_even)
    finally:
        sparse.detach()


@pytest.mark.engine
@pytest.mark.slow
def test_compiled_mode(tmp_path):
    """The operator in a compiled model: sparse steps are sparse, and the model without them is another compiled one."""
    path = make_tiny_llama(tmp_path / "tiny", 512)
    quantiles = {"quantiles": [[0.01 * n for n in range(1, 20)]] * 2}
    prompts = [{"prompt_token_ids": [3, 5, 8, 13, 21, 34, 3, 5, 8]}]
    settings = {"enforce_eager": False, "skip_tokenizer_init": True, "max_model_len": 128}
    step = SparseStep()
    sparse = SparseFfn(options(), step, quantiles)
    load = runner_class().load_model

    def load_model(self, *args, **kwargs):
        result = load(self, *args, **kwargs)
        assert sparse.attach(self.get_model()) == ""
        sparse.break_even[1:] = 2.0
        return result

    runner_class().load_model = load_model
    try:
        with engine(path, None, **settings) as llm:
            plain = greedy(llm, prompts, 24, 1)
            assert sparse.stats()["ffn_steps_sparse"] == 0
            with described(llm, step):
                greedy(llm, prompts, 24, 1)
            assert sparse.stats()["ffn_steps_sparse"] == 23
            assert 0 < sparse.stats()["ffn_union_share"] < 1
            sparse.detach()
            assert greedy(llm, prompts, 24, 1) == plain
    finally:
        runner_class().load_model = load
    with engine(path, None, **settings) as llm:
        assert greedy(llm, prompts, 24, 1) == plain


def runner_class():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    return CPUModelRunner
