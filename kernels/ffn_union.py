"""A gated feed-forward layer over the channels that some row's gate opens: what the result is.

Channel ``i`` of ``SiLU(gate) * up`` is skipped for a row where ``|SiLU(gate_i)| < tau`` (the test of CATS, arXiv
2404.08763). Several rows read each weight once, so what is skipped for all of them, and no more, saves memory traffic:
the rows' channels are united, and a row also keeps those channels that only other rows need. They are read anyway, and
keeping them brings the row nearer to the whole layer. `ffn_union_reference` is the definition that the compiled kernel
is tested against.
"""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16)


def ffn_union_reference(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, tau: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output and which channels it was computed from; float32 throughout, rounded once at the end.

    Args:
        x: ``[T, H]`` rows.
        gate, up: ``[I, H]`` projections.
        down: ``[H, I]`` projection.
        tau: a channel is united where ``not |SiLU(gate)| < tau`` for some row (so NaN opens it); 0: all channels.

    Returns:
        ``[T, H]`` of x's dtype, and ``bool[I]``, the union.
    """
    rows = x.float()
    act = torch.nn.functional.silu(rows @ gate.float().T)
    union = ~(act.abs() < tau).all(0)
    hidden = act[:, union] * (rows @ up[union].float().T)
    return (hidden @ down[:, union].float().T).to(x.dtype), union
