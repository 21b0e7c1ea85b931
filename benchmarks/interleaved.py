"""Time contestants in turns, in CPU time of this thread, so that other work on the machine counts little.

Every round runs each contestant once, in random order. A ratio is the median of the ratios of single rounds,
and its spread their 10th and 90th percentile: a machine that is slow for a while slows a whole round. The
first contestant is the baseline. Enter it a second time as "again": its ratio to itself shows the noise.
"""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

AGAIN = "again"  # the name of the baseline's second entry
_SAMPLE = 2e-3  # the least seconds of one turn
_PER_BLOCK = 3  # how many columns of ratios fit into 80 characters


class Timing(NamedTuple):
    """seconds: the median call's. ratio: the baseline's time divided by this one; low, high: its spread."""

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
    """Time the contestants for ``seconds`` of CPU time, and at least ``rounds`` rounds."""
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
    """A table of rows: the baseline's microseconds, and the other contestants' ratios to it."""
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
    """The least and the largest ratio of a baseline to itself, if any was entered twice."""
    ratios = [row.timings[AGAIN].ratio for row in rows if AGAIN in row.timings]
    return (min(ratios), max(ratios)) if ratios else None


def _time(run: Callable[[], object], calls: int) -> float:
    start = time.thread_time()
    for _ in range(calls):
        run()
    return (time.thread_time() - start) / calls


def _calls_of(run: Callable[[], object]) -> int:
    """How many calls fill a turn, found after a warm-up."""
    run()
    run()
    return max(1, round(_SAMPLE / max(_time(run, 1), 1e-7)))


def _timing(first: list[float], own: list[float]) -> Timing:
    ratios = sorted(one / other for one, other in zip(first, own, strict=True))
    tenth = round(0.1 * (len(ratios) - 1))
    return Timing(statistics.median(own), statistics.median(ratios), ratios[tenth], ratios[-1 - tenth])
