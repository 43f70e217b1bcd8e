"""Walks down verified trees on the device: the Triton kernel against the compiled walk of the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_specplug.kernels.kv_move import accepted_moves
from vllm_specplug.kernels.tree_walk import walk
from vllm_specplug.kernels.tree_walk_triton import tree_walk, work

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POISON = -777
OUTPUTS = ("tokens", "paths", "lengths", "last_tokens", "sources", "targets")


def int32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def random_trees(rng: np.random.Generator, sizes: list[int], shape: str) -> np.ndarray:
    """Parents of all rows; ``sizes`` count rows, 0: an empty request."""
    ranges = {"chain": lambda m: (m - 1, m), "star": lambda m: (0, 1), "bushy": lambda m: (max(0, m - 6), m)}
    parents = [rng.integers(*ranges[shape](m)) if m else -1 for size in sizes for m in range(size)]
    return np.array(parents, np.int32)


def on_the_host(
    sizes: list[int], parents: np.ndarray, drafts: np.ndarray, drawn: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, paths and lengths by the host's walk, empty requests included, cut to ``depth``."""
    full = np.array([size > 0 for size in sizes], bool)
    starts = np.cumsum([0, *sizes])[:-1][full]
    shape = (int(full.sum()), max(*sizes, depth) + 1)
    tokens, paths = np.empty(shape, np.int32), np.empty(shape, np.int32)
    lengths = np.empty(shape[0], np.int32)
    drafted = np.delete(drafts[: sum(sizes)], starts).astype(np.int32)
    walk(np.array(sizes, np.int32)[full] - 1, parents, drafted, drawn.astype(np.int64), tokens, paths, lengths)
    every = np.full((2, len(sizes), depth), -1, np.int32)
    every[0, full], every[1, full] = tokens[:, :depth], paths[:, :depth]
    all_lengths = np.zeros(len(sizes), np.int32)
    all_lengths[full] = np.minimum(lengths, depth)
    return every[0], every[1], all_lengths


def poisoned(count: int, depth: int) -> dict[str, torch.Tensor]:
    wide, narrow = int32(np.full((count, depth), POISON)), int32(np.full(count, POISON))
    return {name: (narrow if name in ("lengths", "last_tokens") else wide).clone() for name in OUTPUTS}


def assert_same(
    sizes: list[int],
    seed: int = 0,
    shape: str = "bushy",
    depth: int = 8,
    vocab: int = 3,
    dtype: torch.dtype = torch.int64,
    max_rows: int | None = None,
) -> np.ndarray:
    """What the kernel fills is what the host's walk finds. Returns the lengths."""
    rng = np.random.default_rng(seed)
    total, padding = sum(sizes), 5
    parents = random_trees(rng, sizes, shape)
    # Rows after the last request that look like children of anyone.
    drafts, drawn = rng.integers(0, vocab, (2, total + padding))
    contexts = rng.integers(0, 5000, len(sizes))
    tokens, paths, lengths = on_the_host(sizes, parents, drafts, drawn, depth)
    sources, targets = accepted_moves(torch.from_numpy(paths), torch.from_numpy(contexts.astype(np.int32)))
    out = poisoned(len(sizes), depth)
    device_parents = int32(np.concatenate([parents, np.zeros(padding)]))
    device_drawn = torch.from_numpy(drawn).to(DEVICE, dtype)
    starts = int32(np.cumsum([0, *sizes]))
    largest = max(1, *sizes) if max_rows is None else max_rows
    tree_walk(starts, device_parents, int32(drafts), device_drawn, int32(contexts), **out, max_rows=largest)
    last = [row[length - 1] if length else POISON for row, length in zip(tokens, lengths, strict=True)]
    wanted = {"tokens": tokens, "paths": paths, "lengths": lengths, "last_tokens": np.array(last, np.int32)}
    for name, array in {**wanted, "sources": sources, "targets": targets}.items():
        np.testing.assert_array_equal(out[name].cpu(), array, err_msg=name)
    return lengths


def test_a_tree_by_hand():
    """Rows 0 to 6; the walk takes 0, 2, 5, 6: of rows 2 and 3, which hold the same token, the first."""
    parents = int32([-1, 0, 0, 0, 1, 2, 5])
    drafts = int32([9, 11, 12, 12, 13, 13, 14])
    drawn = torch.tensor([12, 0, 13, 0, 0, 14, 99], device=DEVICE)
    out = poisoned(1, 6)
    tree_walk(int32([0, 7]), parents, drafts, drawn, int32([40]), **out)
    assert out["tokens"].tolist() == [[12, 13, 14, 99, -1, -1]]
    assert out["paths"].tolist() == [[0, 2, 5, 6, -1, -1]]
    assert out["lengths"].tolist() == [4] and out["last_tokens"].tolist() == [99]
    assert out["sources"].tolist() == [[-1, 42, 45, 46, -1, -1]]
    assert out["targets"].tolist() == [[-1, 41, 42, 43, -1, -1]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", ["chain", "star", "bushy"])
def test_shapes_of_trees(shape, dtype):
    assert_same([5, 0, 1, 9, 33, 0, 2], seed=1, shape=shape, dtype=dtype)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 18, 32, 33, 64, 65, 128, 129, 130, 300])
