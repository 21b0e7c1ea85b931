"""What the tests of TrainStep share: an MLP with its optimizer, and the loop that TrainStep replaces."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fusedmlp

Optimizer = Callable[[Any], torch.optim.Optimizer]
CROSS_ENTROPY, MSE = nn.CrossEntropyLoss(), nn.MSELoss()

# Every kind of optimizer that the direct route supports.
OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, weight decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD, dampening": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.3, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "Adam, weight decay": lambda p: torch.optim.Adam(
        p, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6
    ),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


def mlp(
    *, bias: bool = True, dtype: torch.dtype = torch.float64, widths: Any = (7, 9, 8, 5)
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batches(
    count: int, rows: int = 6, columns: int = 7, classes: int = 5, dtype: torch.dtype = torch.float64
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (torch.randn(rows, columns, dtype=dtype), torch.randint(0, classes, (rows,))) for _ in range(count)
    ]


def plain(model: nn.Module, loss_fn: Any, optimizer: torch.optim.Optimizer, x: Any, y: Any) -> torch.Tensor:
    """One step of the ordinary training loop."""
    optimizer.zero_grad()
    loss: torch.Tensor = loss_fn(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


class Twins:
    """A model with its optimizer for TrainStep, and copies of both for the plain loop."""

    def __init__(
        self, model: nn.Module, make: Optimizer, loss_fn: Any = CROSS_ENTROPY, **options: Any
    ) -> None:
        self.model, self.twin = model, copy.deepcopy(model)
        self.optimizer, self.twins = make(self.model.parameters()), make(self.twin.parameters())
        self.loss_fn = loss_fn
        self.step = fusedmlp.TrainStep(self.model, loss_fn, self.optimizer, **options)

    def plain(self, x: Any, y: Any) -> torch.Tensor:
        return plain(self.twin, self.loss_fn, self.twins, x, y)

    def train(self, data: Any, route: str | None = None) -> None:
        """Train both on the same batches. Losses must agree; the last step must take the named route."""
        for x, y in data:
            said = self.step.explain(x, y)
            assert_close(self.step(x, y), self.plain(x, y))
        assert route is None or said.startswith(route), said

    def assert_same(self) -> None:
        """Assert that parameters and all of the optimizer's state agree."""
        assert_close(self.model.state_dict(), self.twin.state_dict())
        ours, theirs = self.optimizer.state_dict(), self.twins.state_dict()
        assert ours["param_groups"] == theirs["param_groups"]
        assert ours["state"].keys() == theirs["state"].keys()
        for key, state in theirs["state"].items():
            assert list(ours["state"][key]) == list(state)
            for name, value in state.items():
                assert_close(ours["state"][key][name], value)


def assert_close(ours: Any, theirs: Any) -> None:
    """Assert close agreement in float64, where a wrong formula cannot agree so closely. NaN equals NaN."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, equal_nan=True)


def written(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The tensors that a step writes to, by name: parameters and the optimizer's state."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            if value is not None:
                found[f"{key} of {name}"] = value
    return found


def versions(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor._version for name, tensor in tensors.items()}


def assert_counted(before: dict[str, int], tensors: dict[str, torch.Tensor]) -> None:
    missed = [name for name, tensor in tensors.items() if tensor._version <= before[name]]
    assert not missed
