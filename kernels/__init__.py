"""Triton kernels with their PyTorch references. Never imports vLLM; installed as ``vllm_specplug.kernels``."""
