"""LoRA tools, profilers and FLOP counters replace functions of PyTorch globally.

Fused layers and steps then call the replacement as often as torch.nn does, with the same results.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compatibility import Route, taken
from torch import nn as tnn
from torch.nn import functional as F
from torch.optim import adam, sgd
from training import CROSS_ENTROPY, MSE, OPTIMIZERS, Twins, batches, mlp

import fusedmlp
from fusedmlp import functional, nn
from fusedmlp.torch_tools import cuda_graph, patched
from fusedmlp.train import graph_step

LAYERS: dict[str, tuple[Any, str]] = {
    "torch.nn.Linear.forward": (tnn.Linear, "forward"),
    "torch.nn.ReLU.forward": (tnn.ReLU, "forward"),
    "torch.nn.Sequential.forward": (tnn.Sequential, "forward"),
    "torch.nn.Module._call_impl": (tnn.Module, "_call_impl"),
    "torch.nn.functional.linear": (F, "linear"),
    "torch.nn.functional.relu": (F, "relu"),
    "torch.relu": (torch, "relu"),
}
STEPS: dict[str, tuple[Any, str]] = LAYERS | {
    "torch.nn.Flatten.forward": (tnn.Flatten, "forward"),
    "torch.nn.functional.cross_entropy": (F, "cross_entropy"),
    "torch.nn.functional.mse_loss": (F, "mse_loss"),
    "torch.Tensor.backward": (torch.Tensor, "backward"),
    "torch.autograd.backward": (torch.autograd, "backward"),
    "torch.optim.sgd.sgd": (sgd, "sgd"),
    "torch.optim.adam.adam": (adam, "adam"),
}


class Net(tnn.Module):
    """A user's model with a Sequential, and with F.relu in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = tnn.Linear(5, 6), tnn.ReLU()
        self.tail = tnn.Sequential(
            tnn.Linear(6, 4), tnn.ReLU(), tnn.Linear(4, 4), tnn.ReLU(), tnn.Linear(4, 3)
        )

    def forward(self, x: torch.Tensor) -> Any:
        return self.tail(F.relu(self.act(self.fc(x)) - 0.1))


class Paired(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = tnn.Linear(5, 6), tnn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(F.relu(self.fc(x)))


def built() -> tuple[tnn.Module, tnn.Module]:
    ours = nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 4), nn.ReLU()), nn.Linear(4, 3)
    )
    torchs = tnn.Sequential(
        tnn.Linear(5, 6), tnn.ReLU(), tnn.Sequential(tnn.Linear(6, 4), tnn.ReLU()), tnn.Linear(4, 3)
    )
    torchs.load_state_dict(ours.state_dict())
    return ours, torchs


def fused(kind: Callable[[], tnn.Module]) -> tuple[tnn.Module, tnn.Module]:
    torchs = kind()
    return fusedmlp.fuse(copy.deepcopy(torchs)), torchs


MODELS = {
    "built": built,
    "fused": functools.partial(fused, Net),
    "paired": functools.partial(fused, Paired),
    "a Linear": lambda: fused(lambda: tnn.Linear(5, 3)),
}


def patch(name: str, monkeypatch: pytest.MonkeyPatch, calls: list[str], factor: float = 1.0) -> None:
    owner, attribute = STEPS[name]
    original = getattr(owner, attribute)

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        result = original(*args, **kwargs)
        return result if factor == 1.0 else result * factor

    monkeypatch.setattr(owner, attribute, replaced)


def run(model: tnn.Module, calls: list[str], x: torch.Tensor) -> tuple[list[Any], int]:
    """Results with and without gradients, and how many calls there were."""
    calls.clear()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    with torch.no_grad():
        z = model(x)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [y.detach().clone(), z, x.grad, *gradients], len(calls)


