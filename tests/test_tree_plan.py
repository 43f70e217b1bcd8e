"""A step's trees without an engine: which rows branch, where they stand, what moves; and checks of drafted forests."""

from __future__ import annotations

import numpy as np
import pytest
from vllm_specplug.proposers.base import DraftForest

from vllm_specplug.host import forests, tree_plan

VOCAB = 50


def ints(*values):
    return np.array(values, np.int32)


def forest(drafts):
    """``[(tokens, parents), ...]`` as a forest."""
    tokens = ints(*(t for tokens, _ in drafts for t in tokens))
    parents = ints(*(p for _, parents in drafts for p in parents))
    offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens, _ in drafts])]).astype(np.int32)
    return DraftForest(tokens, parents, np.ones(len(tokens), np.float32), np.zeros(len(tokens), np.int8), offsets)


def read(drafts, limit=16, branching=None, **changes):
    n = len(drafts)
    made = forest(drafts)
    if changes:
        made = DraftForest(**({k: getattr(made, k) for k in DraftForest.__slots__} | changes))
    allowed = np.ones(n, bool) if branching is None else np.array(branching)
    return forests.read_forest(made, np.full(n, limit, np.int32), allowed, VOCAB)


TREE = ([5, 6, 7, 8], [-1, 0, 0, -1])
CHAIN = ([1, 2, 3], [-1, 0, 1])


def test_trees_are_kept_and_chains_are_not():
    drafts, trees = read([CHAIN, TREE, ([], []), ([9], [-1])])
    assert drafts == [[1, 2, 3], [5, 6, 7, 8], [], [9]]
    assert [t is not None for t in trees] == [False, True, False, False]
    assert (trees[1].tokens, trees[1].parents.tolist(), trees[1].chain) == ([5, 6, 7, 8], [-1, 0, 0, -1], 2)
    assert read([([], [])]) == ([[]], [None])


@pytest.mark.parametrize(
    ("draft", "words"),
    [
        (([5, VOCAB], [-1, 0]), "vocabulary"),
        (([-1, 5], [-1, 0]), "vocabulary"),
        (([5, 6], [-1, 1]), "parent"),
        (([5, 6], [0, 0]), "parent"),
        (([5, 6], [-1, -2]), "parent"),
        (([5, 5], [-1, -1]), "siblings"),
        (([4, 5, 6, 6], [-1, 0, 1, 1]), "siblings"),
        (([4, 5, 6, 7, 5], [-1, 0, 1, -1, 0]), "siblings"),
    ],
)
def test_malformed_drafts_are_refused(draft, words):
    for drafts in ([draft], [CHAIN, TREE, draft], [draft, TREE]):
        with pytest.raises(ValueError, match=words):
            read(drafts)
    read([([4, 5, 6, 7, 5], [-1, 0, 1, -1, 3])])  # the same token below another parent is none of that


def test_limits_and_shapes_are_checked():
    with pytest.raises(ValueError, match="exceed"):
        read([TREE], limit=3)
    with pytest.raises(ValueError, match="does not fit"):
        read([TREE], parents=ints(-1, 0))
    with pytest.raises(ValueError, match="does not fit"):
        read([TREE], offsets=ints(0, 3))
    with pytest.raises(ValueError, match="does not fit"):
        read([TREE], offsets=ints(0, 2, 4))
    with pytest.raises(ValueError, match="exceed"):
        read([TREE, CHAIN], offsets=ints(0, 8, 7))


def test_trees_only_where_they_are_allowed():
    read([CHAIN, TREE], branching=[False, True])
    with pytest.raises(ValueError, match="chain"):
        read([TREE, CHAIN], branching=[False, True])


def test_forests_agree_with_the_interfaces_own_check():
    """Random, mostly broken forests: refused by the fast check exactly where the slow one refuses them."""
    draw = np.random.default_rng(0)
    sound = 0
    for _ in range(2000):
        drafts = []
        for size in draw.integers(0, 6, size=int(draw.integers(1, 4))):
            parents = [int(draw.integers(-1, max(j, 1) + (draw.random() < 0.05))) for j in range(size)]
            drafts.append((draw.integers(0, 8, size=size).tolist(), parents))
        limits = np.full(len(drafts), 5, np.int32)
        try:
            forest(drafts).check_integrity(limits)
            expected = True
        except ValueError:
            expected = False
        try:
            forests.read_forest(forest(drafts), limits, np.ones(len(drafts), bool), VOCAB)
            found = True
        except ValueError:
            found = False
        assert found == expected, drafts
        sound += found
    assert 400 < sound < 1900


def kept(tokens, parents):
    return read([(tokens, parents)])[1][0]


