"""Prefill, decode, sampling, scoring."""
