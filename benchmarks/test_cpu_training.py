"""``pytest benchmarks -k cpu_training``: TrainStep and TrainStep.epoch on a CPU against the plain loop.

The plain loop is ``nn.Sequential`` with torch's optimizer at its defaults and ``nn.CrossEntropyLoss``, on
preloaded data in one thread. Before anything is timed, the losses of all contestants have to agree. It takes
a few minutes, mostly for torch.compile; ``--quick`` only tests that it runs.
"""

import contextlib
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fusedmlp
from benchmarks import cases
from benchmarks.conftest import Race
from benchmarks.interleaved import AGAIN

WIDTHS = (784, 256, 128, 128, 10)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters, **options: torch.optim.SGD(parameters, lr=0.01, **options),
    "Adam": lambda parameters, **options: torch.optim.Adam(parameters, **options),
}
Contestants = dict[str, Callable[[], Any]]
_NAME = "-".join(map(str, WIDTHS))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return cases.network(WIDTHS)


def plain(
    optimizer_of: Callable[..., torch.optim.Optimizer],
    autocast: bool = False,
    compiled: bool = False,
    **options: Any,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    model = network()
    run = torch.compile(model, dynamic=False) if compiled else model
    optimizer, loss_fn = optimizer_of(model.parameters(), **options), nn.CrossEntropyLoss()

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = loss_fn(run(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()  # type: ignore[no-any-return]

    return step


def ours(optimizer_of: Callable[..., torch.optim.Optimizer], **options: Any) -> fusedmlp.TrainStep:
    model = network()
    return fusedmlp.TrainStep(model, nn.CrossEntropyLoss(), optimizer_of(model.parameters()), **options)


def assert_alike(contestants: Contestants) -> None:
    """Compare the losses of the first three calls, within the accuracy of each dtype."""
    losses = {name: torch.stack([run() for _ in range(3)]) for name, run in contestants.items()}
    for name, loss in losses.items():
        tolerance = 0.02 if "bf16" in name else 1e-4
        torch.testing.assert_close(loss, losses["eager"], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("batch", [1, 64, 128, 512, 4096])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step(name: str, batch: int, race: Race, quick: bool) -> None:
    make = OPTIMIZERS[name]
    torch.manual_seed(1)
    data = torch.randn(batch, WIDTHS[0]), torch.randint(0, WIDTHS[-1], (batch,))
    contestants: Contestants = {
        "eager": partial(plain(make), *data),
        AGAIN: partial(plain(make), *data),
        "TrainStep": partial(ours(make), *data),
        "fused=True": partial(plain(make, fused=True), *data),
    }
    # torch.compile takes 10 seconds for each size, and needs a C++ compiler.
    if not quick and shutil.which("g++") is not None:
        contestants["compile"] = partial(plain(make, compiled=True), *data)
    contestants["autocast bf16"] = partial(plain(make, autocast=True), *data)
    contestants["TrainStep bf16"] = partial(ours(make, compute_dtype=torch.bfloat16), *data)
    assert_alike(contestants)
    race(f"step, {name}, {_NAME}", f"batch {batch}", contestants)


@pytest.mark.parametrize("batch", [64, 512])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_epoch(name: str, batch: int, race: Race, quick: bool) -> None:
    """An epoch on 28 x 28 images in memory: uint8 for TrainStep.epoch, already float32 for all others."""
    make, count = OPTIMIZERS[name], 1024 if quick else 6144
    torch.manual_seed(1)
    images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,))
    floats = images.flatten(1).float().div(255)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(floats, labels), batch_size=batch, shuffle=True
    )

    def loop(step: Callable[..., torch.Tensor]) -> torch.Tensor:
        order = torch.randperm(count)
        parts = [order[i : i + batch] for i in range(0, count, batch)]
        return torch.stack([step(floats[rows], labels[rows]) for rows in parts])

    def loaded(step: Callable[..., torch.Tensor]) -> torch.Tensor:
        return torch.stack([step(x, y) for x, y in loader])

    contestants: Contestants = {
        "eager": partial(loop, plain(make)),
        AGAIN: partial(loop, plain(make)),
        "TrainStep": partial(loop, ours(make)),
        "TrainStep.epoch": partial(ours(make).epoch, images, labels, batch),
        "epoch bf16": partial(ours(make, compute_dtype=torch.bfloat16).epoch, images, labels, batch),
        "DataLoader": partial(loaded, plain(make)),
    }
    race(f"epoch of {count} images, {name}, {_NAME}", f"batch {batch}", contestants)