def test_scheduled_drafts_that_are_the_start_of_the_kept_tree():
    trees = {"a": kept(*TREE), "b": kept(*TREE), "gone": kept(*TREE)}
    row_of = {"x": 0, "a": 1, "b": 2}

    def parents(scheduled, extra=(0, 0, 0)):
        sizes = ints(*(len(scheduled.get(i, ())) + 1 for i in row_of))
        found = tree_plan.row_parents_of(trees, scheduled, row_of, sizes + ints(*extra), sizes)
        return None if found is None else found.tolist()

    whole = [5, 6, 7, 8]
    assert parents({"a": whole, "b": whole, "x": [1, 2]}) == [-1, 0, 1, *(-1, 0, 1, 1, 0), *(-1, 0, 1, 1, 0)]
    assert parents({"a": whole[:3]}) == [-1, *(-1, 0, 1, 1), -1]
    assert parents({"a": whole, "b": [5, 6, 7, 9]}) == [-1, *(-1, 0, 1, 1, 0), *(-1, 0, 1, 2, 3)]
    assert parents({"a": whole, "b": whole}, extra=(0, 0, 2)) == [-1, *(-1, 0, 1, 1, 0), *(-1, 0, 1, 2, 3)]
    for chains in ({"a": [5, 6]}, {"a": [6, 5, 7]}, {"x": whole}, {}, {"a": [*whole, 1]}):
        assert parents(chains) is None


def test_random_plans():
    """Against a row-by-row account of positions, visibility and moves."""
    draw = np.random.default_rng(1)
    branching = 0
    for _ in range(300):
        n = int(draw.integers(1, 6))
        sizes = draw.integers(1, 9, size=n).astype(np.int32)
        lead = draw.integers(0, 3, size=n)  # rows of a prefill chunk before the verified ones
        lead[sizes > 1] = 0
        ends = np.cumsum(sizes + lead).astype(np.int32)
        computed = draw.integers(0, 300, size=n).astype(np.int32)
        parents = [
            [-1, *(int(draw.integers(0, m)) if draw.random() < 0.3 else m - 1 for m in range(1, s))] for s in sizes
        ]
        flat = ints(*(p for row in parents for p in row))
        positions = np.full(ends[-1], -7, np.int64)
        plan = tree_plan.make_plan(flat, sizes, ends, computed)
        trees = [i for i in range(n) if parents[i] != list(range(-1, sizes[i] - 1))]
        if not trees:
            assert plan is None
            continue
        branching += 1
        assert plan.trees.requests.tolist() == trees
        assert plan.only_trees == (len(trees) == n)
        assert plan.num_rows == ends[-1]
        expected = np.full(ends[-1], -7, np.int64)
        paths = np.full((n, int(sizes.max())), -1, np.int32)
        lengths = np.ones(n, np.int32)
        sources, targets, accepted, base = [], [], 0, 0
        for i in range(n):
            row, path = int(draw.integers(sizes[i])), []
            while row >= 0:
                path.insert(0, row)
                row = parents[i][row]
            paths[i, : len(path)] = path
            lengths[i] = len(path)
            if i not in trees:
                continue
            start = int(ends[i] - sizes[i])
            for m in range(sizes[i]):
                line, up = [], m
                while up >= 0:
                    line.append(up)
                    up = parents[i][up]
                expected[start + m] = computed[i] + len(line) - 1
                assert np.flatnonzero(plan.trees.visible.numpy()[base + m]).tolist() == sorted(line)
            base += int(sizes[i])
            accepted += len(path) - 1
            sources += [start + r for k, r in enumerate(path) if r != k]
            targets += [start + k for k, r in enumerate(path) if r != k]
        tree_plan.place(plan, positions)
        assert positions.tolist() == expected.tolist()
        found = tree_plan.accepted_moves(plan, paths, lengths)
        assert (found[0].tolist(), found[1].tolist(), found[2]) == (sources, targets, accepted)
        assert all(t < s for s, t in zip(sources, targets, strict=True))
    assert branching > 150


def test_rows_of_some_requests_are_gathered():
    """Three requests with 2, 0 and 1 draft tokens, of which the middle one is part of the way through its prompt."""
    verified, index = np.array([2, 0, 1], np.int32), np.array([0, 2], np.int32)
    drafted, roots = np.array([11, 12, 31], np.int64), np.array([10, 30], np.int32)
    tree = np.array([-1, 0, 0, -1, -1, 0], np.int32)
    for parents, first in ((tree, [-1, 0, 0]), (None, [-1, 0, 1])):
        tokens, offsets, own, rows = tree_plan.gather_rows(verified, index, drafted, roots, parents)
        assert tokens.tolist() == [10, 11, 12, 30, 31]
        assert offsets.tolist() == [0, 3, 5]
        assert own.tolist() == [*first, -1, 0]
        assert rows.tolist() == [0, 1, 2, 4, 5]
