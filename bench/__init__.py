"""Benchmarks as code."""
