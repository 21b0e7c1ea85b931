"""Measure what is faster on this machine, and what is not: ``python -m benchmarks --help``."""
