"""Batches as vLLM's side hands them to :mod:`vllm_specplug.host.lifecycle`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vllm_specplug.host.lifecycle import Rows


def batch(
    text: Mapping[str, Sequence[int]],
    emitted: Mapping[str, list[int]],
    drafted: Mapping[str, int] | None = None,
    limit: int = 2,
    **more: Any,
) -> Rows:
    """Requests that emitted ``emitted`` and now hold ``text``; each had ``drafted`` drafts and may get ``limit``."""
    ids = list(emitted)
    return Rows(
        rows=np.arange(len(ids), dtype=np.int32),
        ids=ids,
        emitted=list(emitted.values()),
        totals=np.array([len(text[i]) for i in ids], np.int32),
        drafted=np.array([(drafted or {}).get(i, 0) for i in ids], np.int32),
        limits=np.full(len(ids), limit, np.int32),
        **more,
    )
