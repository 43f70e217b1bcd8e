"""Draft trees grown on the device, without a word to the host: for engines that schedule a step before the last ended.

Two sources: what followed the longest suffix that occurred before in the request's own text (arXiv 2304.04487), and
what the target ranked highest after each token when it last saw it (Token Recycling's matrix, arXiv 2408.08696). The
tree that both make has one of a few shapes (:mod:`.device_shapes`), by how long the match is. Nothing here waits for
the device.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm_specplug.kernels import suffix_match_triton
from vllm_specplug.kernels.recycling_matrix_triton import RecycleClaims, RecycleShapes, recycle_update, shaped_draft
from vllm_specplug.kernels.suffix_match_triton import suffix_match

from .device_shapes import shape

# Tokens of a match, and guesses kept per token. Longer matches are rarely told apart by what follows them.
SHORTEST, LONGEST, GUESSES = 1, 8, 8


class DeviceDrafts:
    """Drafts of all requests of an engine; see the module.

    Attributes:
        length: draft nodes per request. Any first ones of them are a tree as well.
        trees: ``int32[max_requests, length]`` parents of the draft of each slot, as `tree_rows` takes them.
        nbytes: memory held on the device.
    """

    def __init__(
        self,
        max_requests: int,
        vocab: int,
        length: int,
        device: torch.device | str,
        match: bool,
        recycle: bool,
        branching: bool = True,
    ) -> None:
        """
        Args:
            match: draft from the request's own text.
            recycle: draft from what the target ranked highest before.
            branching: whether drafts may branch; else all are chains.

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
        # Without guesses there is nothing to branch to, and a chain takes the best one only.
        kinds = (False, True) if recycle and branching else (False, False)
        self._guesses = GUESSES if kinds[1] else 1
        self._matrix = torch.full((vocab if recycle else 0, self._guesses), -1, **on)
        self._claims = RecycleClaims(vocab, device) if recycle else None
        self._shapes = RecycleShapes([shape(m, length, kind) for kind in kinds for m in range(LONGEST + 1)], device)
        self._branching = torch.zeros(max_requests, **on)
        self._tokens = torch.full((max_requests, length), -1, **on)
        self.trees = torch.arange(length, **on).repeat(max_requests, 1)

    @property
    def nbytes(self) -> int:
        held = [self._matched, self._copied, self._matrix, self._tokens, self.trees]
        return sum(tensor.nbytes for tensor in held) + 8 * len(self._matrix)

    def add_request(self, slot: int, branching: bool) -> None:
        """A request begins in a slot; ``branching``: whether its drafts may."""
        self._branching[slot] = int(branching)

    def warm_up(self, histories: torch.Tensor, lengths: torch.Tensor) -> None:
        """Compile everything before the first request; see :meth:`propose`. Nothing is learned."""
        none = torch.full((1,), -1, dtype=torch.int32, device=self.trees.device)
        if self._claims is not None:
            recycle_update(self._matrix, none, none.long().expand(1, self._guesses).contiguous(), self._claims)
        self.propose(histories, lengths, (none + 1).long(), none.long())

    def observe(self, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Learn from the rows of a step, accepted or not.

        Args:
            tokens: ``int[R]`` token that each row shows the target; negative: none.
            logits: ``[R, vocab]`` what the target said after it, before anything was done to it.
        """
        if self._claims is not None and len(tokens):
            # A row beyond the vocabulary (padding) is not kept.
            best = logits.topk(min(self._guesses, logits.shape[1]), dim=-1).indices
            if best.shape[1] < self._guesses:
                best = torch.nn.functional.pad(best, (0, self._guesses - best.shape[1]), value=-1)
            recycle_update(self._matrix, tokens.int(), best, self._claims)

    def propose(
        self, histories: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor, last: torch.Tensor
    ) -> torch.Tensor:
        """Draft for some requests. The shapes of their drafts are in :attr:`trees` from then on.

        Args:
            histories: ``int32[max_requests, max_len]`` tokens of every slot, the last emitted included.
            lengths: ``int32[max_requests]`` how many there are.
            slots: ``int[n]`` slots of the requests to draft for.
            last: ``int[n]`` their last tokens.

        Returns:
            ``int64[n, length]``; where nothing is known the last token again, which is as good as any other.
        """
        count = len(slots)
        roots = last.int()
        copied, matched, tokens = self._copied[:count], self._matched[:count], self._tokens[:count]
        if self._workspace is not None:
            suffix_match(histories, lengths, copied, matched, self._workspace, SHORTEST, LONGEST, slots)
        which = matched + self._branching[slots] * (LONGEST + 1)
        shaped_draft(self._matrix, roots, copied, self._shapes, which, tokens, slots, self.trees)
        return torch.where(tokens >= 0, tokens, roots[:, None]).long()
