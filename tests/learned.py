"""Proposers that have learned something, and what of it two of them have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
from proposer_steps import talk
from vllm_specplug.proposers.auto import AutoOptions, Fused
from vllm_specplug.proposers.base import Proposer

from vllm_specplug import options

SMALL = {"store_bytes": 1 << 20, "table_bytes": 1 << 16}


def make(cls: type[Proposer] = Fused, **settings: object) -> Any:
    return cls(options.parse(AutoOptions, SMALL | settings, "specplug.auto"))


def teach(proposer: Proposer, requests: int = 12, seed: int = 0) -> list[int]:
    """Requests of two tenants in a small random language; returns a prompt in it."""
    rng = np.random.default_rng(seed)
    words = [rng.integers(0, 50, size=rng.integers(2, 6)).tolist() for _ in range(12)]

    def text(length: int) -> list[int]:
        return [t for w in rng.zipf(1.5, size=length) for t in words[min(w, 12) - 1]]

    for number in range(requests):
        talk(proposer, 0, text(4), text(12), namespace="ab"[number % 2])
    return text(6)


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        if name.endswith("/rows"):  # in any order
            array, other[name] = (x[np.lexsort(x.T)] for x in (array, other[name]))
        np.testing.assert_array_equal(array, other[name], err_msg=name)
