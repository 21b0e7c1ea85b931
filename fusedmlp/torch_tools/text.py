"""Format text of the reports: counts, paragraphs, and layer names that differ only in numbers."""

import re
import textwrap
from collections.abc import Sequence

WIDTH = 80  # columns of a report


def count(number: int, noun: str, plural: str | None = None) -> str:
    """``count(2, "launch", "launches")`` is ``"2 launches"``; without a plural the noun gets an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def paragraph(text: str, start: str = "") -> str:
    """Wrap text at WIDTH columns. The first line begins with start, the others are indented by its width."""
    indent = " " * len(start)
    return textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)


def shortened(name: str, width: int) -> str:
    """Cut a name to at most ``width`` columns: three dots and its end."""
    return name if len(name) <= width else "..." + name[3 - width :]


def pattern(name: str) -> str:
    """Replace each number by ``*``: ``layers.0.linear1`` and ``layers.3.linear1`` have one pattern."""
    return re.sub(r"\d+", "*", name)


def common_name(names: Sequence[str]) -> str:
    """One name for names of one pattern, with ``*`` for each number that differs: ``layers.*.linear1``."""
    split = [re.split(r"(\d+)", name) for name in names]
    return "".join(part[0] if len(set(part)) == 1 else "*" for part in zip(*split, strict=True))
