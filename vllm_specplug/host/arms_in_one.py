"""Several arms in one server: what drafts is chosen per request. Imports no vLLM.

An arm is a proposer with a :class:`.lifecycle.Lifecycle` of its own, or ``off``, whose requests no proposer is shown.
Each proposer sees its own requests only, in slots of their own; it fails, sleeps, learns and is counted by itself. The
engine's step is what arms share: its load and time are shown whole to each, and what is not its own as
:class:`.base.Others`.

A request's arm is chosen when the scheduler announces it, and stays. As long as all live requests have the server's own
proposer, which is always so where nobody asked for anything else, steps go straight to its lifecycle.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from vllm_specplug.host.eligibility import ARM_ARG
from vllm_specplug.host.engine_requests import TENANT_ARG
from vllm_specplug.host.lifecycle import Counters, Lifecycle, Rows, TopK, sample_group, select_rows
from vllm_specplug.host.metrics import Snapshot
from vllm_specplug.proposers.base import Int32Array, Others, Proposer, Request
from vllm_specplug.proposers.saved_state import Array, join, part
from vllm_specplug.registry import OFF

logger = logging.getLogger("vllm.specplug")

#: Makes the :class:`Request` of a row seen for the first time: ``(lifecycle, row, request_id, slot) -> Request``.
Admit = Callable[[Lifecycle, int, str, int], Request]

#: Counters that metrics have for each arm.
ARM_COUNTERS = (
    "requests",
    "drafted",
    "verified",
    "accepted",
    "emitted",
    "errors",
    "decode_steps",
    "decode_tokens",
    "decode_seconds",
)
#: Where the state of the arms beside the server's own proposer is kept in the state file.
_STATE = "arms"
_UNKNOWN_SHOWN = 80  # characters of a name that no arm has


class ArmChoice:
    """Which arm a request gets: the one it names, or that of the split, or the default."""

    def __init__(
        self, names: Mapping[str, str], default: str, shares: Mapping[str, float], by: str = "request", seed: int = 0
    ) -> None:
        """
        Args:
            names: what a request may call an arm -> the arm.
            default: the arm of requests that name none, where there is no split.
            shares: of the requests that name none, by arm; empty: no split.
            by: ``request``, or ``tenant``: what is hashed.
            seed: of the hash, 0 to 2**63 - 1.
        """
        self.unknown = 0  # requests that named an arm there is not
        self._names = dict(names)
        self._default = default
        self._shares = dict(shares)
        self._by_tenant = by == "tenant"
        self._key = seed.to_bytes(8, "little")

    def of(self, request_id: str, extra_args: Mapping[str, object]) -> str:
        """The arm of a request, from its id and ``vllm_xargs``; the same every time it is asked.

        A name that no arm has means the default: the engine cannot refuse a request that it has accepted (the API does,
        see :mod:`.sampling_params`).
        """
        named = extra_args.get(ARM_ARG)
        if named is not None:
            if isinstance(named, str) and named in self._names:
                return self._names[named]
            self._note_unknown(named)
            return self._default
        if not self._shares:
            return self._default
        tenant = extra_args.get(TENANT_ARG) if self._by_tenant else None
        # Samples of one prompt draft from each other: they stay together.
        return self._assigned(f"tenant {tenant}" if tenant else f"request {sample_group(request_id) or request_id}")

    def _assigned(self, key: str) -> str:
        """Rendezvous hashing with weights (Schindelhauer and Schomaker 2005, "Weighted distributed hash tables"): the
        first of exponential variables whose rates are the shares. The order of the arms does not matter, and an arm
        whose share is raised keeps those it had."""
        return min(self._shares, key=lambda arm: -math.log(self._uniform(arm, key)) / self._shares[arm])

    def _uniform(self, arm: str, key: str) -> float:
        text = f"{arm}\0{key}".encode(errors="surrogatepass")
        number = int.from_bytes(hashlib.blake2b(text, digest_size=8, key=self._key).digest(), "little")
        return (number + 0.5) / 2.0**64

    def _note_unknown(self, named: object) -> None:
        self.unknown += 1
        if self.unknown == 1:
            logger.warning(
                "vllm-specplug: a request has %s = %s, which is no arm of this server: it is drafted for by %s. "
                "Allowed: %s. Logged once.",
                ARM_ARG,
                repr(named)[:_UNKNOWN_SHOWN],
                self._default,
                ", ".join(sorted(self._names)),
            )


class _Off:
    """Counts the requests that get no drafts."""

    def __init__(self) -> None:
        self.counters = Counters()
        self._started: set[str] = set()

    @property
    def live(self) -> int:
        """Requests that have begun to emit."""
        return len(self._started)

    def step(self, request_ids: Iterable[str], emitted: Iterable[Sequence[int]], seconds: float) -> None:
        """These requests emitted tokens."""
        counters, requests, tokens = self.counters, 0, 0
        for request_id, new in zip(request_ids, emitted, strict=True):
            counters.emitted += len(new)
            if request_id in self._started:
                requests += 1
                tokens += len(new)
            else:
                self._started.add(request_id)
                counters.requests += 1
        counters.decoded(requests, tokens, seconds)

    def end(self, request_ids: Iterable[str]) -> None:
        """Forget these; unknown ones are ignored."""
        self._started.difference_update(request_ids)


class Arms:
    """The arms of one engine. All calls come from the engine's step, one thread.

    Attributes:
        default: the lifecycle of the server's own proposer.
        trees: branching drafts that the engine holds, of all arms, see :attr:`.Lifecycle.trees`.
    """

    def __init__(self, lifecycles: Mapping[str, Lifecycle], choice: ArmChoice, shown: bool = False) -> None:
        """
        Args:
            lifecycles: by the arm's name, the default first.
            choice: of the arm; gives one of these names or ``off``.
            shown: count by arm in metrics from the start, not only once a request had another arm than the default.
        """
        self._names = tuple(lifecycles)
        self._lifecycles = tuple(lifecycles.values())
        self.default = self._lifecycles[0]
        self.trees = self.default.trees
        for lifecycle in self._lifecycles:
            lifecycle.trees = self.trees
        self._choice = choice
        self._off = _Off()
        self._index = {OFF: len(self._names), **{name: i for i, name in enumerate(self._names)}}
        self._arm: dict[str, int] = {}  # of live requests that do not have the default arm
        self._awake: list[tuple[int, Int32Array]] | None = None  # of the present step; None: the default has it all
        self._spent: dict[int, int] | None = None  # nanoseconds of each arm in the last step; None: all the default's
        self._shown = shown or len(self._names) > 1
        self._shared_steps = 0

    @property
    def proposers(self) -> Iterator[Proposer]:
        """Of all arms, the default first."""
        return (lifecycle.proposer for lifecycle in self._lifecycles)

    @property
    def live(self) -> int:
        """Requests with state."""
        return self._off.live + sum(lifecycle.live for lifecycle in self._lifecycles)

    @property
    def wants_topk(self) -> bool:
        """Whether any proposer learns from the target's top-k."""
        return any(proposer.wants_topk for proposer in self.proposers)

    @property
    def topk(self) -> int:
        """How many the proposers learn from, at most."""
        return max(proposer.topk for proposer in self.proposers)

    @property
    def counters(self) -> Counters:
        """Of all proposers together; each engine step counts once."""
        if len(self._lifecycles) == 1:
            return self.default.counters
        own = [lifecycle.counters for lifecycle in self._lifecycles]
        total = Counters(**{key: sum(getattr(each, key) for each in own) for key in Counters.__dataclass_fields__})
        total.steps -= self._shared_steps
        return total

    def begin(self, request_id: str, extra_args: Mapping[str, object] | None) -> None:
        """A request was scheduled for the first time: choose its arm."""
        arm = self._index[self._choice.of(request_id, extra_args or {})]
        if arm:
            self._arm[request_id] = arm
            self._shown = True  # from now on, in metrics

    def of(self, request_id: str) -> str:
        """Name of a live request's arm; ``off`` is one."""
        arm = self._arm.get(request_id, 0)
        return self._names[arm] if arm < len(self._names) else OFF

    def end(self, request_ids: Sequence[str]) -> None:
        """Forget requests that finished or were aborted; unknown ids are ignored."""
        for lifecycle in self._lifecycles:
            lifecycle.end(request_ids)
        if self._arm:
            self._off.end(request_ids)
            for request_id in request_ids:
                self._arm.pop(request_id, None)

    def asleep(self, request_ids: Sequence[str], emitted: Sequence[list[int]], seconds: float) -> bool:
        """Whether this step needs no :meth:`step`, see :meth:`.Lifecycle.asleep`. To be asked before each."""
        if not self._arm:
            self._awake = self._spent = None
            return self.default.asleep(request_ids, emitted, seconds)
        self._awake = []
        of = np.fromiter((self._arm.get(i, 0) for i in request_ids), np.int32, len(request_ids))
        for arm in np.unique(of).tolist():
            index = np.flatnonzero(of == arm)
            which = index.tolist()
            ids, tokens = [request_ids[i] for i in which], [emitted[i] for i in which]
            if arm == len(self._lifecycles):
                self._off.step(ids, tokens, seconds)
            elif not self._lifecycles[arm].asleep(ids, tokens, seconds):
                self._awake.append((arm, index.astype(np.int32)))
        if not self._awake:
            self._spent = {}
        return not self._awake

    def step(self, batch: Rows, admit: Admit) -> list[list[int]]:
        """Observe one step and draft for the next, see :meth:`.Lifecycle.step`; arms asleep and ``off`` draft nothing.
        ``batch``: the requests that :meth:`asleep` was asked about."""
        if self._awake is None:
            return self.default.step(batch, functools.partial(admit, self.default))
        awake, self._awake = self._awake, []
        self._shared_steps += len(awake) - 1
        drafts: list[list[int]] = [[] for _ in batch.ids]
        lengths = np.fromiter(map(len, batch.emitted), np.int32, len(batch.ids))
        spent, self._spent = self._spent, {}
        for arm, index in awake:
            lifecycle, start = self._lifecycles[arm], time.perf_counter_ns()
            own = _rows_of(batch, index, lengths, lifecycle.proposer, _share(batch.overhead, spent, arm))
            found = lifecycle.step(own, functools.partial(admit, lifecycle))
            for i, tokens in zip(index.tolist(), found, strict=True):
                drafts[i] = tokens
            self._spent[arm] = time.perf_counter_ns() - start
        return drafts

    def stats(self) -> dict[str, float]:
        """Counters: the host's of all proposers together, the default proposer's own under its name; then, if there is
        more than one arm, ``arm.<arm>.<counter>`` of each and ``arm_stat.<arm>.<name>`` of other proposers' own."""
        totals = self.default.stats()
        if not self._shown:
            return totals
        together, arms = self.counters, {OFF: self._off.counters}
        totals |= {key: float(getattr(together, key)) for key in Counters.__dataclass_fields__}
        for name, lifecycle in zip(self._names, self._lifecycles, strict=True):
            arms[name] = lifecycle.counters
            if lifecycle is not self.default:
                totals["live"] += lifecycle.live
                totals |= {f"arm_stat.{name}.{key}": value for key, value in lifecycle.proposer_stats().items()}
        for name, counters in arms.items():
            totals |= {f"arm.{name}.{key}": float(getattr(counters, key)) for key in ARM_COUNTERS}
        return totals | {
            "arm_unknown_requests": float(self._choice.unknown),
            f"without_drafts.{OFF}": float(self._off.counters.requests),
        }

    def snapshot(self, more: Mapping[str, float]) -> Snapshot:
        """Everything, ``more`` included, for metrics."""
        if not self._shown:
            return self.default.snapshot(more)
        found = [lifecycle.snapshot({}) for lifecycle in self._lifecycles]
        counts = sum(each.by_source_depth for each in found)
        requests = [request for each in found for request in each.requests]
        return Snapshot({**self.stats(), **more}, found[0].sources, counts, requests)

    def state(self) -> Mapping[str, Array | Iterator[Array]]:
        """What the proposers have learned, that of the default as without arms: a file serves with them and without."""
        others = zip(self._names[1:], self._lifecycles[1:], strict=True)
        own = self.default.proposer.state()
        return {**own, **join({f"{_STATE}/{name}": each.proposer.state() for name, each in others})}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over what :meth:`state` returned; arms that learned nothing then start anew.

        Raises:
            ValueError: an arm's does not fit. Other arms may have taken over theirs.
        """
        self.default.proposer.restore({k: v for k, v in state.items() if not k.startswith(_STATE + "/")})
        saved = part(state, _STATE)
        for name, lifecycle in zip(self._names[1:], self._lifecycles[1:], strict=True):
            own = part(saved, name)
            try:
                if own:
                    lifecycle.proposer.restore(own)
            except ValueError as error:
                raise ValueError(f"arm {name}: {error}") from error
        left = sorted({key.partition("/")[0] for key in saved} - set(self._names))
        if left:
            logger.warning(
                "vllm-specplug: the state file also has what the arms %s have learned, which this server does not "
                "hold; the next save is without it.",
                ", ".join(left),
            )


def _share(overhead: float, spent: Mapping[int, int] | None, arm: int) -> float:
    """An arm's part of what drafting took in the last step, in which each arm ``spent`` so much; NaN if none of it."""
    if spent is None:
        return overhead if arm == 0 else math.nan
    return overhead * spent[arm] / sum(spent.values()) if spent.get(arm) else math.nan


