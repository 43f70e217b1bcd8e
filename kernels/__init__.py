"""Kernels: compiled by Numba for CPUs (Triton for GPUs to come), and the PyTorch references that define them.

Never imports vLLM; installed as ``vllm_specplug.kernels``.
"""
