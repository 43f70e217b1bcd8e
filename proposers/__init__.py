"""Draft-token proposers: the algorithms. Never imports vLLM; installed as ``vllm_specplug.proposers``."""
