"""The matrix of second guesses on the device: Triton's updates and drafts against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_specplug.kernels.recycling_matrix import (
    Node,
    check_template,
    recycle_draft_reference,
    recycle_update_reference,
    shape_parents,
    shaped_draft_reference,
)
from vllm_specplug.kernels.recycling_matrix_triton import (
    RecycleClaims,
    RecycleShapes,
    RecycleTemplate,
    draft_work,
    recycle_draft,
    recycle_update,
    shaped_draft,
    update_work,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POISON = -777

# The published tree of 80 nodes (arXiv 2408.08696): how many children each node of the level above has.
LEVELS = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0),
    (2, 0, 0, 1, 0, 0, 0, 0),
)


def published_template() -> tuple[list[int], list[int]]:
    parents, ranks, level = [], [], [-1]
    for counts in LEVELS:
        below = []
        for parent, count in zip(level, counts, strict=True):
            for rank in range(count):
                below.append(len(parents))
                parents.append(parent)
                ranks.append(rank)
        level = below
    return parents, ranks


def random_template(rng: np.random.Generator, nodes: int, k: int) -> tuple[list[int], list[int]]:
    """Parents in any order of levels, ranks with repetitions."""
    return [int(rng.integers(-1, node)) for node in range(nodes)], rng.integers(0, k, nodes).tolist()


def int32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def random_matrix(rng: np.random.Generator, vocab: int, k: int, unknown: float = 0.2) -> torch.Tensor:
    """Some entries are unknown, some are tokens that the matrix has no row for."""
    matrix = rng.integers(0, vocab + 2, (vocab, k))
    return int32(np.where(rng.random((vocab, k)) < unknown, -1, matrix))


def assert_updated(
    rows: int, seed: int = 0, vocab: int = 100, k: int = 8, dtype: torch.dtype = torch.int32, updates: int = 2
) -> None:
    """After each of several updates with the same claims the matrix is what the definition makes of it."""
    rng = np.random.default_rng(seed)
    # Rows before and after must stay as they are.
    memory = int32(rng.integers(-1, 1000, (vocab + 2, k)))
    wanted = memory.clone()
    claims = RecycleClaims(vocab, DEVICE)
    for _ in range(updates):
        tokens = int32(rng.integers(-1, vocab + 1, rows))
        ids = torch.from_numpy(rng.integers(-1, 1000, (rows, k))).to(DEVICE, dtype)
        recycle_update(memory[1:-1], tokens, ids, claims)
        recycle_update_reference(wanted[1:-1], tokens, ids)
        assert torch.equal(memory, wanted)


def assert_drafted(
    roots: list[int], parents: list[int], ranks: list[int], seed: int = 0, vocab: int = 50, k: int = 8
) -> torch.Tensor:
    matrix = random_matrix(np.random.default_rng(seed), vocab, k)
    tokens = int32(np.full((len(roots) + 1, len(parents)), POISON))
    recycle_draft(matrix, int32(roots), RecycleTemplate(parents, ranks, DEVICE), tokens[:-1])
    assert torch.equal(tokens[:-1], recycle_draft_reference(matrix, int32(roots), parents, ranks))
    assert (tokens[-1] == POISON).all()
    return tokens[:-1]


@pytest.mark.parametrize("kernel", [True, False])
def test_an_update_by_hand(kernel):
    matrix = int32([[1, 2], [3, 4], [5, 6], [7, 8]])
    args = (matrix, int32([2, -1, 0, 2, 4, -5]), int32([[10, 11], [12, 13], [14, -1], [16, 17], [18, 19], [20, 21]]))
    if kernel:
        recycle_update(*args, RecycleClaims(4, DEVICE))
    else:
        recycle_update_reference(*args)
    assert matrix.tolist() == [[14, -1], [3, 4], [16, 17], [7, 8]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 127, 128, 129, 200])
def test_rows(rows, dtype):
    assert_updated(rows, seed=rows, dtype=dtype)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 10, 16])
def test_guesses_per_token(k):
    assert_updated(150, k=k)


@pytest.mark.parametrize("vocab", [1, 2, 7])
def test_the_last_row_of_a_token_wins(vocab):
    """Every token comes many times, in many programs."""
    assert_updated(1000, vocab=vocab, updates=3)


def test_a_full_batch():
    assert_updated(64 * 129, vocab=5000, updates=1)


def test_an_earlier_update_does_not_win():
    """Its claim was of a later row."""
    matrix, claims = int32(np.full((3, 1), -1)), RecycleClaims(3, DEVICE)
    recycle_update(matrix, int32([-1] * 70 + [1]), int32([[n] for n in range(71)]), claims)
    recycle_update(matrix, int32([1, 0]), int32([[500], [600]]), claims)
    assert matrix.tolist() == [[600], [500], [-1]]


def test_updates_of_nothing():
    matrix = int32([[1, 2], [3, 4]])
    for tokens in ([], [-1, -1], [2, 3]):
        recycle_update(matrix, int32(tokens), int32(np.zeros((len(tokens), 2))), RecycleClaims(2, DEVICE))
    assert matrix.tolist() == [[1, 2], [3, 4]]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 300),
    seed=st.integers(0, 1000),
    vocab=st.integers(1, 400),
    k=st.integers(1, 12),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    updates=st.integers(1, 3),
)
def test_fuzz_of_updates(**case):
    assert_updated(**case)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_draft_by_hand(kernel):
    matrix = int32([[1, 2, 3], [4, -1, 9], [0, 3, 5], [-1, 2, 4], [1, 1, 1]])
    parents, ranks = [-1, -1, 0, 0, 1, 2, 3, 0, 7], [0, 2, 0, 1, 1, 2, 0, 2, 0]
    wanted = [
        [1, 3, 4, -1, 2, 1, -1, 9, -1],  # node 3 is unknown and its child 6 missing; token 9 has no row
        [-1, 4, -1, -1, 1, -1, -1, -1, -1],
        [-1] * 9,
        [-1] * 9,
    ]
    if kernel:
        tokens = int32(np.full((4, 9), POISON))
        recycle_draft(matrix, int32([0, 3, -1, 5]), RecycleTemplate(parents, ranks, DEVICE), tokens)
    else:
        tokens = recycle_draft_reference(matrix, int32([0, 3, -1, 5]), parents, ranks)
    assert tokens.tolist() == wanted


@pytest.mark.parametrize("count", [1, 2, 64])
def test_the_published_template(count):
    parents, ranks = published_template()
    assert len(parents) == 80 and max(ranks) == 7
    template = RecycleTemplate(parents, ranks, DEVICE)
    assert (template.ranks >= 0).sum(1).tolist() == [80, 72, 51, 26, 11, 3]  # nodes on each level or below
    roots = np.random.default_rng(count).integers(-1, 52, count).tolist()
    tokens = assert_drafted(roots, parents, ranks, seed=count)
    # The comparison reaches the last level.
    assert count < 64 or (tokens[:, -1] >= 0).any()


@pytest.mark.parametrize("nodes", [1, 2, 31, 32, 33, 64, 65, 127, 128, 129, 300])
def test_templates(nodes):
    rng = np.random.default_rng(nodes)
    assert_drafted([3, -1, 7], *random_template(rng, nodes, 8), seed=nodes)


@pytest.mark.parametrize("nodes", [1, 7, 128])
def test_chains(nodes):
    matrix = int32([[n + 1] for n in range(200)])
    tokens = int32(np.full((2, nodes), POISON))
    recycle_draft(matrix, int32([5, 150]), RecycleTemplate(range(-1, nodes - 1), [0] * nodes, DEVICE), tokens)
    assert tokens[0].tolist() == list(range(6, nodes + 6))
    # Token 200 comes up, but has no row.
    assert tokens[1].tolist() == [n if n <= 200 else -1 for n in range(151, nodes + 151)]


@pytest.mark.parametrize("k", [1, 3, 8, 11])
def test_ranks_of_the_matrix(k):
    assert_drafted([0, 1, 2], *random_template(np.random.default_rng(k), 40, k), k=k)


def test_entries_below_minus_one_are_missing():
    tokens = int32([[POISON, POISON]])
    recycle_draft(int32([[-9], [0]]), int32([0]), RecycleTemplate([-1, 0], [0, 0], DEVICE), tokens)
    assert tokens.tolist() == [[-1, -1]]


def test_no_request():
    """The outputs lie behind nothing that may be written: a view of none of a poisoned row."""
    tokens = int32([[POISON]])
    recycle_draft(int32([[1]]), int32([]), RecycleTemplate([-1], [0], DEVICE), tokens[:0])
    assert tokens.tolist() == [[POISON]]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 5),
    nodes=st.integers(1, 60),
    vocab=st.integers(1, 60),
    k=st.integers(1, 10),
)
def test_fuzz_of_drafts(seed, count, nodes, vocab, k):
    rng = np.random.default_rng(seed)
    roots = rng.integers(-1, vocab + 1, count).tolist()
    assert_drafted(roots, *random_template(rng, nodes, k), seed=seed, vocab=vocab, k=k)


@pytest.mark.parametrize(
    ("parents", "ranks", "message"),
    [
        ([], [], "at least one, got 0 and 0"),
        ([-1, 0], [0], "got 1 and 2"),
        ([-1, 1], [0, 0], "node 1: parent 1 is neither"),
        ([0], [0], "node 0: parent 0 is neither"),
        ([-2], [0], "node 0: parent -2 is neither"),
        ([-1, 0], [0, -1], "node 1: rank -1 is negative"),
    ],
)
def test_what_is_no_template_is_refused(parents, ranks, message):
    for refuse in (check_template, lambda *tree: RecycleTemplate(*tree, DEVICE)):
        with pytest.raises(ValueError, match=message):
            refuse(parents, ranks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": torch.zeros(4, 2)}, "matrix must be torch.int32"),
        ({"matrix": torch.zeros(2, 4, dtype=torch.int32).T}, "matrix must be contiguous"),
        ({"matrix": torch.zeros(5, 2, dtype=torch.int32)}, r"claims.latest must be \[5\]"),
        ({"matrix": torch.zeros(4, 3, dtype=torch.int32)}, r"ids must be \[3, 3\]"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, "tokens must be torch.int32"),
        ({"tokens": torch.zeros(2, dtype=torch.int32)}, r"ids must be \[2, 2\]"),
        ({"tokens": torch.zeros(3, dtype=torch.int32, device="meta")}, "tokens must be on"),
        ({"ids": torch.zeros(3, 2)}, "ids must be torch.int32 or torch.int64"),
        ({"ids": torch.zeros(3, 4, dtype=torch.int32, device=DEVICE)[:, ::2]}, "ids must be contiguous"),
    ],
)
def test_bad_updates_are_refused(change, message):
    good = {"matrix": torch.zeros(4, 2, dtype=torch.int32), "tokens": torch.zeros(3, dtype=torch.int32)}
    args = {**good, "ids": torch.zeros(3, 2, dtype=torch.int32), **change}
    args = {name: tensor if tensor.is_meta else tensor.to(DEVICE) for name, tensor in args.items()}
    with pytest.raises(ValueError, match=message):
        recycle_update(**args, claims=RecycleClaims(4, DEVICE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": torch.zeros(4, 2)}, "matrix must be torch.int32"),
        ({"matrix": torch.zeros(2, 4, dtype=torch.int32).T}, "matrix must be contiguous"),
        ({"matrix": torch.zeros(4, 1, dtype=torch.int32)}, "matrix must have at least 2 columns"),
        ({"last_tokens": torch.zeros(3, dtype=torch.int64)}, "last_tokens must be torch.int32"),
        ({"last_tokens": torch.zeros(2, dtype=torch.int32)}, r"tokens must be \[2, 4\]"),
        ({"tokens": torch.zeros(3, 5, dtype=torch.int32)}, r"tokens must be \[3, 4\]"),
        ({"tokens": torch.zeros(3, 8, dtype=torch.int32, device=DEVICE)[:, ::2]}, "tokens must be contiguous"),
        ({"tokens": torch.zeros(3, 4, dtype=torch.int32, device="meta")}, "tokens must be on"),
    ],
)
def test_bad_drafts_are_refused(change, message):
    good = {"matrix": torch.zeros(4, 2, dtype=torch.int32), "last_tokens": torch.zeros(3, dtype=torch.int32)}
    args = {**good, "tokens": torch.zeros(3, 4, dtype=torch.int32), **change}
    args = {name: tensor if tensor.is_meta else tensor.to(DEVICE) for name, tensor in args.items()}
    with pytest.raises(ValueError, match=message):
        recycle_draft(**args, template=RecycleTemplate([-1, 0, 0, 1], [0, 0, 1, 1], DEVICE))


def test_the_definition_refuses_ranks_that_the_matrix_has_not():
    with pytest.raises(ValueError, match="rank 2, the matrix only 2"):
        recycle_draft_reference(int32([[0, 0]]), int32([0]), [-1], [2])


def random_shape(rng: np.random.Generator, nodes: int, k: int) -> list[Node]:
    """Copied tokens and guesses in any order that is a tree's; some ranks are beyond what a matrix has."""
    found = [Node(0, ())]
    while len(found) <= nodes:
        copies, ranks = found[int(rng.integers(0, len(found)))]
        copied = not ranks and rng.random() < 0.4
        node = Node(copies + 1, ()) if copied else Node(copies, (*ranks, int(rng.integers(0, k + 1))))
        if node not in found:
            found.append(node)
    return found[1:]


