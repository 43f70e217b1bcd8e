"""vLLM's own ``ngram`` and ``suffix`` as proposers, to draft inside another one (``inner: "vllm:ngram"``).

Both run vLLM's code, not a copy: the compiled search under its ``NgramProposer``, and the suffix cache that its
``SuffixDecodingProposer`` drives. Around them is only what the engine's batch gives vLLM's classes and the interface of
:mod:`vllm_specplug.proposers.base` does not: the requests' texts. Drafts are chains. vLLM is imported when a proposer
is built.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from vllm_specplug.host.patching import HostSymbolMissing
from vllm_specplug.kernels.memory import kernel
from vllm_specplug.options import OptionError, option
from vllm_specplug.proposers.base import (
    SOURCE_CONTEXT,
    DraftForest,
    Int32Array,
    Proposer,
    Request,
    StepResult,
)
from vllm_specplug.proposers.drafting import as_int32

Int64Array = npt.NDArray[np.int64]

#: Names for :func:`make`.
NAMES = ("ngram", "suffix")

# A match is counted no further than this: beyond it all are as good.
_LONGEST_MATCH = 64
# Suffix caches kept for namespaces without live requests, the last used ones.
_IDLE_NAMESPACES = 64


@kernel
def _append(
    texts: Int32Array,
    sizes: Int64Array,
    left: Int64Array,
    slots: Int32Array,
    tokens: Int32Array,
    offsets: Int32Array,
) -> int:
    """Append what each request emitted.

    Returns 0; or, with nothing done, the room that rows must have; or -1 for an unknown slot, -2 for bad offsets.
    """
    room = 0
    for i in range(len(slots)):
        slot = slots[i]
        if slot < 0 or slot >= len(sizes) or sizes[slot] < 0:
            return -1
        if offsets[i] < 0 or offsets[i + 1] < offsets[i] or offsets[i + 1] > len(tokens):
            return -2
        room = max(room, sizes[slot] + offsets[i + 1] - offsets[i])
    if room > texts.shape[1]:
        return int(room)
    for i in range(len(slots)):
        slot = slots[i]
        for j in range(offsets[i], offsets[i + 1]):
            texts[slot, sizes[slot]] = tokens[j]
            sizes[slot] += 1
            left[slot] -= 1
    return 0


@functools.cache
def _ngram_search() -> Callable[..., int]:
    """vLLM's search for a batch of requests; compiled anew in every process, as vLLM does, for a cache on disk would
    not notice that vLLM was replaced by another version.

    Raises:
        HostSymbolMissing: this vLLM has no such search.
    """
    import numba

    try:
        from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens as find
    except ImportError as error:
        raise HostSymbolMissing(f"vllm:ngram needs vLLM's n-gram search, which this version lacks: {error}") from error

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def search(
        texts: Int32Array,
        sizes: Int64Array,
        left: Int64Array,
        slots: Int32Array,
        limits: Int32Array,
        shortest: int,
        longest: int,
        tokens: Int32Array,
        parents: Int32Array,
        offsets: Int32Array,
        matched: Int32Array,
    ) -> int:
        """Fill chains and match lengths; returns the number of nodes, -1 for an unknown slot."""
        base = 0
        offsets[0] = 0
        for i in range(len(slots)):
            slot = slots[i]
            if slot < 0 or slot >= len(sizes) or sizes[slot] < 0:
                return -1
            size, count = sizes[slot], 0
            text = texts[slot, :size]
            matched[i] = 0
            # A step emits one token more than it accepts.
            limit = min(limits[i], left[slot] - 1)
            if limit > 0:
                # The fourth argument is the length at which drafts end.
                found = find(text, shortest, longest, size + limit, limit)
                for token in found[:limit]:
                    if token < 0:  # a placeholder of multi-modal input
                        break
                    tokens[base + count], parents[base + count] = token, count - 1
                    count += 1
                # ``found`` is a view of ``text``: where it begins tells how much more than the n-gram matches.
                start = (found.ctypes.data - text.ctypes.data) // 4
                if count > 0 and 0 < start < size:
                    most, length = min(start, _LONGEST_MATCH), 0
                    while length < most and text[start - 1 - length] == text[size - 1 - length]:
                        length += 1
                    matched[i] = length
            base += count
            offsets[i + 1] = base
        return base

    return search  # type: ignore[no-any-return]


@dataclass(frozen=True)
class VllmNgramOptions:
    """Options of vLLM's ``ngram``, under its own names."""

    prompt_lookup_min: int = option(0, "shortest n-gram looked up; 0: as prompt_lookup_max", low=0)
    prompt_lookup_max: int = option(0, "longest n-gram looked up; 0: as prompt_lookup_min, and 5 if both are 0", low=0)


