"""The feed-forward layer over united channels: the reference against its definition, the CPU kernel against both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm_specplug.kernels import ffn_union_cpu as kernel_module
from vllm_specplug.kernels.ffn_union import DTYPES, ffn_union_reference
from vllm_specplug.kernels.ffn_union_cpu import MOST_ROWS, ffn_union_cpu, pack_ffn

# Largest difference to the reference, relative to the largest output: both sum in float32; bfloat16 rounds once.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8}
#: rows, H, I; the last ones divide by nothing.
SHAPES = [(1, 576, 1536), (4, 64, 200), (8, 32, 96), (3, 50, 37), (7, 1, 5), (5, 77, 1), (6, 33, 1001)]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(seed, rows, hidden, channels, dtype):
    torch.manual_seed(seed)
    x = torch.randn(rows, hidden)
    gate, up = torch.randn(2, channels, hidden) / hidden**0.5
    down = torch.randn(hidden, channels) / channels**0.5
    return tuple(t.to(dtype) for t in (x, gate, up, down))


def activations(x, gate):
    return torch.nn.functional.silu(x.float() @ gate.float().T).abs()


def tau_between(values, share):
    """A threshold with about ``share`` of the values below it and none near it."""
    ordered = values.flatten().sort().values
    at = min(max(int(share * len(ordered)), 1), len(ordered) - 1)
    wide = ordered[1:] - ordered[:-1] > 1e-5
    at = int((wide.nonzero().flatten() + 1 - at).abs().argmin())
    cut = int(wide.nonzero().flatten()[at])
    return float((ordered[cut] + ordered[cut + 1]) / 2)


def run(x, weights, tau):
    out = torch.full_like(x, 7)
    union = torch.full((len(weights[0]),), 9, dtype=torch.uint8)
    count = ffn_union_cpu(x, pack_ffn(*weights), tau, out, union)
    assert count == int(union.sum()) and set(union.tolist()) <= {0, 1}
    return out, union.bool()


def assert_close(found, wanted):
    assert found.dtype == wanted.dtype
    limit = TOLERANCE[wanted.dtype] * wanted.float().abs().max()
    assert (found.float() - wanted.float()).abs().max() <= limit


def test_reference_is_the_dense_layer_at_0_and_unites_the_rows_otherwise():
    x, gate, up, down = make(0, 3, 16, 40, torch.float64)
    act = torch.nn.functional.silu(x @ gate.T)
    out, union = ffn_union_reference(x, gate, up, down, 0.0)
    assert union.all()
    torch.testing.assert_close(out, (act * (x @ up.T)) @ down.T, rtol=1e-5, atol=1e-5)
    tau = tau_between(act.abs(), 0.6)
    out, union = ffn_union_reference(x, gate, up, down, tau)
    assert union.tolist() == [any(abs(act[t, i]) >= tau for t in range(3)) for i in range(40)]
    assert 0 < union.sum() < 40
    # A row keeps what another row opens.
    kept = act * union
    torch.testing.assert_close(out, (kept * (x @ up.T)) @ down.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden", "channels"), SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_kernel_is_the_reference(dtype, rows, hidden, channels, share):
    x, *weights = make(rows, rows, hidden, channels, dtype)
    tau = tau_between(activations(x, weights[0]), share) if share and rows * channels > 8 else 0.0
    wanted, union = ffn_union_reference(x, *weights, tau)
    out, found = run(x, weights, tau)
    assert torch.equal(found, union)
    assert share == 0.0 or tau == 0.0 or not union.all() or rows > 4
    assert_close(out, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_skipped_at_0(dtype):
    x, gate, up, down = make(1, 2, 48, 64, dtype)
    gate[5] = 0  # an activation of exactly 0 is not below 0
    out, union = run(x, (gate, up, down), 0.0)
    assert union.all()
    dense = (torch.nn.functional.silu(x.float() @ gate.float().T) * (x.float() @ up.float().T)) @ down.float().T
    assert_close(out, dense.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_empty_union_gives_zeros(dtype, rows):
    x, *weights = make(2, rows, 40, 70, dtype)
    out, union = run(x, weights, 1e6)
    assert not union.any() and not out.any()


def test_few_channels_at_a_time():
    x, *weights = make(3, 4, 64, 128, torch.float32)
    values = activations(x, weights[0]).amax(0).sort().values
    for count in range(1, 11):  # every remainder of the kernel's groups
        tau = float((values[-count] + values[-count - 1]) / 2)
        wanted, union = ffn_union_reference(x, *weights, tau)
        out, found = run(x, weights, tau)
        assert int(found.sum()) == count and torch.equal(found, union)
        assert_close(out, wanted)


def test_threshold_is_exact():
    """With sums that are exact, a channel at the threshold is computed and one below it is not."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    gate = torch.tensor([[3.0, 0.0], [2.0, 1.0], [0.0, 2.5], [-4.0, -4.0]])
    up, down = torch.ones(4, 2), torch.ones(2, 4)
    act = activations(x, gate)
    for tau in act.flatten().tolist():
        near = (act - tau).abs() < 1e-5
        union = run(x, (gate, up, down), tau * (1 - 1e-5))[1]
        assert torch.equal(union, ((act >= tau) | near).any(0))
        union = run(x, (gate, up, down), tau * (1 + 1e-5))[1]
        assert torch.equal(union, ((act > tau) & ~near).any(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_slices(dtype):
    x, *weights = make(4, 6, 64, 96, dtype)
    wide = torch.full((6, 100), float("nan"), dtype=dtype)
    wide[:, 20:84] = x
    target = torch.full((6, 90), 5.0, dtype=dtype)
    ffn_union_cpu(wide[:, 20:84], pack_ffn(*weights), 0.1, target[:, 10:74])
    assert (target[:, :10] == 5).all() and (target[:, 74:] == 5).all()
    assert_close(target[:, 10:74].contiguous(), ffn_union_reference(x, *weights, 0.1)[0])


@pytest.mark.parametrize("hidden", [32, 30])
def test_nan_stays_in_its_row_and_opens_all_channels(hidden):
    x, *weights = make(5, 3, hidden, 64, torch.float32)
    x[1, 3] = float("nan")
    out, union = run(x, weights, 1e6)
    assert union.all() and out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_activations(dtype):
    x, *weights = make(6, 2, 32, 64, dtype)
    x *= 500
    wanted, union = ffn_union_reference(x, *weights, 1.0)
    out, found = run(x, weights, 1.0)
    assert torch.equal(found, union)
    assert_close(out, wanted)


@pytest.mark.skipif(kernel_module._gomp_parallel() is None, reason="torch runs without OpenMP here")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 6])
def test_several_threads(dtype, rows):
    x, *weights = make(7, rows, 576, 1536, dtype)
    tau = tau_between(activations(x, weights[0]), 0.5)
    torch.set_num_threads(3)
    outs = [run(x, weights, tau) for _ in range(5)]
    wanted, union = ffn_union_reference(x, *weights, tau)
    for out, found in outs:
        assert torch.equal(found, union)
        assert torch.equal(out, outs[0][0])  # whichever thread did what
    assert_close(outs[0][0], wanted)


