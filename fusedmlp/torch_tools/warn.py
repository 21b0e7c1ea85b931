"""Warnings that point at the user's own line, and the text of an error in one line."""

import sys
import warnings


def warn(text: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warn at the line of the user's code that called this package, directly or through torch."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("fusedmlp.", "torch.")
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


def first_line(error: Exception) -> str:
    """The type of the error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