class VllmNgram(Proposer):
    """What follows the last earlier occurrence of the longest of the text's last n-grams (prompt lookup).

    vLLM: v1/spec_decode/ngram_proposer.py.
    """

    name: ClassVar[str] = "vllm_ngram"
    Options: ClassVar[type] = VllmNgramOptions
    calibrated: ClassVar[bool] = False

    def __init__(self, options: VllmNgramOptions | None = None) -> None:
        """Raises :class:`OptionError` if the n-grams' bounds contradict each other, and what :func:`_ngram_search`
        does."""
        self.options = options = options or VllmNgramOptions()
        # As SpeculativeConfig fills in what is not given.
        self._shortest = options.prompt_lookup_min or options.prompt_lookup_max or 5
        self._longest = options.prompt_lookup_max or self._shortest
        if self._shortest > self._longest:
            raise OptionError(
                f"specplug.vllm_ngram.prompt_lookup_min = {self._shortest} is not allowed: expected at most "
                f"prompt_lookup_max, {self._longest}."
            )
        self._search = _ngram_search()
        self._texts = np.zeros((64, 256), np.int32)
        self._sizes = np.full(64, -1, np.int64)  # tokens in each row; -1: no request
        self._left = np.zeros(64, np.int64)  # tokens the request may still get

    def add_request(self, request: Request) -> None:
        """Admit a request. Raises ``ValueError`` if its slot is taken or negative, or ``num_output``
        impossible."""
        slot, text = request.slot, as_int32("prompt", request.prompt)
        _check_new(request, slot < len(self._sizes) and self._sizes[slot] >= 0)
        self._reserve(slot + 1, len(text))
        self._texts[slot, : len(text)] = text
        self._sizes[slot], self._left[slot] = len(text), request.max_tokens - len(text)

    def _reserve(self, slots: int, room: int) -> None:
        rows, columns = self._texts.shape
        if slots > rows or room > columns:
            texts = np.zeros((_grown(rows, slots), _grown(columns, room)), np.int32)
            texts[:rows, :columns] = self._texts
            more = np.full(len(texts) - rows, -1, np.int64)
            self._texts = texts
            self._sizes = np.concatenate([self._sizes, more])
            self._left = np.concatenate([self._left, more])

    def observe(self, step: StepResult) -> None:
        """Append what was emitted. Raises ``ValueError`` for an unknown slot or inconsistent offsets."""
        slots, tokens = as_int32("slots", step.slots), as_int32("tokens", step.tokens)
        offsets = as_int32("offsets", step.offsets)
        _check_length("offsets", offsets, len(slots) + 1)
        room = _append(self._texts, self._sizes, self._left, slots, tokens, offsets)
        if room > 0:
            self._reserve(0, room)
            _append(self._texts, self._sizes, self._left, slots, tokens, offsets)
        elif room == -1:
            raise _unknown(slots, [slot for slot, size in enumerate(self._sizes) if size >= 0])
        elif room == -2:
            raise _bad_offsets(offsets, tokens)

    def propose(self, slots: Int32Array, limits: Int32Array) -> DraftForest:
        """Draft a chain for each request, every probability 1. Raises ``ValueError`` for an unknown slot or a bad
        limit."""
        slots, limits = as_int32("slots", slots), as_int32("limits", limits)
        n, most = len(slots), sum(_check_limits(slots, limits))
        tokens, parents = np.empty(most, np.int32), np.empty(most, np.int32)
        offsets, matched = np.empty(n + 1, np.int32), np.empty(n, np.int32)
        size = self._search(
            self._texts,
            self._sizes,
            self._left,
            slots,
            limits,
            self._shortest,
            self._longest,
            tokens,
            parents,
            offsets,
            matched,
        )
        if size < 0:
            raise _unknown(slots, [slot for slot, size in enumerate(self._sizes) if size >= 0])
        sources = np.full(size, SOURCE_CONTEXT, np.int8)
        return DraftForest(tokens[:size], parents[:size], np.ones(size, np.float32), sources, offsets, matched)

    def remove_request(self, slot: int) -> None:
        """Forget a request. Raises ``ValueError`` for an unknown slot."""
        if not 0 <= slot < len(self._sizes) or self._sizes[slot] < 0:
            raise ValueError(f"slot {slot} has no request")
        self._sizes[slot] = -1

    def warm_up(self) -> None:
        """Compile, by a draft of a throwaway proposer."""
        trial, zero = VllmNgram(VllmNgramOptions(1, 2)), np.zeros(1, np.int32)
        trial.add_request(Request(0, "warm-up", np.tile(np.arange(3, dtype=np.int32), 4)))
        trial.observe(StepResult(zero, zero, np.array([0, 1], np.int32), zero, zero))
        trial.propose(zero, zero + 2)

    def stats(self) -> dict[str, float]:
        """Requests and bytes."""
        return {"live_requests": int((self._sizes >= 0).sum()), "context_bytes": self._texts.nbytes}


