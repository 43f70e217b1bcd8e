"""What a request says of its drafts: which ones its sampling parameters allow, and what its ``vllm_xargs`` ask for.

Of the sampling parameters, everything not named here is verified exactly on any tree.
"""

from __future__ import annotations

from typing import Any, Literal

#: Request-body field (``vllm_xargs``) that says what drafts for the request, see :mod:`.arms_in_one`.
ARM_ARG = "specplug"

#: Shapes of drafts a request may get.
Shape = Literal["tree", "chain", "none"]


def limits_for(params: Any) -> tuple[Shape, str]:
    """The most general drafts that a request with these ``SamplingParams`` may get, and why not trees ("" for trees).

    Holds for the life of the request, so it is asked once, at admission.
    """
    if getattr(params, "thinking_token_budget", None) is not None:
        # vLLM's budget keeper advances its state whenever it is asked for a row, so it can be asked once per step only.
        return "none", "thinking_token_budget"
    if params.structured_outputs is not None:
        # The scheduler checks a draft against the grammar, and masks its rows, as one chain.
        return "chain", "structured_outputs"
    return "tree", ""
