"""Measure what is faster on this machine, and what is not: ``python -m benchmarks --help``."""

import time

BEGAN = time.monotonic()  # of this process, near enough: before PyTorch, whose import takes seconds
