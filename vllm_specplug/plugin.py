"""The ``vllm.general_plugins`` entry point.

vLLM calls :func:`register` in every process it starts. It is import-light, safe to call again, and never
initialises an accelerator: it only prepares vLLM's command line and engine arguments, and only where those
are already imported. What a worker needs is set up when vLLM builds the proposer there.
"""

from __future__ import annotations


def register() -> None:
    """Teach vLLM's engine arguments this plugin's flags and checks. Idempotent."""
    from vllm_specplug.host import engine_args, metrics, numba_guard

    engine_args.install()
    metrics.install()
    numba_guard.protect()
