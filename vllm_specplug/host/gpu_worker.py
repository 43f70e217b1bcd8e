"""The GPU worker of servers that draft on the device; see :mod:`.gpu_speculator`."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_specplug.host import gpu_speculator


class DeviceDraftWorker(Worker):
    """vLLM's worker (v1/worker/gpu_worker.py), whose model runner V2 gets this plugin's speculator."""

    def init_device(self) -> Any:
        """As vLLM's, which makes the runner here."""
        gpu_speculator.install()
        return super().init_device()