def test_sizes(size):
    assert_same([size, 1, size], seed=size, depth=7)


@pytest.mark.parametrize("max_rows", [129, 1000])
def test_fewer_rows_than_allowed(max_rows):
    assert_same([4, 0, 40], seed=4, max_rows=max_rows)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 8, 16, 17, 128, 129, 130])
def test_a_whole_chain_is_cut_to_the_depth(depth):
    """128 accepted tokens, and requests that accept some or none."""
    lengths = assert_same([129, 6, 1, 0], shape="chain", vocab=1, depth=depth)
    assert lengths.tolist() == [min(129, depth), min(6, depth), 1, 0]


def test_nothing_is_accepted():
    assert assert_same([20, 30], vocab=10**9).tolist() == [1, 1]


def test_large_tokens():
    """Tokens that would be equal in fewer bits are not."""
    out = poisoned(1, 3)
    drawn = torch.tensor([1 + 2**31, 5], device=DEVICE)
    tree_walk(int32([0, 2]), int32([-1, 0]), int32([0, 1 - 2**31]), drawn, int32([0]), **out)
    assert out["lengths"].tolist() == [1]


@pytest.mark.parametrize("count", [1, 7, 64])
def test_many_requests(count):
    sizes = np.random.default_rng(count).integers(0, 60, count).tolist()
    lengths = assert_same(sizes, seed=count, vocab=2, max_rows=129)
    assert lengths.max() > 3 or count == 1


def test_all_requests_are_empty():
    assert assert_same([0, 0, 0], max_rows=129).tolist() == [0, 0, 0]


def test_no_request():
    """The outputs are views of none of a poisoned request's rows: nothing behind them is written."""
    nothing, kept = int32([]), poisoned(1, 4)
    tree_walk(int32([0]), nothing, nothing, nothing, nothing, **{name: out[:0] for name, out in kept.items()})
    assert all((out == POISON).all() for out in kept.values())


def test_parents_that_do_not_come_before_are_not_followed():
    """As on the host. So rows rise along every path, as moves must."""
    out = poisoned(1, 4)
    drawn = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    tree_walk(int32([0, 4]), int32([-1, 2, 0, 3]), int32([0] * 4), drawn, int32([0]), **out)
    assert out["paths"].tolist() == [[0, 2, -1, -1]]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    shape=st.sampled_from(["chain", "bushy"]),
    depth=st.integers(1, 12),
    vocab=st.integers(1, 4),
)
def test_fuzz(**case):
    assert_same(**case)


def good_arguments() -> dict[str, torch.Tensor]:
    inputs = {"row_starts": int32([0, 3, 3]), "parents": int32([-1, 0, 0]), "drafts": int32([0, 1, 2])}
    return {**inputs, "drawn": int32([1, 2, 3]).long(), "contexts": int32([7, 8]), **poisoned(2, 4)}


@pytest.mark.parametrize("name", [name for name in good_arguments() if name != "drawn"])
def test_other_dtypes_shapes_and_devices_are_refused(name):
    for change in (lambda t: t.long(), lambda t: torch.cat([t, t], -1)[..., ::2], lambda t: t.to("meta")):
        args = good_arguments()
        args[name] = change(args[name])
        with pytest.raises(ValueError, match=f"^{name} must be"):
            tree_walk(**args)
    if name not in ("contexts", "tokens"):  # these say how many requests and how deep
        args = good_arguments()
        args[name] = torch.cat([args[name], args[name]], -1)
        with pytest.raises(ValueError, match=f"^{name} must be"):
            tree_walk(**args)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"drawn must be torch.int64 or torch.int32, got torch.int16"):
        tree_walk(**{**good_arguments(), "drawn": int32([1, 2, 3]).short()})
    with pytest.raises(ValueError, match="parents must be \\[2\\]"):
        tree_walk(**{**good_arguments(), "drawn": int32([1, 2])})
    with pytest.raises(ValueError, match="row_starts must be \\[2\\]"):
        tree_walk(**{**good_arguments(), "contexts": int32([1])})
    with pytest.raises(ValueError, match="tokens must have at least one column"):
        tree_walk(**{**good_arguments(), **poisoned(2, 0)})
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        tree_walk(**good_arguments(), max_rows=0)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_in_a_cuda_graph():
    """A captured walk follows what its inputs hold when it is replayed."""
    args = good_arguments()
    tree_walk(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tree_walk(**args)
    for drawn, path in (([1, 5, 6], [0, 1, -1, -1]), ([2, 5, 6], [0, 2, -1, -1]), ([3, 5, 6], [0, -1, -1, -1])):
        args["drawn"].copy_(torch.tensor(drawn))
        graph.replay()
        assert args["paths"][0].tolist() == path


def test_work():
    assert work(100, 4, 8).bytes == 100 * 16 + 4 * (16 + 16 * 8)
