"""Drafts copied from where a request's last tokens occurred before, as in prompt lookup (arXiv 2304.04487).

Of a history's suffixes of ``shortest`` to ``longest`` tokens the longest that occurs earlier is taken, and of its
occurrences the *latest*, for what was written last resembles best what comes next. An occurrence may overlap the
suffix, but a token must follow it in the history. What follows it is the draft. Where the history ends it goes on with
the draft itself: a match some tokens back says that the text repeats itself with that period.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]


def suffix_match_reference(
    tokens: Int32Array, lengths: Int32Array, shortest: int, longest: int, drafts: int
) -> tuple[Int32Array, Int32Array]:
    """Drafts of every request, found by trying every suffix at every place.

    Args:
        tokens: ``int32[n, max_len]`` histories; what is behind a length is never read.
        lengths: ``int32[n]`` tokens of each history, at most ``max_len``; 0 or less: no request.
        shortest, longest: tokens of a match, ``1 <= shortest <= longest``.
        drafts: most tokens to copy.

    Returns:
        ``int32[n, drafts]`` the drafts, -1 where nothing matched, and ``int32[n]`` the matches' lengths, 0 there.
    """
    found = np.full((len(tokens), drafts), -1, np.int32)
    matched = np.zeros(len(tokens), np.int32)
    for i, length in enumerate(lengths):
        history = tokens[i, : max(0, int(length))].tolist()
        for size in range(min(longest, len(history) - 1), shortest - 1, -1):
            suffix = history[-size:]
            ends = [end for end in range(size, len(history)) if history[end - size : end] == suffix]
            if ends:
                text = history + [0] * drafts
                for k in range(len(history), len(text)):
                    text[k] = text[k - (len(history) - ends[-1])]
                found[i] = text[ends[-1] : ends[-1] + drafts]
                matched[i] = size
                break
    return found, matched