@dataclass(frozen=True)
class VllmSuffixOptions:
    """Options of vLLM's ``suffix``, under its own names without ``suffix_decoding_``."""

    max_tree_depth: int = option(24, "most tokens of match and draft together", low=1)
    max_cached_requests: int = option(
        10000, "earlier outputs kept per namespace; 0: draft from the own text alone", low=0, high=(1 << 31) - 1
    )
    max_spec_factor: float = option(1.0, "draft at most this many times the match's length", low=0.0)
    min_token_prob: float = option(
        0.1, "draft no token that followed the match less often than this share", low=0.0, high=1.0
    )


class _Live:
    """A request that the suffix cache knows by ``number``."""

    __slots__ = ("cache", "left", "namespace", "number", "tail")

    def __init__(self, cache: Any, namespace: str, number: int, tail: list[int], left: int) -> None:
        self.cache = cache
        self.namespace = namespace
        self.number = number
        self.tail = tail  # its last tokens
        self.left = left  # tokens it may still get


class VllmSuffix(Proposer):
    """Suffix decoding (arXiv 2411.04975) by the package arctic-inference, as vLLM uses it.

    A node's probability is the cache's estimate: the share of occurrences in which the draft followed the match. All
    nodes count as drafted from the context, for the cache does not say whether the request's own text or an earlier
    output matched. Unlike in vLLM, each namespace has a cache of its own, and what a step emitted is in it before any
    request drafts, not only what requests earlier in the batch emitted. vLLM: v1/spec_decode/suffix_decoding.py.
    """

    name: ClassVar[str] = "vllm_suffix"
    Options: ClassVar[type] = VllmSuffixOptions
    calibrated: ClassVar[bool] = False

    @classmethod
    def check_installed(cls) -> None:
        """Raises :class:`OptionError` if arctic-inference is not installed."""
        if importlib.util.find_spec("arctic_inference") is None:
            raise OptionError(
                "vllm:suffix drafts with the package arctic-inference, which is not installed: "
                "pip install arctic-inference"
            )

    def __init__(self, options: VllmSuffixOptions | None = None) -> None:
        """Raises :class:`OptionError` if arctic-inference is not installed."""
        try:
            from arctic_inference.suffix_decoding import SuffixDecodingCache
        except ImportError as error:
            raise OptionError(
                f"vllm:suffix drafts with the package arctic-inference, which cannot be imported ({error}): "
                "pip install arctic-inference"
            ) from error
        self.options = options or VllmSuffixOptions()
        self._new_cache = SuffixDecodingCache
        self._caches: dict[str, Any] = {}  # by namespace, the last used one last
        self._live: dict[int, _Live] = {}
        self._requests = 0  # so far

    def add_request(self, request: Request) -> None:
        """Admit a request. Raises ``ValueError`` if its slot is taken or negative, or ``num_output``
        impossible."""
        text = as_int32("prompt", request.prompt)
        _check_new(request, request.slot in self._live)
        cache = self._caches.pop(request.namespace, None)
        if cache is None:
            cache = self._new_cache(self.options.max_tree_depth, self.options.max_cached_requests)
        self._caches[request.namespace] = cache
        number, self._requests = self._requests, self._requests + 1
        prompt = len(text) - request.num_output
        cache.start_request(number, text[:prompt])
        if request.num_output:
            cache.add_active_response(number, text[prompt:])
        tail = text[-self.options.max_tree_depth :].tolist()
        self._live[request.slot] = _Live(cache, request.namespace, number, tail, request.max_tokens - len(text))
        self._drop_idle()

    def _drop_idle(self) -> None:
        used = {live.namespace for live in self._live.values()}
        idle = [namespace for namespace in self._caches if namespace not in used]
        for namespace in idle[: max(len(idle) - _IDLE_NAMESPACES, 0)]:
            del self._caches[namespace]

    def _requests_of(self, slots: Int32Array) -> list[_Live]:
        try:
            return [self._live[slot] for slot in slots.tolist()]
        except KeyError:
            raise _unknown(slots, self._live) from None

    def observe(self, step: StepResult) -> None:
        """Append what was emitted. Raises ``ValueError`` for an unknown slot or inconsistent offsets."""
        slots, tokens = as_int32("slots", step.slots), as_int32("tokens", step.tokens)
        offsets, depth = as_int32("offsets", step.offsets), self.options.max_tree_depth
        _check_length("offsets", offsets, len(slots) + 1)
        bounds, flat = offsets.tolist(), tokens.tolist()
        if bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > len(flat):
            raise _bad_offsets(offsets, tokens)
        for live, low, high in zip(self._requests_of(slots), bounds[:-1], bounds[1:], strict=True):
            new = flat[low:high]
            live.cache.add_active_response(live.number, new)
            live.left -= len(new)
            live.tail += new
            if len(live.tail) > 8 * depth:
                del live.tail[:-depth]

    def propose(self, slots: Int32Array, limits: Int32Array) -> DraftForest:
        """Draft a chain for each request. Raises ``ValueError`` for an unknown slot or a bad limit."""
        slots, limits = as_int32("slots", slots), as_int32("limits", limits)
        mosts = _check_limits(slots, limits)
        depth, factor = self.options.max_tree_depth, self.options.max_spec_factor
        least = self.options.min_token_prob
        tokens, probs = list[int](), list[float]()
        parents, offsets, matched = list[int](), [0], list[int]()
        for live, limit in zip(self._requests_of(slots), mosts, strict=True):
            length = count = 0
            most = min(limit, live.left - 1)  # a step emits one token more than it accepts
            if most > 0:
                draft = live.cache.speculate(
                    live.number,
                    live.tail[-depth:],
                    max_spec_tokens=most,
                    max_spec_factor=factor,
                    min_token_prob=least,
                )
                found = draft.token_ids
                count = len(found)
                if count and min(found) < 0:  # a placeholder of multi-modal input
                    count = next(j for j, token in enumerate(found) if token < 0)
                if count:
                    length = draft.match_len
                    tokens += found[:count]
                    probs += draft.probs[:count]
                    parents += range(-1, count - 1)
            matched.append(length)
            offsets.append(len(tokens))
        return DraftForest(
            np.array(tokens, np.int32),
            np.array(parents, np.int32),
            np.array(probs, np.float32),
            np.full(len(tokens), SOURCE_CONTEXT, np.int8),
            np.array(offsets, np.int32),
            np.array(matched, np.int32),
        )

    def remove_request(self, slot: int) -> None:
        """Forget a request; its output stays in the cache. Raises ``ValueError`` for an unknown slot."""
        if slot not in self._live:
            raise ValueError(f"slot {slot} has no request")
        live = self._live.pop(slot)
        live.cache.stop_request(live.number)

    def stats(self) -> dict[str, float]:
        """Requests, cached outputs, namespaces."""
        cached = sum(len(cache.cached_requests) for cache in self._caches.values())
        return {"live_requests": len(self._live), "cached_requests": cached, "namespaces": len(self._caches)}

    def close(self) -> None:
        """Forget everything."""
        self._caches.clear()
        self._live.clear()


