"""What every proposer sees and returns: requests, step results, draft forests, and their lifecycle.

Nothing here imports vLLM. ``vllm_specplug.host`` turns the engine's state into these arrays and the
returned :class:`DraftForest` into vLLM's draft-token lists, so a proposer is tested in milliseconds.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .saved_state import Array

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
Int8Array = npt.NDArray[np.int8]

#: ``DraftForest.source`` values: which source a draft token came from. New sources take the next number.
SOURCE_NAMES = ("context", "store", "recycling", "siblings")
SOURCE_CONTEXT = 0  # this request's own prompt and output
SOURCE_STORE = 1  # outputs of earlier requests
SOURCE_RECYCLING = 2  # the target's own second guesses at earlier rows
SOURCE_SIBLINGS = 3  # what samples of the same prompt have written so far


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the engine admitted it.

    Attributes:
        slot: small integer the host gave this request; identifies it in every array until
            :meth:`Proposer.remove_request`, after which the host may give it to another request.
        request_id: the engine's id, unique among live requests.
        prompt: ``int32[P]`` prompt token ids; placeholders of multi-modal inputs are negative.
            A request that resumes with output already produced carries those tokens here too,
            counted by ``num_output``.
        num_output: how many trailing tokens of ``prompt`` are output rather than prompt.
        max_tokens: the most tokens, prompt included, that the request can ever hold.
        temperature: sampling temperature; 0 means greedy.
        namespace: learned state may be shared only between requests of equal namespace (tenant, LoRA).
        group: requests that are samples of one prompt (``n > 1``) share it; None for a lone request.
        branching: whether the host can verify a tree for this request; if False, only chains may be drafted for it.
        extra_args: the request's ``vllm_xargs``; read-only.
    """

    slot: int
    request_id: str
    prompt: Int32Array
    num_output: int = 0
    max_tokens: int = 1 << 30
    temperature: float = 0.0
    namespace: str = ""
    group: str | None = None
    branching: bool = True
    extra_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one target step computed. A row is one token of a request that decodes: its last one, or a draft token.

    Attributes:
        requests: requests that decoded.
        rows: their rows, at least ``requests``.
        context: tokens they hold, summed over requests.
        row_context: the same summed over rows, so a request counts once for each of its rows.
        prefill: prompt tokens computed in the step.
        prefill_context: tokens before each of these, summed.
    """

    requests: int
    rows: int
    context: int
    row_context: int
    prefill: int = 0
    prefill_context: int = 0


@dataclass(frozen=True, slots=True)
class Others:
    """What requests that are not the proposer's had in a step, where several proposers draft in one engine.

    Attributes:
        requests: that decoded.
        rows: draft tokens verified for them.
        context: tokens they hold, summed over requests.
        tokens: emitted for them.
    """

    requests: int = 0
    rows: int = 0
    context: int = 0
    tokens: int = 0


#: All requests are the proposer's.
NO_OTHERS = Others()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the target model decided in one step, for the ``n`` requests that emitted tokens in it.

    Attributes:
        slots: ``int32[n]``, distinct.
        tokens: ``int32[T]`` emitted tokens of all requests, concatenated: the accepted draft tokens
            in order, then the target's own next token.
        offsets: ``int32[n + 1]``; request ``i`` emitted ``tokens[offsets[i]:offsets[i + 1]]``, at least one.
        num_drafted: ``int32[n]`` draft tokens of this proposer that the target verified.
        num_accepted: ``int32[n]`` of them accepted, ``<= offsets[i + 1] - offsets[i] - 1``.
        row_tokens: ``int32[R]`` input token of each verified row, rejected rows included; None unless the
            proposer sets ``wants_topk``.
        row_offsets: ``int32[n + 1]`` rows of request ``i``: its last token (the root), then one row per draft token in
            the order drafted; None like ``row_tokens``.
        row_parents: ``int32[R]`` the row's parent among its request's rows, -1 for the root; None like ``row_tokens``.
        topk_ids: ``int32[R, k]`` the target's own best next tokens at each row, best first, before any
            sampling processing; None like ``row_tokens``.
        topk_logprobs: ``float32[R, k]`` their natural log-probabilities at temperature 1; None like ``row_tokens``.
        load: what the step computed, requests that emitted nothing included; None if the host does not say.
        seconds: from the end of the previous step to the end of this one, the engine's own work included; NaN where
            the engine was idle in between, or the host does not say.
        overhead: seconds of these that drafting took, of the host and the proposer, verification not included; or NaN.
    """

    slots: Int32Array
    tokens: Int32Array
    offsets: Int32Array
    num_drafted: Int32Array
    num_accepted: Int32Array
    row_tokens: Int32Array | None = None
    row_offsets: Int32Array | None = None
    row_parents: Int32Array | None = None
    topk_ids: Int32Array | None = None
    topk_logprobs: Float32Array | None = None
    load: StepLoad | None = None
    seconds: float = math.nan
    overhead: float = math.nan


