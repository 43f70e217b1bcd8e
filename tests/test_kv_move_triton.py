"""Moves of accepted rows in the KV cache: the definition against slots by hand, the Triton kernel against it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_specplug.kernels.kv_move import accepted_moves, by_slot, kv_move_reference
from vllm_specplug.kernels.kv_move_triton import KVMover, kv_move, work

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8]  # uint8: a quantised cache
LAYOUTS = ["blocks first", "parts first", "blocks first, HND", "parts first, HND", "content", "content, HND"]
PADDED = ["layers in a block", "heads outside"]  # rows, blocks or heads of other layers lie between


def int32(rows: object) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def make_caches(
    layout: str,
    dtype: torch.dtype,
    layers: int,
    blocks: int,
    block_size: int,
    heads: int,
    width: int,
    shift: int = 0,
    seed: int = 0,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """All bytes, random (so some numbers are NaN), and each layer's view of them, ``shift`` elements in."""
    shapes = {
        # memory order, and which dimension of it each dimension of a layer's view is; -1: the layer
        "blocks first": ((layers, blocks, 2, block_size, heads, width), (1, 2, 3, 4, 5)),
        "parts first": ((layers, 2, blocks, block_size, heads, width), (1, 2, 3, 4, 5)),
        "blocks first, HND": ((layers, blocks, 2, heads, block_size, width), (1, 2, 4, 3, 5)),
        "parts first, HND": ((layers, 2, blocks, heads, block_size, width), (1, 2, 4, 3, 5)),
        "content": ((layers, blocks, block_size, heads, 2 * width), (1, 3, 2, 4)),
        "content, HND": ((layers, blocks, heads, block_size, 2 * width), (1, 2, 3, 4)),
        "layers in a block": ((blocks, layers, block_size, heads, 2 * width), (0, 3, 2, 4)),
        "heads outside": ((heads, layers, blocks, block_size, 2 * width), (2, 0, 3, 4)),
    }
    shape, order = shapes[layout]
    outside = next(n for n in range(len(shape)) if n not in order)
    size = torch.empty(0, dtype=dtype).element_size()
    rng = np.random.default_rng(seed)
    memory = torch.from_numpy(rng.integers(0, 256, (int(np.prod(shape)) + shift) * size, np.uint8)).to(DEVICE)
    whole = memory.view(dtype)[shift:].view(shape)
    places = [n - (n > outside) for n in order]
    return memory, [whole.select(outside, layer).permute(places) for layer in range(layers)]


