"""The result of verify is true for models that are right."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from compatibility import Route
from inspected import CHECKS, Foreign, Holder, State, shown, verdicts
from torch import nn as tnn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fusedmlp
from fusedmlp import nn
from fusedmlp.inspection.verify import verify


def shared() -> tnn.Module:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU())
    model[2].weight = model[0].weight
    return model


def frozen() -> tnn.Module:
    model = nn.MLP(5, [4], 3)
    model[0].requires_grad_(False)
    return model


def nested(self: Any, x: torch.Tensor) -> Any:
    y = self.mlp(x)
    return {"y": y, "more": (y.mean(-1), [y.argmax(-1)], None)}


def restless(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Draw random numbers of Python and NumPy, but none of PyTorch: rrelu draws them only in training."""
    y: torch.Tensor = self.fc(x + random.random())
    return F.rrelu(y.detach(), training=False) + y * np.random.rand()


class Case(NamedTuple):
    make: Callable[[], tnn.Module]
    x: Callable[[], Any] = lambda: torch.randn(6, 5)
    loss: Callable[[Any], torch.Tensor] | None = None
    reason: str | None = None  # why its layers do not run on the kernels


RIGHT = {
    "Linear": Case(lambda: nn.Linear(5, 3)),
    "MLP": Case(lambda: nn.MLP(5, [4], 3), lambda: torch.randn(2, 3, 5, requires_grad=True)),
    "LinearReLU": Case(lambda: nn.LinearReLU(5, 3, bias=False)),
    "a fused model of others": Case(lambda: fusedmlp.fuse(Foreign().eval())),
    "BatchNorm and Dropout": Case(
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout().eval(), nn.Linear(4, 3)
        )
    ),
    "whole numbers": Case(
        lambda: tnn.Sequential(tnn.Embedding(7, 5), nn.MLP(5, [4], 3, bias=False)),
        lambda: torch.randint(7, (2, 3)),
    ),
    "nested output, keywords": Case(
        lambda: Holder(nested, mlp=nn.Linear(5, 3)), lambda: {"x": torch.randn(6, 5)}
    ),
    "a loss": Case(
        lambda: Holder(nested, mlp=nn.LinearReLU(5, 3)),
        lambda: (torch.randn(6, 5),),
        lambda output: F.cross_entropy(output["y"], torch.arange(6, device=output["y"].device) % 3),
    ),
    "shared weights": Case(shared),
    "frozen layer": Case(frozen),
    "float16": Case(lambda: nn.MLP(5, [4], 3).half(), lambda: torch.randn(6, 5).half()),
    "bfloat16": Case(lambda: nn.MLP(5, [4], 3).bfloat16(), lambda: torch.randn(6, 5).bfloat16()),
    "float64": Case(
        lambda: nn.LinearReLU(5, 3).double(),
        lambda: torch.randn(6, 5).double(),
        reason="There are kernels for float32",
    ),
    "random numbers": Case(lambda: Holder(restless, fc=nn.LinearReLU(5, 3))),
    "lazy layers": Case(
        lambda: tnn.Sequential(tnn.LazyLinear(4), tnn.LazyBatchNorm1d(), nn.LinearReLU(4, 3))
    ),
    "written-to input": Case(lambda: Holder(lambda self, x: self.fc(x.mul_(2)), fc=nn.LinearReLU(5, 3))),
    "sparse gradients": Case(
        lambda: tnn.Sequential(tnn.Embedding(7, 5, sparse=True), nn.LinearReLU(5, 3)),
        lambda: torch.randint(7, (2, 3)),
    ),
    "checkpoint": Case(
        lambda: Holder(lambda self, x: checkpoint(self.fc, x, use_reentrant=False), fc=nn.LinearReLU(5, 3))
    ),
    "reentrant checkpoint": Case(
        lambda: Holder(lambda self, x: checkpoint(self.fc, x, use_reentrant=True), fc=nn.LinearReLU(5, 3))
    ),
}


@pytest.mark.capability("Verify", "`fusedmlp.verify(model, x)` of models that are right")
@pytest.mark.filterwarnings("ignore:None of the inputs", "ignore:Using backward")
@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str, route: Route, device: torch.device) -> None:
    case = RIGHT[name]
    model, x = case.make().to(device), torch.utils._pytree.tree_map(lambda t: t.to(device), case.x())
    if isinstance(x, torch.Tensor) and x.requires_grad:
        x = x.detach().requires_grad_()
    if "lazy" in name:
        model(x)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn_like(parameter) if number else None
    state = State(model, x)
    result = verify(model, x, case.loss, verbose=False)
    state.check()
    assert result, shown(result)
    assert result.explanation is not None
    route.reasons[:] = [row.reason for row in result.explanation.rows]
    assert all(row.verdict == "right" for row in result.rows)
    assert [check.name for check in result.checks] == [*CHECKS, "nothing written to"]
    assert {check.verdict for check in result.checks} == {"right"}
    for row in result.rows:
        # The error is this small only if the float64 run drew the same random numbers.
        assert row.torchs_error < 1e-4 or "16" in name or "BatchNorm" in name or "lazy" in name, row
    wanted = {f"gradient of {key}" for key, p in model.named_parameters() if p.requires_grad}
    wanted |= {"gradient of x" + {"nested output, keywords": "['x']", "a loss": "[0]"}.get(name, "")}
    wanted -= (
        {"gradient of x"} if name in ("whole numbers", "sparse gradients", "written-to input") else set()
    )
    assert {row.name for row in result.rows if row.name.startswith("gradient")} == wanted
    if not route.kernels:
        assert all(row.ratio == 1 for row in result.rows), shown(result)
        assert all(check.ratio == 1 for check in result.checks[:-1]), shown(result)
        assert "on PyTorch's operators. " in " ".join(shown(result).split())
    else:
        assert all(case.reason in str(r) if case.reason else r is None for r in route.reasons)
        assert "on the Triton kernels" in shown(result) or case.reason
    assert ("loss" in verdicts(result)) == (case.loss is not None)
    if name.startswith(("nested", "a loss")):
        assert {"output['y']", "output['more'][0]"} <= verdicts(result).keys()
