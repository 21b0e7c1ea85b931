"""Microseconds of Python and C++ around a chain's kernels, the launches replaced by nothing.

    pytest benchmarks -k host

A chain of four layers, forward and backward, beside torch.nn's Sequential of the same layers. On a CPU the
matrices are so small (16 x 16) that the arithmetic of PyTorch's side is next to nothing too. What a launch
itself costs on a GPU comes on top of ours; PyTorch's figures there have it in them.

And what the predicate costs, which asks before each call whether the kernels are right for it: the same call
with the question and without.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fusedmlp
from fusedmlp import functional

pytest.importorskip("triton", reason="Triton is not installed: no kernels to launch")


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not torch.cuda.is_available():  # let CPU tensors pass for the kernels'
        monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    from fusedmlp.kernels import dry_run

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with fusedmlp.backend("triton"), dry_run(lambda *_: None):
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("library", ["torch", "fusedmlp"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_host(benchmark: Any, mode: str, library: str) -> None:
    benchmark.group = f"host time of four layers, {mode}"
    nn: Any = torch.nn if library == "torch" else fusedmlp.nn
    torch.manual_seed(0)
    layers = [module for _ in range(4) for module in (nn.Linear(16, 16), nn.ReLU())][:-1]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(*layers).to(device)
    x, grad_output = torch.randn(16, 16, device=device), torch.randn(16, 16, device=device)

    def inference() -> torch.Tensor:
        y: torch.Tensor = model(x)
        return y

    def training() -> None:
        model.zero_grad()
        inference().backward(grad_output)

    if mode == "training":
        benchmark(training)
    else:
        with torch.no_grad():
            benchmark(inference)


@pytest.mark.parametrize("asked", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("count", [1, 4])
def test_host_predicate(benchmark: Any, monkeypatch: pytest.MonkeyPatch, count: int, asked: bool) -> None:
    benchmark.group = f"host time of the predicate, {count} layers, the kernels' path"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = [torch.randn(16, 16, device=device) for _ in range(count)]
    biases: list[torch.Tensor | None] = [torch.randn(16, device=device) for _ in range(count)]
    x = torch.randn(16, 16, device=device)
    if not asked:
        monkeypatch.setattr(functional, "why_not_fused_mlp", lambda *_, **__: None)
    benchmark(lambda: functional.mlp(x, weights, biases, final_relu=True))


@pytest.mark.parametrize("asked", [False, True], ids=["without", "with"])
def test_host_quick_look(benchmark: Any, monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    benchmark.group = "host time of the predicate, 1 layer, PyTorch's path on a CPU"
    weight, bias, x = torch.randn(16, 16), torch.randn(16), torch.randn(16, 16)
    if not asked:
        monkeypatch.setattr(functional, "surely_unfused", lambda _: True)
    with fusedmlp.backend("auto"):
        benchmark(lambda: functional.linear_relu(x, weight, bias))