def make(name: str, vllm_config: Any, options: Any = None) -> VllmNgram | VllmSuffix:
    """The proposer called ``name``, one of :data:`NAMES`.

    Args:
        vllm_config: the server's; where ``options`` is None, its speculative settings of the same names hold.
        options: a :class:`VllmNgramOptions` or :class:`VllmSuffixOptions`.

    Raises:
        ValueError: there is no such name.
        OptionError: the options contradict each other, or what drafts is not installed.
    """
    if name not in NAMES:
        raise ValueError(f"vLLM's proposer {name!r} cannot draft here; expected one of {', '.join(NAMES)}")
    cls, prefix = (VllmNgram, "") if name == "ngram" else (VllmSuffix, "suffix_decoding_")
    if options is None:
        config, fields = vllm_config.speculative_config, dataclasses.fields(cls.Options)
        given = {f.name: getattr(config, prefix + f.name, None) for f in fields}
        options = cls.Options(**{key: value for key, value in given.items() if value is not None})
    return cls(options)


def _grown(size: int, need: int) -> int:
    return size if need <= size else max(need, 2 * size)


def _check_new(request: Request, taken: bool) -> None:
    if request.slot < 0 or taken:
        raise ValueError(f"slot {request.slot} is {'taken' if taken else 'negative'} (request {request.request_id})")
    if not 0 <= request.num_output <= len(request.prompt):
        raise ValueError(f"request {request.request_id}: {request.num_output} outputs in {len(request.prompt)} tokens")


def _check_length(name: str, array: Int32Array, length: int) -> None:
    if len(array) != length:
        raise ValueError(f"{name} has {len(array)} entries, expected {length}")


def _check_limits(slots: Int32Array, limits: Int32Array) -> list[int]:
    _check_length("limits", limits, len(slots))
    most: list[int] = limits.tolist()
    if min(most, default=0) < 0:
        raise ValueError(f"limits must not be negative, got {limits!r}")
    return most


def _unknown(slots: Int32Array, live: Iterable[int]) -> ValueError:
    return ValueError(f"slots {sorted(set(slots.tolist()) - set(live))} have no request")


def _bad_offsets(offsets: Int32Array, tokens: Int32Array) -> ValueError:
    return ValueError(f"offsets {offsets!r} do not cut {len(tokens)} tokens")
