"""A step and an epoch of training on a CPU, as ratios to the plain loop on preloaded data.

    pytest benchmarks/ -k cpu_training            # everything, a few minutes, most of them torch.compile's
    pytest benchmarks/ -k cpu_training --quick    # does it run

One thread; the plain loop is ``nn.Sequential`` with torch's optimizer at its defaults and
``nn.CrossEntropyLoss``. Before anything is timed, the losses of contestants of one dtype have to agree.
"""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fusedmlp
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
    layers: list[nn.Module] = []
    for i in range(len(WIDTHS) - 1):
        layers += [nn.Linear(WIDTHS[i], WIDTHS[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


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
        if autocast:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_fn(run(x), y)
        else:
            loss = loss_fn(run(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()  # type: ignore[no-any-return]

    return step


def ours(optimizer_of: Callable[..., torch.optim.Optimizer], **options: Any) -> fusedmlp.TrainStep:
    model = network()
    return fusedmlp.TrainStep(model, nn.CrossEntropyLoss(), optimizer_of(model.parameters()), **options)


def bound(step: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: step(*arguments)


def assert_alike(contestants: Contestants) -> None:
    """The losses of the first three calls, in the dtype of each."""
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
        "eager": bound(plain(make), *data),
        AGAIN: bound(plain(make), *data),
        "TrainStep": bound(ours(make), *data),
        "fused=True": bound(plain(make, fused=True), *data),
    }
    # Which takes 10 seconds for each size, and a C++ compiler.
    if not quick and shutil.which("g++") is not None:
        contestants["compile"] = bound(plain(make, compiled=True), *data)
    contestants["autocast bf16"] = bound(plain(make, autocast=True), *data)
    contestants["TrainStep bf16"] = bound(ours(make, compute_dtype=torch.bfloat16), *data)
    assert_alike(contestants)
    race(f"step, {name}, {_NAME}", f"batch {batch}", contestants)


@pytest.mark.parametrize("batch", [64, 512])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_epoch(name: str, batch: int, race: Race, quick: bool) -> None:
    """Of 28 x 28 images in memory, uint8; the plain loop's are float32 already, and a DataLoader's too."""
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

    race(
        f"epoch of {count} images, {name}, {_NAME}",
        f"batch {batch}",
        {
            "eager": bound(loop, plain(make)),
            AGAIN: bound(loop, plain(make)),
            "TrainStep": bound(loop, ours(make)),
            "TrainStep.epoch": bound(ours(make).epoch, images, labels, batch),
            "epoch bf16": bound(ours(make, compute_dtype=torch.bfloat16).epoch, images, labels, batch),
            "DataLoader": bound(loaded, plain(make)),
        },
    )