def make_moves(
    rng: np.random.Generator, count: int, depth: int, contexts: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves of random paths through up to 129 rows; every fifth request is empty."""
    paths = np.full((count, depth), -1, np.int32)
    for request in range(count):
        if request % 5 == 4:
            continue
        length = int(rng.integers(1, depth + 1))
        rows = int(rng.choice([length, length + 1, 129]))
        paths[request, :length] = [0, *sorted(1 + rng.permutation(max(rows, length) - 1)[: length - 1])]
    return accepted_moves(int32(paths), int32(contexts))


def make_table(rng: np.random.Generator, count: int, contexts: list[int], block_size: int) -> torch.Tensor:
    """Blocks from 1 on; entries without a slot, and two more rows, say block 0. Rows have a stride of their own."""
    needed = [-(-(context + 129) // block_size) for context in contexts]
    order = 1 + rng.permutation(sum(needed))
    table = np.zeros((count + 2, max(needed) + 3), np.int32)
    for request, number in enumerate(needed):
        table[request, :number] = order[sum(needed[:request]) :][:number]
    return int32(table)[:, :-2]


def assert_same(
    layout: str,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    layers: int = 2,
    count: int = 3,
    depth: int = 8,
    block_size: int = 16,
    heads: int = 2,
    width: int = 16,
    shift: int = 0,
    word: int | None = None,
) -> None:
    """The kernel leaves all memory as the definition does. Also: all data is moved as words of ``word`` bytes."""
    rng = np.random.default_rng(seed)
    contexts = rng.integers(0, 4 * block_size, count).tolist()
    table = make_table(rng, count, contexts, block_size)
    sources, targets = make_moves(rng, count, depth, contexts)
    args = (layout, dtype, layers, int(table.max()) + 1, block_size, heads, width, shift, seed)
    (wanted, by_definition), (found, by_kernel) = make_caches(*args), make_caches(*args)
    kv_move_reference(by_definition, block_size, table, sources, targets)
    mover = KVMover(by_kernel, block_size)
    kv_move(mover, table, sources, targets)
    assert torch.equal(found, wanted)
    assert word is None or mover.constants["WORD_BYTES"] == word


def test_moves_of_paths():
    paths = int32([[0, 1, 2, 3], [0, 2, 3, -1], [0, 1, 5, -1], [0, -1, -1, -1], [-1, -1, -1, -1]])
    sources, targets = accepted_moves(paths, int32([10, 20, 30, 40, 50]))
    assert sources.dtype == targets.dtype == torch.int32
    assert sources.tolist() == [[-1] * 4, [-1, 22, 23, -1], [-1, -1, 35, -1], [-1] * 4, [-1] * 4]
    assert targets.tolist() == [[-1] * 4, [-1, 21, 22, -1], [-1, -1, 32, -1], [-1] * 4, [-1] * 4]


@pytest.mark.parametrize("layout", LAYOUTS + PADDED)
def test_a_slot_of_every_layout(layout):
    """What `by_slot` shows is what the dimensions' names say."""
    _, caches = make_caches(layout, torch.uint8, 2, 3, 4, 5, 6)
    for cache in caches:
        view = by_slot(cache, 4)
        for block, slot, head in ((0, 0, 0), (2, 3, 4), (1, 2, 3)):
            if "parts" in layout:
                wanted = cache[:, block, slot, head]
            elif "blocks" in layout:
                wanted = cache[block, :, slot, head]
            else:
                wanted = cache[block, head, slot][None]
            assert torch.equal(view[block, slot, :, head], wanted)
    shape = [3, 4, 1, 5, 12] if view.shape[2] == 1 else [3, 4, 2, 5, 6]
    assert list(view.shape) == shape


@pytest.mark.parametrize("layout", LAYOUTS + PADDED)
@pytest.mark.parametrize("mover", [True, False])
def test_overlapping_moves_by_hand(layout, mover):
    """A path without row 1: every slot but the last is read, then overwritten. It crosses blocks."""
    _, caches = make_caches(layout, torch.float16, 2, 6, 4, 3, 4)
    for layer, cache in enumerate(caches):
        for block in range(6):
            for slot in range(4):
                by_slot(cache, 4)[block, slot] = 100 * layer + 4 * block + slot
    table = int32([[5, 0, 3], [2, 4, 1]])
    context = 2
    sources = int32([[-1, *range(context + 2, context + 10)], [-1, 11, -1, -1, -1, -1, -1, -1, -1]])
    targets = int32([[-1, *range(context + 1, context + 9)], [-1, 0, -1, -1, -1, -1, -1, -1, -1]])
    if mover:
        kv_move(KVMover(caches, 4), table, sources, targets)
    else:
        kv_move_reference(caches, 4, table, sources, targets)
    for layer, cache in enumerate(caches):
        view = by_slot(cache, 4)
        # In slots of the requests: 0 1 2 | 4 5 ... 11 | 11, and 11 1 2 ... 11.
        assert (view[5, 0] == 100 * layer + 20).all() and (view[5, 2] == 100 * layer + 22).all()
        values = [int(view[block, slot].unique().item()) - 100 * layer for block in (5, 0, 3) for slot in range(4)]
        assert values == [20, 21, 22, 0, 1, 2, 3, 12, 13, 14, 15, 15]
        values = [int(view[block, slot].unique().item()) - 100 * layer for block in (2, 4, 1) for slot in range(4)]
        assert values == [7, 9, 10, 11, 16, 17, 18, 19, 4, 5, 6, 7]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS + PADDED)
