"""Measure where fusedmlp is faster than PyTorch on this machine, and where not: ``python -m benchmarks``.

Every ratio compares times of one run. Reports show losses first, and the noise beside each time.
"""

import time

BEGAN = time.monotonic()  # when this process began: measured before PyTorch is imported, which takes seconds
