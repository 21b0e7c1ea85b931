"""Warnings that point at the user's own line."""

import sys
import warnings


def warn(text: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warn of ``text`` where the user's code called this package, however deep in it this is."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fusedmlp."):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)
