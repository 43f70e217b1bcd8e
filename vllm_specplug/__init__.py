"""Training-free speculative decoding for existing vLLM servers.

Users name a proposer of this package to vLLM, ``--spec-model vllm_specplug.Retrieval``; vLLM then imports
that name from here. Every registered proposer is such a name (see :mod:`vllm_specplug.registry`); nothing
is imported before it is asked for.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The class vLLM builds for ``vllm_specplug.<name>``."""
    # Only class names can be proposers; asking the registry for a submodule's name would recurse into here.
    if not name[:1].isupper():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm_specplug import registry

    if name not in registry.proposers():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm_specplug.host import proposer

    globals()[name] = proposer.host_class(registry.find(name))
    return globals()[name]