def _rows_of(batch: Rows, index: Int32Array, lengths: Int32Array, proposer: Proposer, overhead: float) -> Rows:
    """The requests ``index`` (``int32[m]``, rising) of ``batch``, for their proposer; ``lengths``: tokens emitted for
    all."""
    drafted, totals, which = batch.drafted[index], batch.totals[index], index.tolist()
    return Rows(
        rows=batch.rows[index],
        ids=[batch.ids[i] for i in which],
        emitted=[batch.emitted[i] for i in which],
        totals=totals,
        drafted=drafted,
        limits=batch.limits[index],
        topk=_topk_of(batch, index, proposer),
        load=batch.load,
        seconds=batch.seconds,
        overhead=overhead,
        paths=None if batch.paths is None else batch.paths[index],
        others=Others(
            requests=len(batch.ids) - len(index),
            rows=int(batch.drafted.sum() - drafted.sum()),
            context=int(batch.totals.sum() - totals.sum()),
            tokens=int(lengths.sum() - lengths[index].sum()),
        ),
    )


def _topk_of(batch: Rows, index: Int32Array, proposer: Proposer) -> TopK | None:
    """Of these requests' rows, the columns that their proposer asks for."""
    if batch.topk is None or not proposer.wants_topk:
        return None
    keep = np.zeros(len(batch.ids), bool)
    keep[index] = True
    tokens, offsets, parents, ids, logprobs = select_rows(batch.topk, keep)
    if proposer.topk < ids.shape[1]:
        ids, logprobs = (np.ascontiguousarray(each[:, : proposer.topk]) for each in (ids, logprobs))
    return tokens, offsets, parents, ids, logprobs