def test_layouts_and_dtypes(layout, dtype):
    assert_same(layout, dtype, count=2, depth=6)


@pytest.mark.parametrize("layout", ["blocks first", "parts first, HND", "content", "heads outside"])
@pytest.mark.parametrize(
    ("dtype", "heads", "width", "shift", "word"),
    [
        (torch.float16, 3, 20, 0, 8),
        (torch.float16, 1, 4, 0, 8),
        (torch.float16, 2, 8, 4, 8),  # the first address is no multiple of 16 bytes
        (torch.float16, 3, 8, 2, 4),
        (torch.float32, 1, 7, 0, 4),
        (torch.float16, 3, 8, 1, 2),
        (torch.uint8, 5, 3, 1, 1),
    ],
)
def test_words(layout, dtype, heads, width, shift, word):
    if layout in ("content", "heads outside") and dtype == torch.float32:
        word = 8  # a head's K and V are one run
    assert_same(layout, dtype, heads=heads, width=width, shift=shift, word=word)


@pytest.mark.parametrize("layout", ["blocks first", "content, HND", "layers in a block"])
@pytest.mark.parametrize(("heads", "width"), [(8, 128), (9, 128), (16, 128), (5, 160)])
def test_slots_of_one_and_several_chunks(layout, heads, width):
    assert_same(layout, torch.float16, heads=heads, width=width, count=1)


@pytest.mark.parametrize("block_size", [1, 3, 8, 16, 129, 256])
@pytest.mark.parametrize("depth", [1, 2, 7, 9])
def test_blocks_and_depths(block_size, depth):
    assert_same("content", block_size=block_size, depth=depth, seed=depth)


def test_many_requests():
    assert_same("parts first", count=64, depth=5, layers=2, width=4)


def test_a_whole_tree_moves():
    """128 moves: every row one slot down, through all blocks."""
    _, caches = make_caches("content, HND", torch.float16, 1, 9, 16, 2, 8)
    before = by_slot(caches[0], 16).clone().flatten(0, 1).view(torch.int16)
    table = int32([[8, 7, 6, 5, 4, 3, 2, 1, 0]])
    sources, targets = torch.arange(1, 129, device=DEVICE), torch.arange(128, device=DEVICE)
    kv_move(KVMover(caches, 16), table, sources[None].int(), targets[None].int())
    place = table[0].long()[torch.arange(129) // 16] * 16 + torch.arange(129, device=DEVICE) % 16
    after = by_slot(caches[0], 16).flatten(0, 1).view(torch.int16)
    assert torch.equal(after[place[:128]], before[place[1:]])
    assert torch.equal(after[place[128]], before[place[128]])


def test_two_blocks_of_two_parts():
    for parts_dim in (0, 1):
        (_, [cache]), (_, [same]) = (make_caches("blocks first", torch.float16, 1, 2, 4, 2, 8) for _ in range(2))
        with pytest.raises(ValueError, match="Give parts_dim"):
            KVMover([cache], 4)
        moves = (int32([[1, 0]]), int32([[-1, 7]]), int32([[-1, 1]]))
        kv_move_reference([same], 4, *moves, parts_dim)
        kv_move(KVMover([cache], 4, parts_dim), *moves)
        assert torch.equal(cache.view(torch.int16), same.view(torch.int16))


def test_nothing_to_move():
    memory, caches = make_caches("content", torch.float16, 1, 3, 4, 2, 8)
    before = memory.clone()
    mover = KVMover(caches, 4)
    table = int32([[1, 2]])
    none = int32([[-1, -1]])
    kv_move(mover, table, none, none)
    kv_move(mover, table, int32([[5, -1]]), int32([[-1, 3]]))
    kv_move(mover, table[:0], none[:0], none[:0])
    kv_move(mover, table, none[:, :0], none[:, :0])
    assert torch.equal(memory, before)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(LAYOUTS + PADDED),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    layers=st.integers(1, 3),
    count=st.integers(1, 4),
    depth=st.integers(1, 12),
    block_size=st.integers(1, 40),
    heads=st.integers(1, 5),
    width=st.integers(1, 40),
    shift=st.integers(0, 3),
)
def test_fuzz(**case):
    assert_same(**case)


