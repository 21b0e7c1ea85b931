"""Contestants that take turns, timed in the CPU time of this thread: other work on the machine counts little.

Every round runs each contestant once, in an order that is drawn, as it matters who comes after whom. A ratio
is the median of the ratios of single rounds, its spread their 10 % and 90 %: a machine that becomes slow for
a while makes all of a round slow. The first contestant is the one all are compared with; give it a second
time, as "again": its ratio to itself says what the machine's noise can do.
"""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

AGAIN = "again"  # the name of the first contestant's second entry
_SAMPLE = 2e-3  # seconds that one turn takes at least
_PER_BLOCK = 3  # columns of ratios that fit into 80 characters


class Timing(NamedTuple):
    """seconds: of the median call. ratio: how many times as fast as the first contestant; low, high: 10 %
    and 90 % of the rounds' ratios."""

    seconds: float
    ratio: float
    low: float
    high: float


class Row(NamedTuple):
    name: str
    timings: dict[str, Timing]  # by contestant


def interleaved(
    contestants: Mapping[str, Callable[[], object]], seconds: float = 2.0, rounds: int = 7
) -> dict[str, Timing]:
    """Time the contestants for so many seconds of CPU time, and so many rounds at least."""
    calls = {name: _calls_of(run) for name, run in contestants.items()}
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    draw, start = random.Random(0), time.thread_time()
    for number in itertools.count():
        if number >= rounds and time.thread_time() - start > seconds:
            break
        for name in draw.sample(names, len(names)):
            samples[name].append(_time(contestants[name], calls[name]))
    first = samples[names[0]]
    return {name: _timing(first, samples[name]) for name in names}


def table(title: str, rows: list[Row]) -> str:
    """Of rows with the same contestants: microseconds of the first, and everybody's ratio to it."""
    first, *others = rows[0].timings
    width = max(len(row.name) for row in rows)
    lines = [title]
    for i in range(0, len(others), _PER_BLOCK):
        block = others[i : i + _PER_BLOCK]
        lines.append(f"{'':{width}} {first[:9] + ' us':>12}" + "".join(f"{name:>19}" for name in block))
        for row in rows:
            cells = (row.timings[name] for name in block)
            lines.append(
                f"{row.name:{width}} {1e6 * row.timings[first].seconds:12.1f}"
                + "".join(f"{f'{cell.ratio:.2f} [{cell.low:.2f}-{cell.high:.2f}]':>19}" for cell in cells)
            )
    return "\n".join(lines)


def noise(rows: list[Row]) -> tuple[float, float] | None:
    """The least and the largest ratio of a contestant to itself, if any was entered twice."""
    ratios = [row.timings[AGAIN].ratio for row in rows if AGAIN in row.timings]
    return (min(ratios), max(ratios)) if ratios else None


def _time(run: Callable[[], object], calls: int) -> float:
    start = time.thread_time()
    for _ in range(calls):
        run()
    return (time.thread_time() - start) / calls


def _calls_of(run: Callable[[], object]) -> int:
    """After a warm-up: how many calls fill a turn."""
    run()
    run()
    return max(1, round(_SAMPLE / max(_time(run, 1), 1e-7)))


def _timing(first: list[float], own: list[float]) -> Timing:
    ratios = sorted(one / other for one, other in zip(first, own, strict=True))
    tenth = round(0.1 * (len(ratios) - 1))
    return Timing(statistics.median(own), statistics.median(ratios), ratios[tenth], ratios[-1 - tenth])
