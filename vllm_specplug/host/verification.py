"""Verifies draft trees and chains, exactly as a server without speculation would have decoded.

The rule for drafts that are not sampled themselves: at a row, draw one token from the target's processed distribution;
if a child of the row holds it, emit it and go on there, else emit it and stop. Every token is drawn by vLLM's own
sampler, from the logits of a row whose whole past is known, so penalties, bad words, logits processors, filters,
logprobs and the request's own random generator act as they do without speculation, one draw per emitted token.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_specplug.host import sampling_params
from vllm_specplug.kernels import tree_walk
from vllm_specplug.proposers.base import Int32Array

#: Rows whose logits are converted to float32 at once: more do not fit the processor's caches.
_CONVERTED_ROWS = 32


@dataclass(frozen=True, slots=True)
class Verified:
    """What one step emitted, for its ``B`` requests in batch order; ``W`` is the most tokens any of them emitted.

    Attributes:
        output: vLLM's own form of it; tokens ``int32[B, W]``, -1 after the last.
        paths: ``int32[B, W]`` the row, among its request's rows, that emitted the k-th token; -1 after the last.
        lengths: ``int32[B]`` tokens emitted, at least 1.
    """

    output: Any
    paths: Int32Array
    lengths: Int32Array


@dataclass(frozen=True, slots=True)
class _Batch:
    """The drafts of a step; see :mod:`vllm_specplug.kernels.tree_walk` for ``sizes``, ``parents`` and ``drafts``."""

    sizes: Int32Array
    parents: Int32Array
    drafts: Int32Array

    def tables(self) -> tuple[Int32Array, Int32Array, Int32Array]:
        """Room for the tokens, paths and lengths of a walk."""
        shape = (len(self.sizes), int(self.sizes.max()) + 1)
        return np.full(shape, -1, np.int32), np.full(shape, -1, np.int32), np.zeros(shape[0], np.int32)


_CHAINS = np.zeros(0, np.int32)


def warm_up() -> None:
    """Compile the walks."""
    for parents in (_CHAINS, np.array([-1, 0], np.int32)):
        batch = _Batch(np.ones(1, np.int32), parents, np.zeros(1, np.int32))
        one = np.zeros(1, np.int64)
        tree_walk.walk(batch.sizes, parents, batch.drafts, np.zeros(2, np.int64), *batch.tables())
        tree_walk.advance(
            one,
            np.ones(1, np.int32),
            0,
            one,
            batch.sizes,
            parents,
            batch.drafts,
            np.zeros(1, np.int32),
            *batch.tables(),
            np.zeros(1, np.int64),
        )


def sample_plainly(metadata: Any) -> None:
    """Make a step's sampler calls those of a server without speculation.

    vLLM's keeper of thinking budgets looks for a request's row elsewhere in the batch where the server speculates.
    Here requests with a budget get no drafts (see :mod:`vllm_specplug.host.eligibility`), and every request has one row
    when the keeper is asked.
    """
    holder = metadata.thinking_budget_state_holder
    if holder is not None:
        holder.in_spec_mode = False


def verify(
    runner: Any,
    logits: torch.Tensor,
    spec_decode_metadata: Any,
    row_parents: Int32Array | None,
    likeliest: Int32Array | None = None,
) -> Verified:
    """Emit the tokens of a step that has drafts.

    Args:
        runner: vLLM's model runner.
        logits: ``[R, vocab]``; request ``i`` has ``num_draft_tokens[i] + 1`` rows, its last token's first. May be
            modified.
        spec_decode_metadata: vLLM's ``SpecDecodeMetadata`` of the step.
        row_parents: ``int32[R]`` each row's parent among its request's rows, -1 for the first; None: all are chains.
        likeliest: ``int32[R]`` the likeliest token of each row, of equally likely ones the first, if it is known.
    """
    batch = _Batch(
        np.array(spec_decode_metadata.num_draft_tokens, np.int32),
        _CHAINS if row_parents is None else row_parents,
        spec_decode_metadata.draft_token_ids.cpu().numpy(),
    )
    metadata = runner.input_batch.sampling_metadata
    if _is_argmax(metadata):
        return _greedy(runner.sampler, logits, batch, likeliest)
    return _by_level(runner.sampler, logits, metadata, batch)


def _is_argmax(metadata: Any) -> bool:
    """Whether the sampler would only take the likeliest token of every row."""
    holder = metadata.thinking_budget_state_holder
    return bool(
        metadata.all_greedy
        and metadata.no_penalties
        and metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and not (holder is not None and holder.has_tracked_requests())
        and not any(map(sampling_params.is_active, metadata.logitsprocs.non_argmax_invariant))
    )


def _greedy(sampler: Any, logits: torch.Tensor, batch: _Batch, likeliest: Int32Array | None) -> Verified:
    if likeliest is not None:
        drawn = torch.from_numpy(likeliest.astype(np.int64))
    elif logits.dtype == torch.float32 or logits.device.type != "cpu":
        drawn = sampler.greedy_sample(logits.to(torch.float32))
    else:
        converted = torch.empty((_CONVERTED_ROWS, logits.shape[1]), dtype=torch.float32)
        parts = logits.split(_CONVERTED_ROWS)
        drawn = torch.cat([sampler.greedy_sample(converted[: len(rows)].copy_(rows)) for rows in parts])
    tokens, paths, lengths = batch.tables()
    tree_walk.walk(batch.sizes, batch.parents, batch.drafts, drawn.cpu().numpy(), tokens, paths, lengths)
    return _verified(logits, tokens, paths, lengths, None)


def _by_level(sampler: Any, logits: torch.Tensor, metadata: Any, batch: _Batch) -> Verified:
    """Draw the tokens of all requests, then the second tokens of those that go on, and so forth."""
    tokens, paths, lengths = batch.tables()
    starts = np.cumsum(batch.sizes, dtype=np.int64) - batch.sizes + np.arange(len(batch.sizes))
    rows = np.zeros(len(batch.sizes), np.int32)
    active = np.arange(len(batch.sizes))
    collected = []
    at_level = metadata
    for level in range(tokens.shape[1]):
        index = torch.from_numpy(starts[active] + rows[active]).to(logits.device)
        # Advanced indexing copies: the sampler changes its logits in place, and may change only these.
        output = sampler(logits=logits[index], sampling_metadata=at_level)
        drawn = output.sampled_token_ids[:, 0].cpu().numpy()
        if output.logprobs_tensors is not None:
            collected.append((level, active, output.logprobs_tensors))
        following = np.empty(len(starts), np.int64)
        count = tree_walk.advance(
            active,
            drawn,
            level,
            starts,
            batch.sizes,
            batch.parents,
            batch.drafts,
            rows,
            tokens,
            paths,
            lengths,
            following,
        )
        active = following[:count].copy()
        if not count:
            break
        at_level = _metadata_of(metadata, active, tokens[:, : level + 1], logits.device)
        if at_level is None:
            break
    return _verified(logits, tokens, paths, lengths, _logprobs(collected, len(starts), int(lengths.max())))


def _metadata_of(metadata: Any, active: np.ndarray, emitted: Int32Array, device: torch.device) -> Any:
    """The step's ``SamplingMetadata`` for some of its requests, after each emitted ``emitted[i]``.

    None if the batch holds a logits processor that cannot be asked about later tokens: the first token is always
    exact, so requests emit that one then.
    """
    index = torch.from_numpy(active).to(device)
    new = {old: row for row, old in enumerate(active.tolist())}

    def pick(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[index]

    def renumber(by_request: dict[int, Any] | None) -> dict[int, Any] | None:
        return by_request and {new[i]: value for i, value in by_request.items() if i in new}

    processors = sampling_params.later_processors(metadata.logitsprocs, index, emitted.shape[1])
    if processors is None:
        return None
    bad_words = renumber(metadata.bad_words_token_ids)
    output_token_ids = []
    if metadata.output_token_ids and (bad_words or not metadata.no_penalties):
        past = metadata.output_token_ids
        output_token_ids = [past[i] + emitted[i].tolist() for i in new]
    return dataclasses.replace(
        metadata,
        temperature=pick(metadata.temperature),
        top_p=pick(metadata.top_p),
        top_k=pick(metadata.top_k),
        generators=renumber(metadata.generators),
        prompt_token_ids=None if metadata.no_penalties else pick(metadata.prompt_token_ids),
        frequency_penalties=pick(metadata.frequency_penalties),
        presence_penalties=pick(metadata.presence_penalties),
        repetition_penalties=pick(metadata.repetition_penalties),
        output_token_ids=output_token_ids,
        allowed_token_ids_mask=pick(metadata.allowed_token_ids_mask),
        bad_words_token_ids=bad_words,
        logitsprocs=processors,
        logprob_token_ids=renumber(metadata.logprob_token_ids),
        spec_token_ids=None,
        # Requests with a thinking budget have no drafts, so none of them is here.
        thinking_budget_state_holder=None,
    )


def _logprobs(collected: list[tuple[int, np.ndarray, Any]], requests: int, width: int) -> Any:
    """The levels' ``LogprobsTensors`` as one with a row per request and emitted token; rows of no token are zero."""
    if not collected:
        return None
    from vllm.v1.outputs import LogprobsTensors

    ids, values, ranks = (collected[0][2][k] for k in range(3))
    # A level whose requests name tokens to report may be wider than another.
    entries = max(level[2].logprobs.shape[1] for level in collected)
    all_ids = ids.new_zeros((requests, width, entries))
    all_values = values.new_full((requests, width, entries), float("-inf"))
    all_ranks = ranks.new_zeros((requests, width))
    for level, active, part in collected:
        index = torch.from_numpy(active).to(ids.device)
        n = part.logprobs.shape[1]
        all_ids[index, level, :n] = part.logprob_token_ids
        all_values[index, level, :n] = part.logprobs
        all_ranks[index, level] = part.selected_token_ranks
    return LogprobsTensors(all_ids.flatten(0, 1), all_values.flatten(0, 1), all_ranks.flatten())


def _verified(
    logits: torch.Tensor, tokens: Int32Array, paths: Int32Array, lengths: Int32Array, logprobs: Any
) -> Verified:
    from vllm.v1.outputs import SamplerOutput

    width = int(lengths.max())
    emitted = torch.from_numpy(tokens[:, :width]).to(logits.device)
    return Verified(SamplerOutput(emitted, logprobs), paths[:, :width], lengths)
