"""Attention over chosen units of a long context on the CPU: summaries of keys, and the choice per layer and KV head.

Beside `tree_attention_cpu`, for the same caches: ``sums = UnitSummaries(caches, selection)`` once per engine;
``sums.update(...)`` once per request and step, before the pass; ``chosen = prepare_choice(...)`` once per step; then
per layer ``tree_attention_cpu(..., step, chosen.layer(index, anchor))``, which ranks the units where the layer is an
anchor and reuses the last anchor's ranking where it is not. `block_select` is the definition of what is chosen.

Summaries belong to a request, not to a block of the cache: a unit is summarised once, from the cache itself, when the
first step needs it, and only if every slot of it is accepted. So they need no knowledge of how blocks were filled
(prefix cache, chunks of a prompt, moved rows of trees); a request that was preempted, or whose blocks changed, begins
anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from vllm_specplug.kernels import lanes
from vllm_specplug.kernels.attention_tiles import (
    CHOSEN,
    CHOSEN_HEAD,
    CHOSEN_TREE,
    HEAD_SIZE,
    HEADS,
    KV_HEADS,
    QUERY,
    QUERY_HEAD,
    QUERY_ROW,
    SCALE,
    SIZES,
    STARTS,
    TAILS,
    TREES,
    UNIT,
)
from vllm_specplug.kernels.block_select import Selection, attended_share, attended_units, summarise
from vllm_specplug.kernels.kv_cache_cpu import Caches, Int32Array
from vllm_specplug.kernels.lanes import LANES
from vllm_specplug.kernels.memory import kernel, load
from vllm_specplug.kernels.products import multiply
from vllm_specplug.kernels.tree_attention_cpu import _KINDS, PreparedStep
from vllm_specplug.kernels.unit_book import UnitBook

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

# Units that a request's summaries have room for at first.
FIRST_CAPACITY = 64


class UnitSummaries:
    """Summaries of the units of all live requests, for layers that share a layout and a block table.

    Attributes:
        selection: how units are chosen.
        book: which units of which request there are.
    """

    def __init__(self, caches: Caches, selection: Selection) -> None:
        """
        Raises:
            ValueError: the unit does not divide the block size, or is no multiple of 16; layers differ in KV heads.
        """
        layout = caches.layout
        self.book = UnitBook(selection.unit, layout.block_size)
        if len(set(caches.layers[:, 6].tolist())) != 1:
            raise ValueError("the layers have different numbers of KV heads")
        self.selection = selection
        self._caches = caches
        self._parts = 1 if selection.summary == "mean" else 2
        # float32[L, kv_heads, parts, head_size, capacity] by request; parts as `block_select.summarise` orders them.
        self._values: dict[str, Float32Array] = {}
        self._scratch = np.zeros(layout.head_size * (layout.block_size + LANES) + LANES, np.float32)

    @property
    def bytes(self) -> int:
        """Memory of all summaries."""
        return sum(values.nbytes for values in self._values.values())

    def __len__(self) -> int:
        return len(self._values)

    def drop(self, requests: Iterable[str]) -> None:
        """Forget requests that ended or were preempted; unknown ones are ignored."""
        for request in requests:
            self.book.drop([request])
            self._values.pop(request, None)

    def rewind(self, request: str, tokens: int) -> None:
        """The cache holds something else from token ``tokens`` of a request on: a rollback, or an exact refresh."""
        self.book.rewind(request, tokens)

    def update(self, request: str, blocks: Int32Array, context: int) -> Float32Array:
        """Summarise what is new.

        Args:
            blocks: ``int32[n]`` the request's row of the block table, at least up to its ``context``.
            context: tokens in the cache that are accepted.

        Returns:
            ``float32[L, kv_heads, parts, head_size, capacity]``; units from the tail on are undefined.
        """
        layout, unit = self._caches.layout, self.selection.unit
        begin, end = self.book.update(request, blocks, self.selection, context)
        kept = self._values.get(request)
        capacity = FIRST_CAPACITY if kept is None else kept.shape[-1]
        while capacity < end:
            capacity *= 2
        if kept is None or capacity > kept.shape[-1]:
            shape = (len(self._caches.layers), int(self._caches.layers[0, 6]), self._parts, layout.head_size, capacity)
            values = self._values[request] = np.zeros(shape, np.float32)
            if kept is not None:
                values[..., :begin] = kept[..., :begin]
        values = self._values[request]
        if end > begin:
            _summarise(
                _KINDS[layout.dtype],
                self._caches.layers,
                np.array(layout.words, np.int64),
                blocks,
                values,
                begin,
                end,
                unit,
                self.selection.summary == "halfway",
                self._scratch,
            )
        return values

    def check(self, layers: range | None = None) -> None:
        """Recompute the summaries of some layers from the cache, or of all.

        Raises:
            AssertionError: one is not what its keys say.
        """
        layout, unit = self._caches.layout, self.selection.unit
        offsets = torch.from_numpy(layout.keys.astype(np.int64))
        for request, entry in self.book.items():
            slots, values = entry.units * unit, self._values[request]
            blocks = torch.from_numpy(entry.blocks[: -(-slots // layout.block_size)].astype(np.int64))
            for layer in range(len(self._caches.pairs)) if layers is None else layers:
                if not entry.units:
                    continue
                cache = self._caches.pairs[layer][0]
                keys = cache[blocks].reshape(len(blocks), cache.shape[1], -1)[:, :, offsets]
                units = keys.transpose(0, 1).flatten(1, 2)[:, :slots].unflatten(1, (entry.units, unit))
                found = summarise(units, self.selection.summary)
                kept = torch.from_numpy(values[layer, :, :, :, : entry.units]).permute(0, 3, 1, 2)
                wrong = ~torch.isclose(found, kept, atol=1e-5, rtol=1e-5).all(-1).all(-1).all(0)
                if wrong.any():
                    at = int(wrong.int().argmax())
                    raise AssertionError(f"request {request}, layer {layer}, unit {at}: its summary is wrong")


@kernel
def _summarise(kind, layers, words, blocks, values, begin, end, unit, halfway, scratch):  # type: ignore[no-untyped-def]
    """Fill the units from ``begin`` to ``end`` of a request's summaries; ``words``: see `CacheLayout.words`."""
    head_size, block_size, element = words[0], words[1], words[2]
    in_place, key_table, key_run, stride = words[3], words[5], words[7], words[9]
    pitch = block_size * element if in_place else stride
    per_block = block_size // unit
    vectors = unit // LANES
    parts = values.shape[2]
    for layer in range(len(layers)):
        for head in range(values.shape[1]):
            base = layers[layer, 0] + head * layers[layer, 3]
            for at in range(begin, end):
                keys = base + blocks[at // per_block] * layers[layer, 2]
                if not in_place:
                    if at == begin or at % per_block == 0:
                        every = head_size * (stride // element) // LANES
                        lanes.row_gather(kind, keys, key_table, scratch.ctypes.data, every, key_run)
                    keys = np.int64(scratch.ctypes.data)
                keys += at % per_block * unit * element
                for d in range(head_size):
                    row = keys + d * pitch
                    if parts == 1:
                        values[layer, head, 0, d, at] = lanes.row_sum(kind, row, vectors) / np.float32(unit)
                        continue
                    largest, smallest = lanes.row_largest(kind, row, vectors), lanes.row_smallest(kind, row, vectors)
                    if halfway:
                        mean = lanes.row_sum(kind, row, vectors) / np.float32(unit)
                        largest = (largest + mean) * np.float32(0.5)
                        smallest = (smallest + mean) * np.float32(0.5)
                    values[layer, head, 0, d, at] = largest
                    values[layer, head, 1, d, at] = smallest


@dataclass(slots=True, eq=False)
class Choice:
    """What one step's trees attend. Keeps the arrays that it names alive.

    Attributes:
        chosen: ``int32[trees, kv_heads, 1 + most]``, see `attention_tiles.CHOSEN`; of the layer that chose last.
        counts: ``int32[L, trees, kv_heads]`` units to choose; -1 in the trees that attend everything.
        units: ``int32[trees]`` units before the tail.
        dense: ``bool[L]`` layers that attend everything in all trees.
    """

    step: PreparedStep
    selection: Selection
    chosen: Int32Array
    counts: Int32Array
    units: Int32Array
    dense: npt.NDArray[np.bool_]
    tails: Int32Array
    entries: tuple[Float32Array | None, ...]
    places: Int64Array
    scratch: Float32Array

    def layer(self, index: int, anchor: bool) -> Callable[[int], None]:
        """What `tree_attention_cpu` calls before it attends layer ``index``: an anchor chooses, others take over."""
        call = self.step.call
        if self.dense[index]:
            call[CHOSEN] = 0
            return _nothing
        call[CHOSEN] = self.chosen.ctypes.data
        if not anchor:
            return _nothing

        def choose(address: int) -> None:
            selection = self.selection
            first = -(-selection.first // selection.unit)
            parts = 1 if selection.summary == "mean" else 2
            _choose(
                _KINDS[self.step.layout.dtype],
                address,
                index,
                self.places,
                self.units,
                self.counts[index],
                self.chosen,
                self.scratch,
                parts,
                first,
                selection.by_head,
                selection.all_rows,
            )

        return choose

    def attended(self) -> float:
        """Share of the units before the tails that are attended, over all layers and KV heads."""
        return attended_share(self.counts, self.units)


def _nothing(address: int) -> None:
    pass


def prepare_choice(
    step: PreparedStep, selection: Selection, entries: Sequence[Float32Array | None], shares: Sequence[Float32Array]
) -> Choice:
    """Prepare the choice of units for a step.

    Args:
        step: prepared by `prepare_step`; its description is told where the choice will be.
        entries: summaries of each tree's request, updated to its context; None: the tree attends everything.
        shares: per tree, ``float32[L, kv_heads]`` budget of each layer and KV head, relative to the selection's.
    """
    block_size = step.layout.block_size
    contexts = step.trees.contexts.numpy()
    trees, (layers, kv_heads) = len(contexts), shares[0].shape
    tails, units = np.zeros(trees, np.int32), np.zeros(trees, np.int32)
    counts = np.full((layers, trees, kv_heads), -1, np.int32)
    places = np.zeros((trees, 2), np.int64)
    for i, values in enumerate(entries):
        if values is None:
            continue
        context = int(contexts[i])
        tails[i] = selection.tail_block(context, block_size)
        units[i] = int(tails[i]) * block_size // selection.unit
        places[i] = values.ctypes.data, values.shape[-1]
        counts[:, i] = selection.counts(context, block_size, shares[i])
    dense = (attended_units(counts, units) == units[:, None]).all((1, 2))
    most = int(units.max(initial=0))
    chosen = np.full((trees, kv_heads, 1 + most), -1, np.int32)
    parts = 1 if selection.summary == "mean" else 2
    width = -(-most // LANES) * LANES
    # Packed queries of a group, their scores, the votes, and a copy of one head's to find the threshold in.
    queries = _MOST_GROUP
    scratch = np.zeros(queries * (parts + 1) * step.layout.head_size + (queries + kv_heads + 1) * width, np.float32)
    step.call[CHOSEN_TREE], step.call[CHOSEN_HEAD] = chosen.strides[0], chosen.strides[1]
    step.call[TAILS], step.call[UNIT] = tails.ctypes.data, selection.unit
    return Choice(step, selection, chosen, counts, units, dense, tails, tuple(entries), places, scratch)


# Query heads per KV head that the scratch has room for.
_MOST_GROUP = 128


@kernel
def _nth_largest(values, size, n):  # type: ignore[no-untyped-def]
    """The ``n``-th largest (from 1) of the float32 at ``values``, which are reordered; quickselect."""
    low, high, k = 0, size - 1, n - 1
    while low < high:
        pivot = lanes.load_number(values, (low + high) // 2)
        i, j = low, high
        while i <= j:
            while lanes.load_number(values, i) > pivot:
                i += 1
            while lanes.load_number(values, j) < pivot:
                j -= 1
            if i <= j:
                kept = lanes.load_number(values, i)
                lanes.store_number(values, i, lanes.load_number(values, j))
                lanes.store_number(values, j, kept)
                i += 1
                j -= 1
        if k <= j:
            high = j
        elif k >= i:
            low = i
        else:
            break
    return lanes.load_number(values, k)


@kernel
def _choose(  # type: ignore[no-untyped-def]
    kind, call, layer, places, units, counts, chosen, scratch, parts, first, by_head, all_rows
):  # fmt: skip
    """Fill ``chosen`` for one layer, as `block_select.votes_reference` and `choose_reference` define it."""
    floats = np.float32(0)
    scale = lanes.load_number(call, 2 * SCALE)
    head_size = lanes.load_wide(call, HEAD_SIZE)
    kv_heads = lanes.load_wide(call, KV_HEADS)
    group = lanes.load_wide(call, HEADS) // kv_heads
    query_row = lanes.load_wide(call, QUERY_ROW)
    query_head = lanes.load_wide(call, QUERY_HEAD)
    starts = lanes.load_wide(call, STARTS)
    sizes = lanes.load_wide(call, SIZES)
    vectors = head_size // LANES
    depth = parts * head_size
    for tree in range(lanes.load_wide(call, TREES)):
        size = units[tree]
        if counts[tree, 0] < 0:
            for head in range(kv_heads):
                chosen[tree, head, 0] = -1
            continue
        columns = (size + LANES - 1) // LANES
        raw = np.int64(scratch.ctypes.data)
        packed = raw + group * head_size * 4
        scores = packed + group * depth * 4
        row_bytes = columns * LANES * 4
        votes = scores + group * row_bytes
        copied = votes + kv_heads * row_bytes
        lists = kv_heads if by_head else 1
        for i in range(lists * columns * LANES):
            lanes.store_number(votes, i, np.float32(0))
        rows = load(sizes, tree) if all_rows else 1
        share = np.float32(1) / np.float32(group * (kv_heads // lists))
        capacity = places[tree, 1]
        for head in range(kv_heads):
            table = places[tree, 0] + ((layer * kv_heads + head) * depth * capacity) * 4
            into = votes + (head * row_bytes if by_head else 0)
            source = lanes.load_wide(call, QUERY) + load(starts, tree) * query_row
            for g in range(group):
                at = raw + g * head_size * 4
                target = packed + g * depth * 4
                mine = source + (head * group + g) * query_head
                lanes.row_copy(kind, mine, floats, at, vectors, scale / np.float32(rows))
                for r in range(1, rows):
                    lanes.row_copy(kind, mine + r * query_row, floats, target, vectors, np.float32(1))
                    lanes.row_add(target, at, vectors, scale / np.float32(rows))
                if parts == 1:
                    lanes.row_copy(floats, at, floats, target, vectors, np.float32(1))
                else:
                    lanes.row_signs(at, target, target + head_size * 4, vectors)
            multiply(
                floats, packed, depth * 4, table, capacity * 4, np.int64(4),
                scores, row_bytes, group, columns, depth, 0,
            )  # fmt: skip
            for g in range(group):
                line = scores + g * row_bytes
                for u in range(size, columns * LANES):
                    lanes.store_number(line, u, np.float32(-np.inf))
                largest = lanes.row_largest(floats, line, columns)
                total = lanes.row_weights(floats, line, columns, np.float32(1), largest)
                lanes.row_add(line, into, columns, share / total)
        for head in range(kv_heads):
            value = votes + (head * row_bytes if by_head else 0)
            if by_head or head == 0:
                for u in range(min(first, size)):
                    lanes.store_number(value, u, np.float32(np.inf))
            count = counts[tree, head]
            chosen[tree, head, 0] = count
            if count == 0:
                continue
            lanes.row_copy(floats, value, floats, copied, columns, np.float32(1))
            least = _nth_largest(copied, size, count)
            above = 0
            for u in range(size):
                above += lanes.load_number(value, u) > least
            ties = count - above
            at = 1
            for u in range(size):
                number = lanes.load_number(value, u)
                if number > least or (number == least and ties > 0):
                    if number == least:
                        ties -= 1
                    chosen[tree, head, at] = u
                    at += 1
