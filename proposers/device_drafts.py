"""Chains drafted on the device, without a word to the host: for engines that schedule a step before the last one ended.

What follows the longest suffix that occurred before in the request's own text (arXiv 2304.04487); where there is none,
what the target ranked highest after each token when it last saw it (the first column of Token Recycling's matrix,
arXiv 2408.08696). Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm_specplug.kernels import suffix_match_triton
from vllm_specplug.kernels.recycling_matrix_triton import RecycleClaims, RecycleTemplate, recycle_draft, recycle_update
from vllm_specplug.kernels.suffix_match_triton import suffix_match

# Tokens of a match. One token says little where there is no second guess to choose instead; longer matches than this
# are rarely told apart by what follows.
SHORTEST, LONGEST = 2, 8


class DeviceDrafts:
    """Drafts of all requests of an engine; see the module.

    Attributes:
        length: draft tokens per request.
        nbytes: memory held on the device.
    """

    def __init__(
        self, max_requests: int, vocab: int, length: int, device: torch.device | str, match: bool, recycle: bool
    ) -> None:
        """
        Args:
            match: draft from the request's own text.
            recycle: draft from what the target ranked highest before.

        Raises:
            ValueError: neither is wanted.
        """
        if not match and not recycle:
            raise ValueError("match or recycle must be set")
        self.length = length
        on: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self._workspace = suffix_match_triton.Workspace(max_requests, device) if match else None
        self._matched = torch.zeros(max_requests, **on)
        self._copied = torch.full((max_requests, length), -1, **on)
        self._matrix = torch.full((vocab if recycle else 0, 1), -1, **on)
        self._claims = RecycleClaims(vocab, device) if recycle else None
        self._chain = RecycleTemplate(range(-1, length - 1), [0] * length, device)
        self._guessed = torch.full((max_requests, length), -1, **on)

    @property
    def nbytes(self) -> int:
        held = [self._matched, self._copied, self._matrix, self._guessed]
        return sum(tensor.nbytes for tensor in held) + 8 * len(self._matrix)

    def observe(self, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Learn from the rows of a step, accepted or not.

        Args:
            tokens: ``int[R]`` token that each row shows the target.
            logits: ``[R, vocab]`` what the target said after it, before anything was done to it.
        """
        if self._claims is not None and len(tokens):
            # A row beyond the vocabulary (padding) is not kept.
            recycle_update(self._matrix, tokens.int(), logits.argmax(-1, keepdim=True), self._claims)

    def propose(
        self, histories: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor, last: torch.Tensor
    ) -> torch.Tensor:
        """Draft for some requests.

        Args:
            histories: ``int32[slots, max_len]`` tokens of every request, the last emitted included.
            lengths: ``int32[slots]`` how many there are.
            rows: ``int[n]`` slots of the requests to draft for.
            last: ``int[n]`` their last tokens.

        Returns:
            ``int64[n, length]``; where nothing is known the last token again, which is as good as any other.
        """
        count = len(rows)
        drafts = torch.full_like(self._copied[:count], -1)
        if self._claims is not None:
            recycle_draft(self._matrix, last.int(), self._chain, self._guessed[:count])
            drafts = self._guessed[:count]
        if self._workspace is not None:
            copied, matched = self._copied[:count], self._matched[:count]
            suffix_match(histories, lengths, copied, matched, self._workspace, SHORTEST, LONGEST, rows)
            drafts = torch.where(matched[:, None] > 0, copied, drafts)
        return torch.where(drafts >= 0, drafts, last.int()[:, None]).long()
