"""Which requests of a step attend part of their context, and how much of it: SparseVerify's in one engine.

Only rows that verify do: a request's last token and its draft tokens, where nothing of it is computed again. Prompts,
steps that compute accepted tokens again (after a preemption, or an exact refresh), short contexts and layers with a
sliding window are attended whole. The work is that of :mod:`.cpu_sparse` and :mod:`.gpu_sparse`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from vllm_specplug.host.tree_plan import StepPlan
from vllm_specplug.kernels.block_select import Selection, allocate
from vllm_specplug.kernels.unit_book import UnitBook
from vllm_specplug.proposers.base import Int32Array
from vllm_specplug.proposers.sparse_verify import SparseVerifyOptions

logger = logging.getLogger("vllm.specplug")

BoolArray = np.ndarray

# Contexts whose lengths differ by less share the heads' budgets.
_BUCKET = 1024


class Sums(Protocol):
    """Summaries of the units of all live requests, for the layers of a group.

    Attributes:
        selection: how units are chosen.
        book: which units of which request there are.
    """

    selection: Selection
    book: UnitBook

    @property
    def bytes(self) -> int:
        """Memory of all summaries."""

    def drop(self, requests: Iterable[str]) -> None:
        """Forget requests that ended or were preempted; unknown ones are ignored."""

    def rewind(self, request: str, tokens: int) -> None:
        """The cache holds something else from a token of a request on."""


S = TypeVar("S", bound=Sums)


class GroupSparse(Generic[S]):
    """The layers of one KV cache group; a platform adds how their choice is prepared.

    Attributes:
        sums: of the requests' contexts.
    """

    def __init__(self, owner: SparseAttention, sums: S, errors: np.ndarray | None, even: np.ndarray) -> None:
        """
        Args:
            errors: ``float32[F, L, kv_heads]`` of each share of a context that was tried; None: not calibrated.
            even: ``float32[L, kv_heads]`` relative budgets where there are no errors.
        """
        self.sums = sums
        self.owner = owner
        self._errors = errors
        self._even = even
        self._shares: dict[int, np.ndarray] = {}

    def shares(self, context: int) -> np.ndarray:
        """``float32[L, kv_heads]`` budget of each head in a context of so many tokens, relative to their mean."""
        if self._errors is None:
            return self._even
        bucket = max(context // _BUCKET, 1)
        if bucket not in self._shares:
            mean = self.sums.selection.budget(bucket * _BUCKET) / (bucket * _BUCKET)
            found = allocate(self.owner.fractions, self._errors.reshape(len(self._errors), -1), mean)
            self._shares[bucket] = (found / mean).astype(np.float32).reshape(self._even.shape)
        return self._shares[bucket]


G = TypeVar("G", bound=GroupSparse[Any])


class SparseAttention:
    """Sparse attention of one engine.

    Attributes:
        reason: why every layer attends everything; empty if some do not.
        ids: request ids by row of the runner's batch, of the present step.
        fractions: ``float32[F]`` shares of a context that calibration tried.
    """

    def __init__(
        self,
        options: SparseVerifyOptions,
        calibration: Mapping[str, Any] | None,
        applies: Callable[[str], bool] = lambda request: True,
    ) -> None:
        """
        Args:
            calibration: the part ``attention`` of a calibration (see :mod:`.sparse_calibration`); None: there is none.
            applies: whether a request, by its id, may be verified approximately.
        """
        self.reason = "the KV cache is not made yet"
        self.options = options
        self.selection: Selection = options.selection()
        self.ids: Sequence[str] = ()
        self.groups: list[GroupSparse[Any]] = []
        self._calibration = calibration
        self.fractions = np.array([] if calibration is None else calibration["fractions"], np.float32)
        self._applies = applies
        self._steps = self._rows = 0
        self._attended = 0.0

    def begin_attach(self) -> None:
        """The KV cache was made, or made again."""
        self.groups = []
        self.reason = "no layer attends its whole context"

    def add_group(
        self, impls: Mapping[str, Any], kv_heads: int, kind: type[G], make: Callable[[Selection], Sums]
    ) -> G | None:
        """Take part in the layers of a group.

        Args:
            impls: attention of each layer, by the layer's name.
            kv_heads: of each of them.
            kind: of group.
            make: the layers' summaries; a ValueError says why there can be none.

        Returns:
            None if they attend everything: they have a sliding window, or units or calibration do not fit (`reason`).
        """
        if any(_has_window(impl) for impl in impls.values()):
            return None
        names = list(impls)
        even = np.full((len(names), kv_heads), 0.0 if self.options.scorer == "streaming" else 1.0, np.float32)
        try:
            errors = self._errors(names, kv_heads)
            group = kind(self, make(self.selection), errors, even)
        except ValueError as error:
            self.reason = str(error)
            return None
        self.reason = ""
        anchors = self._anchors(names)
        for index, (name, impl) in enumerate(impls.items()):
            impl.layer = (index, index == 0 or name in anchors)
        self.groups.append(group)
        return group

    def _errors(self, names: list[str], kv_heads: int) -> np.ndarray | None:
        found = self._calibration
        if found is None or self.options.budgets == "uniform" or self.options.scorer == "streaming":
            return None
        places = _places(found, names)
        errors = np.array(found["errors"], np.float32)[:, places]
        if errors.shape[2] != kv_heads:
            raise ValueError(f"the calibration is of a model with {errors.shape[2]} KV heads, this one has {kv_heads}")
        return errors

    def _anchors(self, names: list[str]) -> set[str]:
        found = self._calibration
        if found is None or self.options.anchors == "all":
            return set(names)
        return set(found["anchors"])

    def rows(self, batch: Any, num_scheduled: Int32Array, sizes: Int32Array) -> BoolArray | None:
        """Which requests of a step attend part of their context.

        Args:
            batch: of vLLM's runner.
            num_scheduled, sizes: ``int32[B]`` rows of each request in the step, and those that verify, its last token
                included.

        Returns:
            ``bool[B]``, by row of the batch; None if none does.
        """
        if not self.groups:
            return None
        n = len(sizes)
        computed = batch.num_computed_tokens_cpu[:n]
        # In a step that computes accepted tokens again there are more rows than that.
        verify: BoolArray = num_scheduled[:n] == sizes
        for row in np.flatnonzero(~verify).tolist():
            self.rewind(batch.req_ids[row], int(computed[row]))
        sparse: BoolArray = verify & (computed > self.selection.dense_below)
        sparse &= computed >= batch.num_prompt_tokens[:n]
        if sparse.any():
            self.ids = batch.req_ids
            sparse &= np.fromiter((self._applies(i) for i in self.ids), np.bool_, n)
        return sparse if sparse.any() else None

    def drop(self, requests: Iterable[str]) -> None:
        """Forget requests that ended or were preempted."""
        for group in self.groups:
            group.sums.drop(requests)

    def rewind(self, request: str, tokens: int) -> None:
        """The cache holds something else from a token of a request on."""
        for group in self.groups:
            group.sums.rewind(request, tokens)

    def count(self, plan: StepPlan, attended: float) -> None:
        """Count a group's step, which attended this share of the units before the tails."""
        self._steps += 1
        assert plan.sparse is not None
        self._rows += int(plan.trees.sizes.numpy()[plan.sparse].sum())
        self._attended += attended

    def stats(self) -> dict[str, float]:
        """Counters by name."""
        sums = [group.sums for group in self.groups]
        return {
            "sparse_attention_steps": float(self._steps),
            "sparse_attention_rows": float(self._rows),
            "sparse_attention_share": self._attended / max(self._steps, 1),
            "sparse_summary_bytes": float(sum(s.bytes for s in sums)),
            "sparse_units_read": float(sum(s.book.units_read for s in sums)),
        }


def _has_window(impl: Any) -> bool:
    """Whether a layer has a sliding window: vLLM's backends keep how far it reaches, or (left, right); -1: none."""
    left = impl.sliding_window[0] if isinstance(impl.sliding_window, tuple) else impl.sliding_window
    return left is not None and left >= 0


def _places(calibration: Mapping[str, Any], names: list[str]) -> list[int]:
    """Where these layers are in a calibration.

    Raises:
        ValueError: one is missing.
    """
    known = {name: i for i, name in enumerate(calibration["layers"])}
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"the calibration is of another model: it does not know layer {missing[0]}")
    return [known[name] for name in names]
