"""Small networks of every kind of ours, each with torch's own, and a fixture that compares the two."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compatibility import Route, unrecorded
from oracle import assert_right
from torch import nn as tnn
from torch.nn import functional as F

import fusedmlp
from fusedmlp import nn


class TorchsLinearReLU(tnn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(input))


class Net(tnn.Module):
    """What fuse finds in a forward: a ReLU that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = tnn.Linear(5, 6), tnn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(x)))


def sequential(nn: Any) -> Any:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 3))


def torchs_mlp() -> Any:
    return tnn.Sequential(tnn.Linear(5, 7), tnn.ReLU(), tnn.Linear(7, 6), tnn.ReLU(), tnn.Linear(6, 3))


# Ours and torch's, of 5 inputs and 3 outputs, with the same names of parameters.
NETWORKS: dict[str, tuple[Callable[[], tnn.Module], Callable[[], tnn.Module]]] = {
    "Linear": (lambda: nn.Linear(5, 3), lambda: tnn.Linear(5, 3)),
    "LinearReLU": (lambda: nn.LinearReLU(5, 3), lambda: TorchsLinearReLU(5, 3)),
    "Sequential": (lambda: sequential(nn), lambda: sequential(tnn)),
    "MLP": (lambda: nn.MLP(5, [7, 6], 3), torchs_mlp),
    "fused": (lambda: fusedmlp.fuse(Net()), Net),
}
Run = Callable[[tnn.Module, torch.Tensor], Any]


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def compare(network: str, route: Route, device: torch.device) -> Callable[..., None]:
    """Run something on ours, torch's and torch's in float64, and compare all tensors that it gives.

    fused: whether a layer of ours runs on the kernels, where those can run.
    """

    def check(run: Run, *, fused: bool, factor: float = 2.0) -> None:
        def made(build: Callable[[], tnn.Module]) -> tnn.Module:
            torch.manual_seed(3)
            return build().to(device)

        build_ours, build_torchs = NETWORKS[network]
        torchs = made(build_torchs)
        exactly = copy.deepcopy(torchs).double()
        x = torch.randn(4, 5, device=device)
        mine, theirs = list(run(made(build_ours), x)), list(run(torchs, x))
        assert len(mine) == len(theirs) > 0
        if route.kernels:
            assert route.reasons
            assert (None in route.reasons) == fused, route.reasons
            for i, results in enumerate(zip(mine, theirs, run(exactly, x.double()), strict=True)):
                assert_right(*results, f"{network}: result {i}", factor)
        else:
            with unrecorded():
                again = list(run(made(build_ours), x))
            for ours in (mine, again):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    return check


def parameters(model: tnn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def leaves(model: tnn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """x as a leaf that wants a gradient; and the parameters and it."""
    leaf = x.clone().requires_grad_()
    return leaf, [leaf, *model.parameters()]