def test_most_rows_and_refusals():
    x, *weights = make(8, MOST_ROWS + 1, 32, 48, torch.float32)
    packed = pack_ffn(*weights)
    assert packed.nbytes == 3 * 32 * 48 * 4
    out = torch.empty_like(x)
    ffn_union_cpu(x[:MOST_ROWS], packed, 0.2, out[:MOST_ROWS])
    assert_close(out[:MOST_ROWS], ffn_union_reference(x[:MOST_ROWS], *weights, 0.2)[0])
    for bad in (x, x[:0], x[:2, :16], x[:2].bfloat16(), x[:2].T.contiguous().T):
        with pytest.raises(ValueError, match="x "):
            ffn_union_cpu(bad, packed, 0.1, torch.empty_like(bad))
    with pytest.raises(ValueError, match="union"):
        ffn_union_cpu(x[:2], packed, 0.1, out[:2], torch.zeros(48))
    gate, up, down = weights
    with pytest.raises(ValueError, match="found"):
        pack_ffn(gate, up, down.T)
    with pytest.raises(ValueError, match="float32 or all bfloat16"):
        pack_ffn(gate, up, down.half())
    with pytest.raises(ValueError, match="float32 or all bfloat16"):
        pack_ffn(*(w.half() for w in weights))


def test_columns_beyond_the_hidden_size_do_not_count():
    """Padding of odd sizes is read as zeros, whatever the buffers held before."""
    for seed in range(3):
        x, *weights = make(seed, 2, 19, 23, torch.bfloat16)
        assert_close(run(x, weights, 0.0)[0], ffn_union_reference(x, *weights, 0.0)[0])
    assert np.isfinite(run(x, weights, 0.0)[0].float().numpy()).all()
