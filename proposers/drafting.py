"""The machinery all proposers of this package share: per-request state, learning, and drafting for a batch.

A proposer built on :class:`Drafter` says which sources it draws on (:class:`Sources`) and how much it drafts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from vllm_specplug.options import option

from .base import DraftForest, Float32Array, Int32Array, Proposer, Request, StepResult
from .batch_steps import (
    REWALK,
    all_live,
    hang_together,
    observe_batch,
    propose_batch,
    recycle_batch,
    rewalk,
    sound,
)
from .mixture import MAX_CANDIDATES, new_mixture, new_scratch, restored_mixture
from .output_store import OutputStores
from .recycling_table import WIDTH, RecyclingTable
from .saved_state import Array, State, join, part
from .suffix_automaton import SuffixAutomaton, has_room
from .tree_growth import MAX_DRAFT, Slots, cut, new_forest, new_nodes

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sources:
    """What a drafter draws on.

    Attributes:
        context: the request's own prompt and output.
        siblings: samples of one prompt (``n > 1``) draw on each other's output as on their own.
        store_bytes: earlier outputs of the namespace; 0: not.
        table_bytes: the target's own second guesses (see :mod:`.recycling_table`); 0: not.
        orders: longest key of the table, 1 to 3 tokens.
        width: entries per key, 1 to 8.
        anywhere: the table also knows what is likely after anything.
    """

    context: bool = True
    siblings: bool = True
    store_bytes: int = 0
    table_bytes: int = 0
    orders: int = 3
    width: int = WIDTH
    anywhere: bool = True


@dataclass(frozen=True)
class TextOptions:
    """Options of proposers that draft from text."""

    context: bool = option(True, "draft from the request's own prompt and output")
    siblings: bool = option(True, "samples of one prompt (n > 1) draft from each other's output")
    store: bool = option(True, "draft from outputs of earlier requests of the same namespace")
    store_bytes: int = option(256 << 20, "memory for earlier outputs, all namespaces together", low=1 << 20)

    def sources(self) -> dict[str, Any]:
        """As arguments of :class:`Sources`."""
        store_bytes = self.store_bytes if self.store else 0
        return {"context": self.context, "siblings": self.siblings, "store_bytes": store_bytes}


class _Group:
    """Requests that are samples of one prompt, and the automaton of what they have written."""

    __slots__ = ("automaton", "slots")

    def __init__(self, automaton: SuffixAutomaton) -> None:
        self.automaton = automaton
        self.slots: set[int] = set()


class _Live:
    """What is kept in Python of a live request."""

    __slots__ = ("automaton", "first_output", "group", "namespace", "text")

    def __init__(self, text: Int32Array, first_output: int, namespace: str) -> None:
        self.text = text
        self.first_output = first_output
        self.namespace = namespace
        self.automaton: SuffixAutomaton | None = None
        self.group: str | None = None


def as_int32(name: str, value: npt.ArrayLike | None) -> Int32Array:
    """``value`` as a contiguous ``int32[n]``. Raises ``ValueError`` if it is no such thing."""
    if type(value) is np.ndarray and value.dtype == np.int32 and value.ndim == 1 and value.flags.c_contiguous:
        return value
    array = np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a one-dimensional array of whole numbers, got {array.dtype}{array.shape}")
    return np.ascontiguousarray(array, dtype=np.int32)


class Drafter(Proposer):
    """Base of this package's proposers."""

    bounds_depth: ClassVar[bool] = True
    under_budget: ClassVar[Mapping[str, Any]] = {"min_prob": 0.0}
    #: What the subclass was built with.
    options: Any

    def __init__(self, sources: Sources, min_prob: float, tree: bool, candidates: int = MAX_CANDIDATES) -> None:
        """``candidates``: children considered per node of a tree."""
        self._sources = sources
        self._min_prob = min_prob
        self._tree = tree
        self._candidates = candidates
        self._mix = new_mixture()
        self._scratch = new_scratch()
        self._nodes = new_nodes()
        self._table = RecyclingTable(sources.table_bytes, sources.anywhere)
        self._outputs = OutputStores(sources.store_bytes)
        self._live: dict[int, _Live] = {}
        self._groups: dict[str, _Group] = {}
        self._slots = Slots(*(np.zeros(0, np.int64) for _ in Slots._fields))
        self._epochs = np.zeros(0, np.int64)
        self._depth = np.zeros(MAX_DRAFT + 2, np.int64)

    def _reserve(self, slot: int) -> None:
        size = len(self._epochs)
        if slot >= size:
            more = np.zeros(max(64, size, slot + 1 - size), np.int64)
            self._slots = Slots(*(np.concatenate([old, more]) for old in self._slots))
            self._epochs = np.concatenate([self._epochs, more])

    def _check(self, slots: Int32Array) -> None:
        """Compiled code does not check bounds."""
        if len(slots) == 0:
            return
        if slots.min() >= 0 and slots.max() < len(self._epochs) and self._slots.text[slots].all():
            return
        bad = next(int(s) for s in slots if int(s) not in self._live)
        raise ValueError(f"slot {bad} has no request")

    def add_request(self, request: Request) -> None:
        """Admit a request. Raises ``ValueError`` if its slot is taken or negative, or ``num_output`` impossible."""
        slot, prompt = request.slot, as_int32("prompt", request.prompt)
        if slot < 0 or slot in self._live:
            raise ValueError(f"slot {slot} is {'negative' if slot < 0 else 'taken'} (request {request.request_id})")
        if not 0 <= request.num_output <= len(prompt):
            raise ValueError(f"request {request.request_id}: {request.num_output} outputs in {len(prompt)} tokens")
        # Room for a modest answer; max_tokens is often the model's whole context.
        expected = min(len(prompt) // 4 + 128, max(request.max_tokens - len(prompt), 1))
        kept = min(len(prompt), max(request.num_output, REWALK))
        text = np.empty(kept + expected, np.int32)
        text[:kept] = prompt[len(prompt) - kept :]
        self._reserve(slot)
        live = self._live[slot] = _Live(text, kept - request.num_output, request.namespace)
        per = self._slots
        per.text[slot], per.size[slot], per.room[slot] = text.ctypes.data, kept, len(text)
        per.left[slot] = request.max_tokens - len(prompt)
        per.branching[slot] = self._tree and request.branching
        per.space[slot] = self._table.space(request.namespace) if self._sources.table_bytes else 0
        per.history[slot] = per.last[slot] = per.sibling_last[slot] = 0
        if self._sources.context:
            live.automaton = SuffixAutomaton(len(prompt) + expected)
            live.automaton.extend(prompt)
            per.block[slot], per.last[slot] = live.automaton.address, live.automaton.last
        self._join(live, request, text[live.first_output : kept], expected)
        self._epochs[slot] = -2  # no cursor yet
        moved = self._sources.store_bytes and self._outputs.open(request.namespace)
        self._find_stores(list(self._live) if moved else [slot])

    def _join(self, live: _Live, request: Request, output: Int32Array, room: int) -> None:
        """Let a request see what its siblings write, and them what it writes; ``output`` is there already."""
        if not self._sources.siblings or request.group is None:
            return
        live.group = repr((request.namespace, request.group))
        if live.group not in self._groups:
            self._groups[live.group] = _Group(SuffixAutomaton(2 * room))
        group = self._groups[live.group]
        group.slots.add(request.slot)
        group.automaton.cut()
        group.automaton.extend(output)
        self._slots.sibling_last[request.slot] = group.automaton.last
        self._share(group)

    def _share(self, group: _Group) -> None:
        for member in group.slots:
            self._slots.sibling[member] = group.automaton.address

    def _find_stores(self, slots: Iterable[int]) -> None:
        """Look up where the stores of these requests are now; cursors that are void start anew."""
        for slot in slots:
            address, habits, epoch = self._outputs.find(self._live[slot].namespace)
            self._slots.store[slot], self._slots.habits[slot] = address, habits
            if epoch != self._epochs[slot]:
                self._epochs[slot] = epoch
                rewalk(address, self._slots, slot)

    def remove_request(self, slot: int) -> None:
        """Free a request's memory at once and store its output. Raises ``ValueError`` for an unknown slot."""
        if slot not in self._live:
            raise ValueError(f"slot {slot} has no request")
        live = self._live.pop(slot)
        per = self._slots
        output = live.text[live.first_output : per.size[slot]]
        for field in (per.text, per.block, per.store, per.sibling, per.habits):
            field[slot] = 0
        if live.group is not None:
            members = self._groups[live.group].slots
            members.discard(slot)
            if not members:
                del self._groups[live.group]
        if self._sources.store_bytes and len(output):
            self._outputs.add(live.namespace, output)
            self._find_stores(self._live)

    def _make_room(self, slot: int, token: int) -> None:
        """Whatever is full of what ``token`` has to be appended to grows."""
        live, per = self._live[slot], self._slots
        if per.size[slot] == per.room[slot]:
            live.text = np.concatenate([live.text, np.empty(len(live.text), np.int32)])
            per.text[slot], per.room[slot] = live.text.ctypes.data, len(live.text)
        if live.automaton is not None and not has_room(live.automaton.address, token):
            live.automaton.grow()
            per.block[slot] = live.automaton.address
        if live.group is not None:
            group = self._groups[live.group]
            group.automaton.resume(int(per.sibling_last[slot]))
            if not has_room(group.automaton.address, token):  # no sibling has made it grow just now
                group.automaton.grow()
                self._share(group)

    def observe(self, step: StepResult) -> None:
        """Learn from the emitted tokens. Raises ``ValueError`` for an unknown slot or inconsistent arrays."""
        slots, tokens = as_int32("slots", step.slots), as_int32("tokens", step.tokens)
        offsets = as_int32("offsets", step.offsets)
        if not sound(self._slots, slots, offsets, len(tokens)):
            self._check(slots)
            _check_offsets("offsets", offsets, len(slots), "tokens", len(tokens))
        recycles = self._sources.table_bytes > 0 and step.row_tokens is not None
        rows = self._check_rows(step, slots) if recycles else None
        table = self._table.view
        done = np.zeros(len(slots), np.int32)
        while observe_batch(
            self._mix, self._scratch, table, self._sources.orders, self._slots, slots, tokens, offsets, done
        ):
            for i in np.flatnonzero(done < np.diff(offsets)):
                self._make_room(int(slots[i]), int(tokens[offsets[i] + done[i]]))
        if rows is not None:
            recycle_batch(
                table,
                self._sources.orders,
                min(self._sources.width, rows[3].shape[1]),
                self._slots,
                slots,
                tokens,
                offsets,
                *rows,
                self._depth,
            )

    def _check_rows(
        self, step: StepResult, slots: Int32Array
    ) -> tuple[Int32Array, Int32Array, Int32Array, Int32Array, Float32Array]:
        tokens, offsets = as_int32("row_tokens", step.row_tokens), as_int32("row_offsets", step.row_offsets)
        parents = as_int32("row_parents", step.row_parents)
        if not sound(self._slots, slots, offsets, len(tokens)):
            _check_offsets("row_offsets", offsets, len(slots), "rows", len(tokens))
        ids = np.ascontiguousarray(step.topk_ids, np.int32)
        logprobs = np.ascontiguousarray(step.topk_logprobs, np.float32)
        if len(parents) != len(tokens) or ids.shape != logprobs.shape or ids.ndim != 2 or len(ids) != len(tokens):
            raise ValueError(
                f"row_parents {parents.shape}, topk_ids {ids.shape} and topk_logprobs {logprobs.shape} "
                f"do not describe {len(tokens)} rows"
            )
        if not hang_together(offsets, parents, len(self._depth)):
            raise ValueError("row_parents must name an earlier row of the same request, or -1")
        return tokens, offsets, parents, ids, logprobs

    def _limits(self, slots: Int32Array, limits: Int32Array) -> tuple[Int32Array, Int32Array]:
        """Arguments of :meth:`propose`, checked."""
        slots, limits = as_int32("slots", slots), as_int32("limits", limits)
        if not all_live(self._slots, slots):
            self._check(slots)
        if len(limits) != len(slots) or (limits < 0).any():
            raise ValueError(f"limits {limits!r} for {len(slots)} requests")
        return slots, np.minimum(limits, MAX_DRAFT)

    def propose(self, slots: Int32Array, limits: Int32Array) -> DraftForest:
        """Draft for each request. Raises ``ValueError`` for an unknown slot or a bad limit."""
        slots, limits = self._limits(slots, limits)
        out, offsets = new_forest(int(limits.sum())), np.zeros(len(slots) + 1, np.int32)
        matched = np.empty(len(slots), np.int32)
        size = propose_batch(
            self._mix,
            self._scratch,
            self._nodes,
            self._table.view,
            self._sources.orders,
            self._slots,
            slots,
            limits,
            max(self._min_prob, self.floor),
            self._candidates,
            out,
            offsets,
            matched,
        )
        return cut(out, size, offsets, matched)

    def _trial(self) -> Drafter:
        """A throwaway proposer like this one."""
        return type(self)(self.options)  # type: ignore[call-arg]

    def warm_up(self) -> None:
        """Compile every kernel, or load it from the disk cache, by a small real run on a throwaway proposer."""
        trial = self._trial()
        trial._min_prob = 0.0
        one = np.ones(1, np.int32)
        text = np.tile(np.arange(7, dtype=np.int32), 40)
        rows = np.repeat(np.arange(WIDTH, dtype=np.int32)[None], 2, axis=0)
        for _ in range(2):
            trial.add_request(Request(0, "warm-up", text))
            for tokens in (text, text[:2]):
                step = StepResult(
                    one - 1,
                    tokens,
                    np.array([0, len(tokens)], np.int32),
                    one,
                    one,
                    row_tokens=text[:2],
                    row_offsets=np.array([0, 2], np.int32),
                    row_parents=np.array([-1, 0], np.int32),
                    topk_ids=rows,
                    topk_logprobs=-1.0 - rows.astype(np.float32),
                )
                trial.observe(step)
                trial.propose(one - 1, one * 4)
            trial.remove_request(0)

    def stats(self) -> dict[str, float]:
        """Sizes: requests, bytes, tokens; and how often old outputs were evicted."""
        automata = [r.automaton for r in self._live.values() if r.automaton is not None]
        automata += [g.automaton for g in self._groups.values()]
        return {
            "live_requests": len(self._live),
            "context_bytes": sum(a.nbytes for a in automata) + sum(r.text.nbytes for r in self._live.values()),
            "store_bytes": self._outputs.nbytes,
            "store_tokens": self._outputs.num_tokens,
            "store_namespaces": self._outputs.num_namespaces,
            "table_bytes": self._table.nbytes if self._sources.table_bytes else 0,
            "table_rows_written": int(self._table.view.clock[0]),
            "groups": len(self._groups),
            "evictions": self._outputs.evictions,
        }

    def state(self) -> State:
        """What the mixture, the table and the outputs of ended requests hold."""
        parts: dict[str, State] = {"mixture": {name: array.copy() for name, array in self._mix._asdict().items()}}
        if self._sources.table_bytes:
            parts["table"] = self._table.state()
        if self._sources.store_bytes:
            parts["outputs"] = self._outputs.state()
        return join(parts)

    def restore(self, state: Mapping[str, Array]) -> None:
        """See :meth:`.base.Proposer.restore`. What this proposer's options switch off is left out."""
        if self._live:
            raise ValueError("saved state can be restored before the first request only")
        mix = restored_mixture(part(state, "mixture"))
        table = RecyclingTable(self._sources.table_bytes, self._sources.anywhere)
        outputs = OutputStores(self._sources.store_bytes)
        for holder, saved in ((table, part(state, "table")), (outputs, part(state, "outputs"))):
            if saved:
                holder.restore(saved)
        self._mix, self._table, self._outputs = mix, table, outputs

    def close(self) -> None:
        """Forget all requests and everything learned from them."""
        self._live.clear()
        self._groups.clear()
        for field in (self._slots.text, self._slots.block, self._slots.store, self._slots.sibling):
            field[:] = 0
        self._outputs.clear()
        self._table.clear()


def _check_offsets(name: str, offsets: Int32Array, n: int, what: str, size: int) -> None:
    if len(offsets) != n + 1 or offsets[0] < 0 or offsets[-1] > size or (np.diff(offsets) < 0).any():
        raise ValueError(f"{name} {offsets!r} do not cut {size} {what} into {n} requests")