@dataclass(frozen=True, slots=True)
class DraftForest:
    """One draft tree per request of a batch, as flat arrays.

    Parents come before children and siblings have distinct tokens. A chain is the tree whose every
    parent is the node before it.

    Attributes:
        tokens: ``int32[N]`` drafted token ids.
        parents: ``int32[N]`` index of the parent within the same request's nodes; -1 is the request's last token.
        probs: ``float32[N]`` calibrated probability that the node is reached and accepted; never rises along a path.
        sources: ``int8[N]`` index into :data:`SOURCE_NAMES`.
        offsets: ``int32[n + 1]`` nodes of request ``i`` are ``offsets[i]:offsets[i + 1]``; may be empty.
        matched: ``int32[n]`` how many of the request's last tokens the draft's source has seen in a row before; None
            if the proposer does not match text.
    """

    tokens: Int32Array
    parents: Int32Array
    probs: Float32Array
    sources: Int8Array
    offsets: Int32Array
    matched: Int32Array | None = None

    def check_integrity(self, limits: Int32Array | None = None) -> None:
        """Raise ``ValueError`` naming the first broken invariant; meant for tests and for third-party proposers."""
        n = len(self.offsets) - 1
        size = len(self.tokens)
        if n < 0 or self.offsets[0] != 0 or self.offsets[-1] != size or np.any(np.diff(self.offsets) < 0):
            raise ValueError(f"offsets must rise from 0 to {size}, got {self.offsets!r}")
        for name in ("parents", "probs", "sources"):
            if len(getattr(self, name)) != size:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {size} tokens")
        for i in range(n):
            lo, hi = int(self.offsets[i]), int(self.offsets[i + 1])
            if limits is not None and hi - lo > limits[i]:
                raise ValueError(f"request {i} has {hi - lo} draft tokens, limit {limits[i]}")
            seen: set[tuple[int, int]] = set()
            for j in range(lo, hi):
                parent = int(self.parents[j])
                if not -1 <= parent < j - lo:
                    raise ValueError(f"request {i} node {j - lo}: parent {parent} does not come before it")
                edge = (parent, int(self.tokens[j]))
                if edge in seen:
                    raise ValueError(f"request {i} node {j - lo}: duplicate sibling token {edge[1]}")
                seen.add(edge)
                bound = 1.0 if parent < 0 else float(self.probs[lo + parent])
                if not 0.0 <= float(self.probs[j]) <= bound + 1e-6:
                    raise ValueError(f"request {i} node {j - lo}: prob {self.probs[j]} not in [0, {bound}]")


