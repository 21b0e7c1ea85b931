"""Warnings that point at the user's own line, and the line that stands for an error."""

import sys
import warnings


def warn(text: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warn of ``text`` where the user's code called this package, through torch or not."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("fusedmlp.", "torch.")
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


def first_line(error: Exception) -> str:
    """The error's type and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