def assert_shaped(matrix, roots, copied, shapes, which, slots, dtype=torch.int64) -> torch.Tensor:
    """The kernel's tokens are the definition's; every request's parents are in its slot, nothing else is written."""
    nodes, count = len(shapes[0]), len(roots)
    tokens, trees = int32(np.full((count + 1, nodes), POISON)), int32(np.full((9, nodes), POISON))
    on_device = (int32(which), tokens[:-1], torch.tensor(slots, dtype=dtype, device=DEVICE), trees)
    shaped_draft(matrix, int32(roots), copied, RecycleShapes(shapes, DEVICE), *on_device)
    wanted = shaped_draft_reference(matrix, int32(roots), copied, [shapes[w] for w in which])
    assert torch.equal(tokens[:-1], wanted) and (tokens[-1] == POISON).all()
    others = set(range(9)) - set(slots)
    assert all((trees[slot] == POISON).all() for slot in others)
    assert [trees[slot].tolist() for slot in slots] == [shape_parents(shapes[w]) for w in which]
    return tokens[:-1]


def test_a_shaped_draft_by_hand():
    """Guesses beside a copied token are those other than it, and hang on copied tokens too."""
    matrix = int32([[1, 2, 3], [2, 0, 3], [3, 1, 0], [0, 1, 2]])
    shape = [Node(1, ()), Node(0, (0,)), Node(0, (1,)), Node(2, ()), Node(1, (0,)), Node(0, (1, 0)), Node(0, (2,))]
    assert shape_parents(shape) == [0, 0, 0, 1, 1, 3, 0]
    copied = int32([[2, 1], [-1, -1], [2, -1]])
    found = assert_shaped(matrix, [0, 0, 0], copied, [shape], [0, 0, 0], [4, 0, 8], torch.int32)
    assert found[0].tolist() == [2, 1, 3, 1, 3, 0, -1], "0 is followed by 1 and 3 beside the 2 that is copied"
    assert found[1].tolist() == [-1, 1, 2, -1, -1, 3, 3], "nothing is copied"
    assert found[2].tolist() == [2, 1, 3, -1, 3, 0, -1]