class Proposer(abc.ABC):
    """Drafts tokens for the target model to verify. Batch-level: no call is made per request on a step's path.

    Lifecycle, all calls from one thread: ``warm_up`` once, then any mix of ``add_request``, ``observe``,
    ``propose`` and ``remove_request``, then ``close``. Each step the host calls, in this order:
    ``remove_request`` for ended requests, ``add_request`` for new ones, ``observe``, ``propose``.

    Slots: ``add_request`` is called once before a slot first appears in ``observe`` or ``propose``, and the
    slot's state must be forgotten in ``remove_request``, for the same slot may come back at once as another
    request. A preempted request keeps its slot. Array arguments are borrowed: copy what outlives the call.

    A method that raises costs the affected requests their drafts, never the server (the host catches it).
    """

    #: Section of ``additional_config["specplug"]`` and name in logs, metrics and the registry.
    name: ClassVar[str]
    #: Frozen dataclass of options (see ``vllm_specplug.options``); the proposer is built as ``cls(options)``.
    Options: ClassVar[type]
    #: True if ``observe`` needs the target's top-k at every verified row.
    wants_topk: bool = False
    #: How many, where ``wants_topk`` is set.
    topk: int = 8
    #: True if its trees are never deeper than :attr:`Request.max_tokens` allows. Then the host lets it draft as many
    #: nodes as ever; else no more than the request has tokens left to emit.
    bounds_depth: ClassVar[bool] = False
    #: False if its nodes' ``probs`` are no probabilities; a budget then learns them (see :mod:`.acceptance`).
    calibrated: ClassVar[bool] = True
    #: Options that suit it inside a budget, which cuts by itself; they hold where the user sets none of its options.
    under_budget: ClassVar[Mapping[str, Any]] = {}
    #: Nodes less probable than this are not worth drafting: a budget around the proposer sets it before ``propose``.
    floor: float = 0.0
    #: What else was in the step being observed, and what the next one may be taken to have beside this proposer's
    #: drafts: the host sets it before ``observe`` and ``propose``.
    others: Others = NO_OTHERS
    #: False for proposers whose use changes the output distribution.
    lossless: ClassVar[bool] = True

    @abc.abstractmethod
    def add_request(self, request: Request) -> None:
        """Admit a request."""

    @abc.abstractmethod
    def observe(self, step: StepResult) -> None:
        """Learn from what the target emitted."""

    @abc.abstractmethod
    def propose(self, slots: Int32Array, limits: Int32Array) -> DraftForest:
        """Draft for ``slots`` (``int32[n]``), at most ``limits[i]`` (``int32[n]``, >= 0) nodes for the i-th."""

    @abc.abstractmethod
    def remove_request(self, slot: int) -> None:
        """Forget a request that finished or was aborted."""

    def asleep(self, requests: int, new: int) -> bool:
        """Whether the host may leave this proposer alone in this step, in which ``requests`` requests emitted tokens,
        ``new`` of them never seen here. Asked once per step, before ``observe``. What is emitted meanwhile is shown to
        ``observe`` later, before anything else, without drafts, top-k or times. Default: never."""
        return False

    def state(self) -> Mapping[str, Array | Iterator[Array]]:
        """Copies of everything learned that another process can go on with, by name (a path, ``mixture/weights``).
        No addresses, nothing of live requests. What takes long to copy comes as an iterator, see
        :data:`.saved_state.State`. Default: nothing."""
        return {}

    def restore(self, state: Mapping[str, Array]) -> None:  # noqa: B027 - an optional hook
        """Take over what :meth:`state` of a proposer of this class returned, as whole arrays (perhaps read-only). It
        may have been in another process, with other options. Called at most once, before the first request. Raises
        ``ValueError`` if they do not fit, and has changed nothing then. Default: ignored."""

    @classmethod  # noqa: B027 - an optional hook
    def check_installed(cls) -> None:
        """Raise ``vllm_specplug.options.OptionError`` if something it needs is missing; asked before the server
        starts. Default: nothing is."""

    def warm_up(self) -> None:  # noqa: B027 - an optional hook
        """Do slow one-time work (compilation) before the first request. Default: nothing."""

    def stats(self) -> dict[str, float]:
        """Counters and sizes for metrics, e.g. ``store_bytes``. Default: none."""
        return {}

    def close(self) -> None:  # noqa: B027 - an optional hook
        """Release what the garbage collector cannot. Default: nothing."""
