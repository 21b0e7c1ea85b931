"""What the tests of compatibility are about: layers and models of ours, and the same of torch.nn."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from compatibility import Route
from oracle import assert_all_right
from torch import nn as tnn
from torch.nn import functional as F

import fusedmlp
from fusedmlp import nn


class TorchLinearReLU(tnn.Linear):
    """What LinearReLU is to be like, on torch.nn."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(input))


class Net(tnn.Module):
    """Somebody else's: a ReLU in the forward, and a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = tnn.Linear(5, 4)
        self.tail = tnn.Sequential(tnn.Linear(4, 4), tnn.ReLU(), tnn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> Any:
        return self.tail(F.relu(self.fc1(x)))


def chain(nn: Any) -> Any:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


# For each, how it is made, and the same of torch.nn.
SUBJECTS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "Linear": (lambda: nn.Linear(5, 3), lambda: tnn.Linear(5, 3)),
    "LinearReLU": (lambda: nn.LinearReLU(5, 3), lambda: TorchLinearReLU(5, 3)),
    "Sequential": (lambda: chain(nn), lambda: chain(tnn)),
    "MLP": (lambda: nn.MLP(5, [4], 3), lambda: chain(tnn)),
    "fused": (lambda: fusedmlp.fuse(Net()), Net),
}


def made(subject: str, device: torch.device) -> Iterator[tuple[Any, torch.dtype]]:
    """Ours and torch's, with the same values, and torch's once more, which is to become float64."""
    ours, torchs = SUBJECTS[subject]
    for make, dtype in ((ours, torch.float32), (torchs, torch.float32), (torchs, torch.float64)):
        torch.manual_seed(3)
        model = make().to(device)
        torch.manual_seed(4)
        yield model, dtype


def results(model: tnn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    leaf = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(leaf)
    y.square().sum().backward()
    found = [y.detach(), leaf.grad, *(p.grad for p in model.parameters())]
    return [t.detach().clone() for t in found if t is not None]


def assert_same(
    route: Route, ours: Any, torchs: Any, exact: Any, what: str = "", again: Callable[..., Any] | None = None
) -> None:
    """Of tensors: to the bit on PyTorch's own path, as right as PyTorch's on the kernels."""
    assert len(ours) == len(torchs) == len(exact), what
    names = [f"{what} {i}" for i in range(len(exact))]
    if route.kernels:
        assert_all_right(ours, torchs, exact, names, again)
    else:
        for a, b, name in zip(ours, torchs, names, strict=True):
            assert torch.equal(a, b), name


def compare(
    route: Route,
    device: torch.device,
    subject: str,
    change: Callable[[Any], Any] = lambda model: None,
    run: Callable[[Any, torch.Tensor], list[torch.Tensor]] = results,
) -> Any:
    """After ``change`` (what it returns, if anything, is the model) ``run`` gives the same; returns ours."""
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(5)).to(device)
    found, models = [], []
    for model, dtype in made(subject, device):
        model = (change(model) or model).to(dtype)
        torch.manual_seed(6)
        found.append(run(model, x.to(dtype)))
        models.append(model)
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    assert not route.kernels or None in route.reasons, "no kernel has run"

    def again(nudge: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        _, (model, _), _ = made(subject, device)
        model = change(model) or model
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(nudge(parameter))
        torch.manual_seed(6)
        return run(model, nudge(x))

    assert_same(route, *found, what=subject, again=again)
    return models[0]


def linear(model: tnn.Module) -> tnn.Linear:
    """The first of the model."""
    return next(module for module in model.modules() if isinstance(module, tnn.Linear))


def is_ours(model: tnn.Module) -> bool:
    return any(type(module).__module__.startswith("fusedmlp") for module in model.modules())