def test_a_guess_may_be_the_copied_tokens_place():
    """The copied token is last, first, or not among the guesses."""
    matrix, shape = int32([[1, 2, 3], [0, 0, 0], [0, 0, 0], [0, 0, 0]]), [Node(0, (0,)), Node(0, (1,)), Node(0, (2,))]
    for token, wanted in ((3, [1, 2, -1]), (1, [2, 3, -1]), (0, [1, 2, 3])):
        assert assert_shaped(matrix, [0], int32([[token]]), [shape], [0], [1]).tolist() == [wanted]


@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("nodes", [1, 15, 31, 64, 128])
def test_shapes_of_any_size(nodes, count):
    rng = np.random.default_rng(nodes)
    shapes = [random_shape(rng, nodes, 8) for _ in range(4)]
    matrix, copied = random_matrix(rng, 60, 8), int32(rng.integers(-1, 60, (count, nodes)))
    roots, which = rng.integers(-1, 61, count).tolist(), rng.integers(0, 4, count).tolist()
    tokens, trees = int32(np.full((count, nodes), POISON)), int32(np.full((count, nodes), POISON))
    slots = torch.arange(count, device=DEVICE).flip(0)
    shaped_draft(matrix, int32(roots), copied, RecycleShapes(shapes, DEVICE), int32(which), tokens, slots, trees)
    assert torch.equal(tokens, shaped_draft_reference(matrix, int32(roots), copied, [shapes[w] for w in which]))
    assert trees.flip(0).tolist() == [shape_parents(shapes[w]) for w in which]