@pytest.mark.thinned
@pytest.mark.capability(
    "Tools that look at modules", "patches of `torch.nn.Linear.forward`, `F.linear` and their like, for all"
)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_call_the_replacement(
    name: str, kind: str, route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers run as usual before the replacement and after it is undone."""
    ours, torchs = MODELS[kind]()
    x = torch.randn(40, 5)
    before, _ = run(ours, [], x)
    reasons = len(route.reasons)
    calls: list[str] = []
    with monkeypatch.context() as patched:
        patch(name, patched, calls, factor=1.5)
        (mine, count), (its, goal) = run(ours, calls, x), run(torchs, calls, x)
    assert count == goal
    for one, other in zip(mine, its, strict=True):
        assert torch.equal(one, other)
    assert all(reason is not None for reason in route.reasons[reasons:])
    after, _ = run(ours, [], x)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


@pytest.mark.kernels
def test_linear_relu_calls_the_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.LinearReLU(5, 3), torch.randn(4, 5)
    for name in ("torch.nn.Linear.forward", "torch.nn.functional.linear", "torch.nn.functional.relu"):
        calls: list[str] = []
        with monkeypatch.context() as patched, taken(Route(True)):
            patch(name, patched, calls)
            assert (layer(x) >= 0).all()
        assert len(calls) == 1


@pytest.mark.kernels
@pytest.mark.parametrize("name", LAYERS)
def test_explain_names_it_and_forced_kernels_raise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(4, 5)
    patch(name, monkeypatch, [])
    with taken(Route(True)):
        rows = fusedmlp.explain(model, x).rows
    assert {row.reason for row in rows} == {f"The function {name} was replaced."}
    with (
        fusedmlp.backend("triton"),
        pytest.raises(RuntimeError, match=rf"cannot run here\. The function {name} was replaced\."),
    ):
        model(x)


@pytest.mark.parametrize("optimizer", ["SGD, momentum", "Adam", "AdamW"])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_calls_the_replacement(name: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_fn = MSE if name.endswith("mse_loss") else CROSS_ENTROPY
    model = tnn.Sequential(tnn.Flatten(), *mlp())
    twins = Twins(model, OPTIMIZERS[optimizer], loss_fn)
    data = batches(4)
    if loss_fn is MSE:
        data = [(x, torch.randn(len(x), 5).double()) for x, _ in data]
    twins.train(data[:2], "Direct")
    calls: list[str] = []
    with monkeypatch.context() as patched:
        patch(name, patched, calls)
        assert f"{name} was replaced" in twins.step.explain(*data[2])
        twins.step(*data[2])
        count = len(calls)
        twins.plain(*data[2])
        assert len(calls) == 2 * count
        x, y = data[2][0].float(), data[2][1]
        patched.setattr(cuda_graph, "why_not_capture", lambda: None)
        assert (
            graph_step.why_not(model, loss_fn, twins.optimizer, x, y) == f"The function {name} was replaced."
        )
    twins.train(data[3:], "Direct")
    twins.assert_same()


def test_nothing_is_taken_for_replaced() -> None:
    """Compiling and tracing do not count as replacing a function."""
    model = tnn.Sequential(tnn.Linear(3, 2), tnn.ReLU())
    torch.compile(model, backend="eager")(torch.randn(2, 3))
    torch.fx.symbolic_trace(model)
    assert patched.why_step_patched() is None


@pytest.mark.kernels
@pytest.mark.parametrize("name", sorted({*LAYERS} - {"torch.nn.Module._call_impl"}))  # compiled away
def test_compiled_layers_notice_the_replacement(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do so even if the kernels are in the compiled code."""
    torch.compiler.reset()
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(4, 5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    noted: list[str | None] = []
    real = functional.fused_mlp
    monkeypatch.setattr(functional, "fused_mlp", lambda *a: (noted.append(None), real(*a))[1])
    with torch.no_grad(), taken(Route(True)):
        before = compiled(x)
        assert noted
        noted.clear()
        with monkeypatch.context() as patched:
            patch(name, patched, [])
            compiled(x)
            assert not noted
        assert torch.equal(compiled(x), before)
