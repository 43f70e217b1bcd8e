"""Traces: what a server emitted, step by step; replayed through any proposer, without a model."""
