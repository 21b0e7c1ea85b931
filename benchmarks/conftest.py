"""The ``race`` fixture of ``pytest benchmarks``: time several ways to compute the same, and print tables."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from benchmarks.interleaved import Row, interleaved, noise, table

Race = Callable[[str, str, Mapping[str, Callable[[], object]]], None]
_TABLES = pytest.StashKey[dict[str, list[Row]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="few rounds and sizes: only test that it runs")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLES] = {}


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def race(request: pytest.FixtureRequest, quick: bool) -> Iterator[Race]:
    """``race(title, row, contestants)`` adds a row to the table ``title``; the first contestant is eager.

    Contestants run in one thread and take turns, see interleaved.py. pytest prints the tables at the end.
    """

    def run(title: str, row: str, contestants: Mapping[str, Callable[[], object]]) -> None:
        timings = interleaved(contestants, seconds=0.1, rounds=3) if quick else interleaved(contestants)
        request.config.stash[_TABLES].setdefault(title, []).append(Row(row, timings))

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    tables = config.stash[_TABLES]
    if not tables:
        return
    terminalreporter.section("times as fast as eager, one thread, CPU time, interleaved")
    for title, rows in tables.items():
        terminalreporter.write_line("\n" + table(title, rows))
    band = noise([row for rows in tables.values() for row in rows])
    if band is not None:
        terminalreporter.write_line(
            f"\nEager against itself: {band[0]:.2f} to {band[1]:.2f}. Ratios in this range are noise."
        )
