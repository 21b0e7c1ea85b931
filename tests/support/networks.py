"""Small networks of every kind of ours with torch.nn's counterparts, and a fixture that compares the two."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from compatibility import Route, unrecorded
from oracle import assert_same, nearby
from torch import nn as tnn
from torch.nn import functional as F

import fusedmlp
from fusedmlp import nn


class TorchsLinearReLU(tnn.Linear):
    """A LinearReLU with torch.nn alone, and the same names of parameters."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(input))


class Net(tnn.Module):
    """A user's model for `fuse`: one ReLU is called in the forward, one is in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = tnn.Linear(5, 6)
        self.tail = tnn.Sequential(tnn.Linear(6, 4), tnn.ReLU(), tnn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> Any:
        return self.tail(F.relu(self.fc1(x)))


def sequential(nn: Any) -> Any:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 3))


def torchs_mlp() -> Any:
    return tnn.Sequential(tnn.Linear(5, 7), tnn.ReLU(), tnn.Linear(7, 6), tnn.ReLU(), tnn.Linear(6, 3))


# How ours and torch's are made, each with 5 inputs and 3 outputs and the same names of parameters.
NETWORKS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "Linear": (lambda: nn.Linear(5, 3), lambda: tnn.Linear(5, 3)),
    "LinearReLU": (lambda: nn.LinearReLU(5, 3), lambda: TorchsLinearReLU(5, 3)),
    "Sequential": (lambda: sequential(nn), lambda: sequential(tnn)),
    "MLP": (lambda: nn.MLP(5, [7, 6], 3), torchs_mlp),
    "fused": (lambda: fusedmlp.fuse(Net()), Net),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pair(network: str, device: torch.device) -> list[Any]:
    """Ours and torch's, with the same values of the parameters."""
    models = []
    for make in NETWORKS[network]:
        torch.manual_seed(3)
        models.append(make().to(device))
    return models


def results(model: tnn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    leaf, inputs = leaves(model, x)
    model.zero_grad()
    y = model(leaf)
    y.square().sum().backward()
    return [y.detach(), *(t.grad.clone() for t in inputs if t.grad is not None)]


@pytest.fixture
def compare(network: str, route: Route, device: torch.device) -> Callable[..., Any]:
    """Run something on ours, on torch's and on torch's in float64, and compare all tensors that it gives.

    The results have the same bits on PyTorch's operators and are as accurate as torch's on the kernels.
    fused: whether a layer of ours runs on the kernels, where those can run. change: what is done to each
    model first; if it returns something, that is the model. again: whether torch's runs on inputs a rounding
    away count too, see oracle.assert_all_right. Returns our model.
    """

    def check(
        run: Callable[[Any, torch.Tensor], Iterable[torch.Tensor]] = results,
        *,
        fused: bool,
        change: Callable[[Any], Any] = lambda model: None,
        again: bool = False,
        factor: float = 2.0,
    ) -> Any:
        def changed(model: Any) -> Any:
            torch.manual_seed(4)
            return change(model) or model

        def run_on(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
            torch.manual_seed(6)
            return list(run(model, x))

        models = pair(network, device)
        x = torch.randn(4, 5, device=device)
        ours, torchs, exactly = map(changed, [*models, copy.deepcopy(models[1])])
        exactly.double()
        assert list(ours.state_dict()) == list(torchs.state_dict())

        def rerun(nudge: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
            return run_on(nearby(changed(pair(network, device)[1]), nudge), nudge(x))

        mine, theirs = run_on(ours, x), run_on(torchs, x)
        assert theirs
        if route.kernels:
            assert route.reasons
            assert (None in route.reasons) == fused, route.reasons
            exact = run_on(exactly, x.double())
            assert_same(mine, theirs, exact, network, rerun if again else None, factor=factor)
        else:
            with unrecorded():
                others = run_on(changed(pair(network, device)[0]), x)
            for found in (mine, others):
                assert_same(found, theirs, None, network)
        return ours

    return check


def parameters(model: tnn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def leaves(model: tnn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A copy of x that requires a gradient; and a list of this copy and all parameters."""
    leaf = x.detach().clone().requires_grad_()
    return leaf, [leaf, *model.parameters()]


def linear(model: tnn.Module) -> tnn.Linear:
    """The first Linear of the model."""
    return next(module for module in model.modules() if isinstance(module, tnn.Linear))


def is_ours(model: tnn.Module) -> bool:
    return any(type(module).__module__.startswith("fusedmlp") for module in model.modules())
