"""What the Triton kernels share: checks of their arguments, and the work that a roofline is computed from.

Triton kernels are in ``<stem>_triton.py``, beside the definition in ``<stem>.py`` that they are tested against. Only
these modules import Triton. Without a GPU they run in its interpreter if ``TRITON_INTERPRET=1`` is set before Triton
is first imported; its ``tl.dot`` is wrong in bfloat16 (Triton 3.9).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

#: Whether kernels run in Triton's interpreter, on tensors of the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Work(NamedTuple):
    """What a launch must do at least.

    Attributes:
        bytes: read and written once, from and to the device's memory.
        operations: multiplications and additions, of the kind that the kernel's products use.
    """

    bytes: int
    operations: int

    def seconds(self, bytes_per_s: float, operations_per_s: float) -> float:
        """Least time by a machine's memory bandwidth and arithmetic (the roofline)."""
        return max(self.bytes / bytes_per_s, self.operations / operations_per_s)


def check(
    name: str,
    tensor: torch.Tensor,
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    device: torch.device | None = None,
    contiguous: bool = True,
) -> None:
    """Raise ``ValueError`` unless a tensor is what a launcher needs.

    Args:
        name: what the message calls it.
        dtypes: allowed ones.
        shape: lengths of its dimensions; None: any.
        device: where it must be.
        contiguous: all of it; else only the last dimension.
    """
    found = tensor.shape
    fits = len(found) == len(shape)
    if fits:
        for wanted, there in zip(shape, found, strict=True):
            fits = fits and (wanted is None or wanted == there)
    allowed = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(str, allowed))}, got {tensor.dtype}")
    if not fits:
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must be [{sizes}], got {list(found)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for {list(found)}")
    if not contiguous and shape and found[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}'s last dimension must be contiguous, got strides {tensor.stride()}")
