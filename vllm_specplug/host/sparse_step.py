"""What the sparse parts of one engine are told of the coming forward pass: which of its rows verify drafts.

Imports no vLLM. The attention part reads the draft trees' plan instead, which says more.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_specplug.proposers.base import Int32Array


@dataclass(slots=True)
class SparseStep:
    """Filled by the host before each forward pass, read by the layers' hooks, emptied after it.

    Attributes:
        groups: ``int32[n, 2]`` first row, among all rows of the step, and number of rows of each decoding request: its
            last token and its draft tokens. None: the step is computed exactly, for it has none or is a refresh.
        num_rows: rows of the whole step; those of no group belong to prompts and are computed exactly.
    """

    groups: Int32Array | None = None
    num_rows: int = 0

    def clear(self) -> None:
        """Forward passes are exact from now on."""
        self.groups, self.num_rows = None, 0
