"""Microseconds of a call on the CPU, ours beside PyTorch's: ``pytest benchmarks``.

At batch 1 the arithmetic is nothing and what is left is the price of the call. At batch 64 with MNIST's first
layer the arithmetic is most of it.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fusedmlp

LIBRARIES = {"torch": torch.nn, "fusedmlp": fusedmlp.nn}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def linear(nn: Any, *widths: int) -> torch.nn.Module:
    layer: torch.nn.Module = nn.Linear(*widths[:2])
    return layer


def mlp(nn: Any, *widths: int) -> torch.nn.Module:
    layers: list[torch.nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    network: torch.nn.Module = nn.Sequential(*layers[:-1])
    return network


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize(("rows", "widths"), [(1, (8, 8, 8, 8)), (64, (784, 256, 128, 10))])
@pytest.mark.parametrize("build", [linear, mlp])
def test_call(
    benchmark: Any, build: Any, rows: int, widths: tuple[int, ...], mode: str, library: str
) -> None:
    benchmark.group = f"{build.__name__}, {rows} rows, {mode}"
    torch.manual_seed(0)
    model, x = build(LIBRARIES[library], *widths), torch.randn(rows, widths[0])

    def inference() -> torch.Tensor:
        y: torch.Tensor = model(x)
        return y

    def training() -> None:
        model.zero_grad()
        inference().sum().backward()

    if mode == "training":
        benchmark(training)
    else:
        with torch.no_grad():
            benchmark(inference)
