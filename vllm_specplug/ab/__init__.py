"""Comparison of speculation methods on real vLLM engines: same prompts, same machine, same run."""
