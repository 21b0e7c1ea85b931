"""Text of the reports for a terminal: counts, paragraphs, and layer names that differ only in numbers."""

import re
import textwrap
from collections.abc import Sequence

WIDTH = 80  # columns of a report


def count(number: int, noun: str, plural: str | None = None) -> str:
    """``count(2, "launch", "launches")`` is ``"2 launches"``; without a plural the noun gets an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def paragraph(text: str, start: str = "") -> str:
    """Wrap text at WIDTH columns: start comes before the first line, as many spaces before the others."""
    indent = " " * len(start)
    return textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)


def shortened(name: str, width: int) -> str:
    """Keep the end of a name that is wider than width, after three dots."""
    return name if len(name) <= width else "..." + name[3 - width :]


def pattern(name: str) -> str:
    """Replace each number by ``*``: ``layers.0.linear1`` and ``layers.3.linear1`` have one pattern."""
    return re.sub(r"\d+", "*", name)


def common_name(names: Sequence[str]) -> str:
    """One name for names of one pattern, with ``*`` for the numbers that differ: ``layers.*.linear1``."""
    split = [re.split(r"(\d+)", name) for name in names]
    return "".join(part[0] if len(set(part)) == 1 else "*" for part in zip(*split, strict=True))
