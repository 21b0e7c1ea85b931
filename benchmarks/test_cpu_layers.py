"""``pytest benchmarks -k cpu_layers``: our layers and modules on a CPU against those of ``torch.nn``.

At batch 1 the overhead of a call dominates, from batch 64 on the arithmetic. "training" is a forward and a
backward with the gradients of the parameters.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fusedmlp
from benchmarks import cases
from benchmarks.conftest import Race
from benchmarks.interleaved import AGAIN

BATCHES = [1, 64, 128, 512, 4096]
WIDTHS = {"784 -> 256": (784, 256), "1024 -> 1024": (1024, 1024), "784-256-128-10": (784, 256, 128, 10)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def network(nn: Any, widths: tuple[int, ...], dtype: torch.dtype) -> torch.nn.Module:
    """A Linear and a ReLU, or an MLP, always with the same parameters."""
    torch.manual_seed(0)
    return cases.network(widths, final_relu=len(widths) == 2, nn=nn).to(dtype)


def call(
    model: Callable[..., torch.Tensor], x: torch.Tensor, parameters: list[torch.Tensor]
) -> Callable[[], object]:
    """A call for inference or, if there are parameters, for training."""

    def inference() -> None:
        with torch.no_grad():
            model(x)

    def training() -> None:
        torch.autograd.grad(model(x).sum(), parameters)

    return training if parameters else inference


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_module(race: Race, quick: bool, dtype: str, training: bool, name: str, batch: int) -> None:
    if quick and (batch not in (1, 64) or name == "1024 -> 1024"):
        pytest.skip("--quick leaves this size out")
    torch.compiler.reset()  # otherwise torch.compile gives up after eight shapes of a function
    models: dict[str, Any] = {
        "eager": network(torch.nn, WIDTHS[name], DTYPES[dtype]),
        AGAIN: network(torch.nn, WIDTHS[name], DTYPES[dtype]),
        "fusedmlp.nn": network(fusedmlp.nn, WIDTHS[name], DTYPES[dtype]),
        "torch.compile": torch.compile(network(torch.nn, WIDTHS[name], DTYPES[dtype]), dynamic=False),
    }
    x = torch.randn(batch, WIDTHS[name][0]).to(DTYPES[dtype])
    title = f"modules, {dtype}, {'training' if training else 'inference'}"
    contestants = {
        key: call(model, x, list(model.parameters()) if training else []) for key, model in models.items()
    }
    race(title, f"{name}, {batch}", contestants)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_function(race: Race, quick: bool, dtype: str, batch: int) -> None:
    if quick and batch not in (1, 64):
        pytest.skip("--quick leaves this size out")
    x, weight, bias = (torch.randn(s).to(DTYPES[dtype]) for s in ((batch, 784), (256, 784), (256,)))

    def eager() -> None:
        with torch.no_grad():
            F.relu(F.linear(x, weight, bias))

    def fused() -> None:
        with torch.no_grad():
            fusedmlp.functional.linear_relu(x, weight, bias)

    title = f"functional.linear_relu, 784 -> 256, {dtype}, inference"
    race(title, f"{batch}", {"eager": eager, AGAIN: eager, "fusedmlp": fused})


@pytest.mark.parametrize("width", [8, 784])
def test_lone_linear(race: Race, width: int) -> None:
    torch.manual_seed(0)
    models = [torch.nn.Linear(width, width), torch.nn.Linear(width, width), fusedmlp.nn.Linear(width, width)]
    x = torch.randn(1, width)
    for training in (False, True):
        calls = [call(model, x, list(model.parameters()) if training else []) for model in models]
        row = f"{width} -> {width}, {'training' if training else 'inference'}"
        contestants = dict(zip(("eager", AGAIN, "fusedmlp.nn"), calls, strict=True))
        race("one Linear, 1 row, float32", row, contestants)
