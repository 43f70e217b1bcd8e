"""The union of channels that some row opens, on the device, against its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_specplug.kernels import ffn_union_triton
from vllm_specplug.kernels.ffn_union import ffn_union_reference
from vllm_specplug.kernels.ffn_union_triton import Workspace, ffn_union, work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(act, pools, tau, gate=False, dtype=torch.bool, space=None):
    """Masks, lists and counts; nothing behind them is written, nor are rows of no pool read."""
    rows, channels = act.shape
    count = len(pools) - 1
    wide = torch.full((rows, channels + 3), math.nan, dtype=act.dtype, device=DEVICE)
    given = wide[:, :channels]
    given[pools[0] : pools[-1]] = act[pools[0] : pools[-1]].to(DEVICE)
    mask = torch.full((count + 1, channels), 7, dtype=torch.uint8, device=DEVICE)
    listed = torch.full((count + 1, channels), -77, dtype=torch.int32, device=DEVICE)
    counts = torch.full((count + 1,), -77, dtype=torch.int32, device=DEVICE)
    space = space or Workspace(count, channels, DEVICE)
    space.sums.fill_(-77)
    starts = torch.tensor(pools, dtype=torch.int32, device=DEVICE)
    ffn_union(given, starts, mask[:count].view(dtype), listed[:count], counts[:count], space, tau, gate)
    assert (mask[count] == 7).all() and (listed[count] == -77).all() and counts[count] == -77
    return mask[:count].cpu(), listed[:count].cpu(), counts[:count].cpu()


def assert_union(act, pools, tau, gate=False, **more):
    mask, listed, counts = run(act, pools, tau, gate, **more)
    value = act.float()
    value = torch.nn.functional.silu(value) if gate else value
    for pool, (start, end) in enumerate(itertools.pairwise(pools)):
        union = ~(value[start:end].abs() < tau).all(0)
        assert mask[pool].tolist() == union.int().tolist()
        channels = union.nonzero()[:, 0].tolist()
        assert counts[pool] == len(channels)
        assert listed[pool].tolist() == channels + [-1] * (act.shape[1] - len(channels))
    return counts


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 37, 127, 128, 129, 700])
def test_union_of_each_pool(channels, dtype, gate):
    torch.manual_seed(channels)
    act = torch.randn(70, channels).to(dtype)
    # Rows before and behind, an empty pool, one row, more rows than a tile.
    pools = [2, 3, 3, 6, 38, 69]
    for tau in (0.0, 0.1, 1.3, 9.0):
        counts = assert_union(act, pools, tau, gate)
        assert counts[1] == 0 and (tau > 0 or counts[0] == channels)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 64, 65, 129])
def test_only_the_last_row_opens_anything(rows):
    act = torch.zeros(rows + 1, 300)
    act[rows - 1, [0, 127, 128, 255, 299]] = -1.0
    act[rows] = 1.0
    _, listed, counts = run(act, [0, rows], 0.5)
    assert counts.tolist() == [5] and listed[0, :6].tolist() == [0, 127, 128, 255, 299, -1]
    assert_union(act, [0, rows, rows + 1], 0.5, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_the_layers_definition(dtype):
    torch.manual_seed(0)
    x, same = torch.randn(5, 200).to(dtype), torch.eye(200).to(dtype)
    _, union = ffn_union_reference(x, same, same, same, 0.3)
    mask, _, counts = run(x, [0, 5], 0.3, gate=True)
    assert torch.equal(mask[0].bool(), union) and 0 < int(counts) < 200


@pytest.mark.parametrize("gate", [False, True])
def test_nan_opens_a_channel_and_equal_is_open(gate):
    act = torch.zeros(3, 260)
    act[1, 130] = math.nan
    act[2, 259] = math.inf
    assert run(act, [0, 3], 0.5, gate)[1][0, :3].tolist() == [130, 259, -1]
    if not gate:
        act[0, 4] = -0.5
        assert run(act, [0, 3], 0.5)[1][0, :4].tolist() == [4, 130, 259, -1]


def test_many_pools_and_a_workspace_that_is_too_large():
    torch.manual_seed(1)
    act = torch.randn(128, 140)
    assert_union(act, list(range(0, 129, 2)), 1.5, space=Workspace(99, 400, DEVICE))


def test_many_channels(monkeypatch):
    torch.manual_seed(2)
    assert_union(torch.randn(3, 14_336), [0, 3], 1.2)
    # Blocks of one channel: only the sums before it place a channel.
    monkeypatch.setattr(ffn_union_triton, "_BLOCK", 1)
    assert_union(torch.randn(3, 33), [0, 3], 1.2)


def test_nothing_to_unite():
    assert run(torch.zeros(4, 0), [0, 4], 0.5)[2].tolist() == [0]
    mask, listed, counts = run(torch.zeros(4, 5), [0], 0.5)
    assert len(mask) == len(listed) == len(counts) == 0


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.data())
def test_any_shape(data):
    rows, channels = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
    pools = sorted(data.draw(st.lists(st.integers(0, rows), min_size=1, max_size=5)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    act = (torch.randn(rows, channels) * 4).round() / 4  # some equal to tau
    tau = data.draw(st.sampled_from([0.0, 0.25, 1.0, 2.5]))
    assert_union(act.to(data.draw(st.sampled_from(DTYPES))), pools, tau)


def test_wrong_arguments():
    def ints(*shape, dtype=torch.int32):
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    act = torch.zeros(4, 130, device=DEVICE)
    good = dict(
        act=act,
        pools=ints(3),
        mask=ints(2, 130, dtype=torch.bool),
        channels=ints(2, 130),
        counts=ints(2),
        workspace=Workspace(2, 130, DEVICE),
        tau=0.1,
    )
    ffn_union(**good)
    for name, value, message in [
        ("act", act.double(), "act must be"),
        ("act", torch.zeros(130, 4, device=DEVICE).T, "act's last dimension must be contiguous"),
        ("pools", ints(3, dtype=torch.int64), "pools must be"),
        ("pools", ints(0), "pools must have at least 1 entry"),
        ("mask", ints(2, 130, dtype=torch.int8), "mask must be"),
        ("mask", ints(130, 2, dtype=torch.bool).T, "mask must be contiguous"),
        ("channels", ints(2, 129), "channels must be"),
        ("counts", ints(1), "counts must be"),
        ("workspace", Workspace(1, 130, DEVICE), "workspace is for 2 blocks of channels, got 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            ffn_union(**{**good, name: value})
    wide = torch.zeros(1, ffn_union_triton.MOST_CHANNELS + 1, device=DEVICE)
    changed = dict(act=wide, pools=ints(1), mask=ints(0, wide.shape[1], dtype=torch.bool), counts=ints(0))
    with pytest.raises(ValueError, match="at most 524288 channels"):
        ffn_union(**{**good, **changed, "channels": ints(0, wide.shape[1])})


def test_work_counts_what_is_read_and_written():
    assert work(10, 2, 64, 2) == (10 * 64 * 2 + 2 * (5 * 64 + 4), 640)
