"""Training-free speculative decoding for existing vLLM servers."""

__version__ = "0.1.0"