def test_prepared_caches_are_refused():
    _, caches = make_caches("content", torch.float16, 2, 3, 4, 2, 8)
    with pytest.raises(ValueError, match="at least one layer"):
        KVMover([], 4)
    with pytest.raises(ValueError, match=r"\[blocks, kv_heads, 8, content\].*got \[3, 2, 4, 16\]"):
        KVMover(caches, 8)
    with pytest.raises(ValueError, match=r"got \[3, 16, 2\]"):
        KVMover([torch.zeros(3, 16, 2)], 16)
    with pytest.raises(ValueError, match="layer 1: the KV cache's shape must be"):
        KVMover([caches[0], caches[1][:2]], 4)
    with pytest.raises(ValueError, match="layer 1: the KV cache's dtype must be"):
        KVMover([caches[0], caches[1].view(torch.int16)], 4)
    with pytest.raises(ValueError, match="layer 1: the KV cache's strides must be"):
        KVMover([caches[0], caches[1].contiguous()], 4)
    with pytest.raises(ValueError, match="last dimension must be contiguous"):
        KVMover([caches[0][..., ::2]], 4)
    with pytest.raises(ValueError, match="parts_dim must be 0 or 1"):
        KVMover([torch.zeros(2, 3, 4, 2, 8)], 4, parts_dim=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": torch.zeros(2, 3, dtype=torch.int64)}, "sources must be torch.int32"),
        ({"sources": torch.zeros(3, 2, dtype=torch.int32).T}, "sources must be contiguous"),
        ({"targets": torch.zeros(2, 4, dtype=torch.int32)}, r"targets must be \[2, 3\]"),
        ({"targets": torch.zeros(2, 3, dtype=torch.int64)}, "targets must be torch.int32"),
        ({"block_table": torch.zeros(2, 3, dtype=torch.int64)}, "block_table must be torch.int32"),
        ({"block_table": torch.zeros(3, 2, dtype=torch.int32).T}, "block_table's last dimension"),
        ({"block_table": torch.zeros(1, 3, dtype=torch.int32)}, "block_table must have at least 2 rows"),
        ({"sources": torch.zeros(2, 3, dtype=torch.int32, device="meta")}, "sources must be on"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    _, caches = make_caches("content", torch.float16, 1, 3, 4, 2, 8)
    none = torch.full((2, 3), -1, dtype=torch.int32)
    args = {"block_table": torch.zeros(2, 3, dtype=torch.int32), "sources": none, "targets": none, **change}
    args = {name: tensor if tensor.is_meta else tensor.to(DEVICE) for name, tensor in args.items()}
    with pytest.raises(ValueError, match=message):
        kv_move(KVMover(caches, 4), **args)


@pytest.mark.parametrize(
    ("sources", "targets"), [([5, 4], [1, 2]), ([4, 5], [2, 1]), ([1, 5], [2, 3]), ([4, 4], [1, 2])]
)
def test_the_definition_refuses_moves_out_of_order(sources, targets):
    _, caches = make_caches("content", torch.float16, 1, 3, 4, 2, 8)
    with pytest.raises(ValueError, match="request 0: after slot"):
        kv_move_reference(caches, 4, int32([[1, 2]]), int32([sources]), int32([targets]))


def test_work():
    _, caches = make_caches("content", torch.float16, 3, 3, 4, 2, 8)
    mover = KVMover(caches, 4)
    assert mover.slot_bytes == 2 * 2 * 8 * 2
    assert work(mover, 5).bytes == 2 * 5 * 3 * 64