def test_without_a_matrix_tokens_are_copied():
    shape = [Node(1, ()), Node(2, ()), Node(3, ())]
    matrix = torch.zeros(0, 8, dtype=torch.int32, device=DEVICE)
    assert assert_shaped(matrix, [5], int32([[7, 9]]), [shape], [0], [2]).tolist() == [[7, 9, -1]]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5), nodes=st.integers(1, 40), k=st.integers(1, 9))
def test_fuzz_of_shapes(seed, count, nodes, k):
    rng = np.random.default_rng(seed)
    vocab, width = int(rng.integers(1, 12)), int(rng.integers(1, 12))
    shapes = [random_shape(rng, nodes, k) for _ in range(3)]
    copied = int32(rng.integers(-1, vocab + 1, (count, width)))
    roots, which = rng.integers(-1, vocab + 1, count).tolist(), rng.integers(0, 3, count).tolist()
    assert_shaped(random_matrix(rng, vocab, k), roots, copied, shapes, which, rng.permutation(9)[:count].tolist())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "same number of nodes"),
        ([[Node(1, ())], [Node(1, ()), Node(2, ())]], "same number of nodes"),
        ([[]], "at least one node"),
        ([[Node(0, ())]], "node 0: .* is the root"),
        ([[Node(1, ()), Node(1, ())]], "node 1: .* there already"),
        ([[Node(2, ())]], "node 0: .* before its parent Node"),
        ([[Node(0, (0, 0))]], "node 0: .* before its parent"),
        ([[Node(0, (-1,))]], "node 0: .* negative"),
    ],
)
def test_what_is_no_shape_is_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        RecycleShapes(shapes, DEVICE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": torch.zeros(4, 2)}, "matrix must be torch.int32"),
        ({"copied": torch.zeros(3, 0, dtype=torch.int32)}, "copied must have at least one column"),
        ({"copied": torch.zeros(2, 2, dtype=torch.int32)}, r"copied must be \[3, any\]"),
        ({"which": torch.zeros(3, dtype=torch.int64)}, "which must be torch.int32"),
        ({"tokens": torch.zeros(3, 3, dtype=torch.int32)}, r"tokens must be \[3, 2\]"),
        ({"slots": torch.zeros(2, dtype=torch.int64)}, r"slots must be \[3\]"),
        ({"trees": torch.zeros(8, 3, dtype=torch.int32)}, r"trees must be \[any, 2\]"),
    ],
)
def test_bad_shaped_drafts_are_refused(change, message):
    good = {
        "matrix": torch.zeros(4, 2, dtype=torch.int32),
        "last_tokens": torch.zeros(3, dtype=torch.int32),
        "copied": torch.zeros(3, 2, dtype=torch.int32),
        "which": torch.zeros(3, dtype=torch.int32),
        "tokens": torch.zeros(3, 2, dtype=torch.int32),
        "slots": torch.zeros(3, dtype=torch.int64),
        "trees": torch.zeros(8, 2, dtype=torch.int32),
    }
    args = {name: tensor.to(DEVICE) for name, tensor in {**good, **change}.items()}
    with pytest.raises(ValueError, match=message):
        shaped_draft(**args, shapes=RecycleShapes([[Node(1, ()), Node(2, ())]], DEVICE))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_in_a_cuda_graph():
    """Captured updates and drafts follow what their inputs hold when they are replayed."""
    rng = np.random.default_rng(0)
    parents, ranks = published_template()
    matrix, claims, template = (
        random_matrix(rng, 50, 8),
        RecycleClaims(50, DEVICE),
        RecycleTemplate(parents, ranks, DEVICE),
    )
    tokens, ids, roots = int32(np.zeros(200)), int32(np.zeros((200, 8))), int32([1, 2, -1])
    drafts = int32(np.zeros((3, 80)))

    def step() -> None:
        recycle_update(matrix, tokens, ids, claims)
        recycle_draft(matrix, roots, template, drafts)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        tokens.copy_(torch.from_numpy(rng.integers(-1, 51, 200)))
        ids.copy_(torch.from_numpy(rng.integers(-1, 52, (200, 8))))
        wanted = matrix.clone()
        recycle_update_reference(wanted, tokens, ids)
        graph.replay()
        assert torch.equal(matrix, wanted)
        assert torch.equal(drafts, recycle_draft_reference(wanted, roots, parents, ranks))


def test_work():
    assert update_work(100, 60, 8).bytes == 400 + 60 * 64
    assert draft_work(64, 80).bytes == 64 * 644
