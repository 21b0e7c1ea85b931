"""Autocast, GradScaler and mixed dtypes: the dtypes, values and errors of torch.nn."""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compatibility import Route
from oracle import assert_right
from torch import nn as tnn
from torch.nn import functional as F

import fusedmlp
from fusedmlp import functional, nn

HALVES = (torch.float16, torch.bfloat16)
Cast = Callable[..., contextlib.AbstractContextManager[Any]]


class Net(tnn.Module):
    """A user's model, for `fuse`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = tnn.Linear(20, 24), tnn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(x)))


def filled(ours: tnn.Module, torchs: tnn.Module) -> tnn.Module:
    ours.load_state_dict(torchs.state_dict())
    return ours


# How torch's model is made, and ours from it.
MODELS: dict[str, tuple[Callable[[], tnn.Module], Callable[[Any], tnn.Module]]] = {
    "Linear": (lambda: tnn.Linear(20, 12), lambda model: filled(nn.Linear(20, 12), model)),
    "LinearReLU": (
        lambda: tnn.Sequential(tnn.Linear(20, 12), tnn.ReLU()),
        lambda model: nn.Sequential(filled(nn.LinearReLU(20, 12), model[0])),
    ),
    "Sequential": (
        lambda: tnn.Sequential(
            tnn.Linear(20, 24), tnn.ReLU(), tnn.Linear(24, 12), tnn.LayerNorm(12), tnn.Linear(12, 12)
        ),
        lambda model: nn.Sequential(*copy.deepcopy(model)),
    ),
    "MLP": (
        lambda: tnn.Sequential(tnn.Linear(20, 24), tnn.ReLU(), tnn.Linear(24, 12)),
        lambda model: filled(nn.MLP(20, [24], 12), model),
    ),
    "fused model": (Net, lambda model: fusedmlp.fuse(copy.deepcopy(model))),
}


def pair(name: str, device: torch.device) -> tuple[tnn.Module, tnn.Module]:
    """(ours, torchs). The inputs of ReLUs are so far from 0 that no rounding changes their signs."""
    torchs = MODELS[name][0]()
    linears = [m for m in torchs.modules() if isinstance(m, tnn.Linear)]
    with torch.no_grad():
        for linear in linears[: len(linears) - 1 or 1]:
            linear.bias.copy_(torch.where(torch.randn_like(linear.bias) > 0, 6.0, -6.0))
    return MODELS[name][1](torchs).to(device), torchs.to(device)


def loss_of(*ys: torch.Tensor) -> torch.Tensor:
    """A sum with weights of both signs, so that the interpreter's truncations to bfloat16 do not add up."""
    return sum(
        ((y.float() * torch.arange(y.numel(), device=y.device).square().cos().view_as(y)).sum() for y in ys),
        start=torch.zeros((), device=ys[0].device),
    )


def outside(model: tnn.Module, x: torch.Tensor, cast: Cast) -> list[torch.Tensor]:
    """backward() runs outside of autocast, as PyTorch's documentation recommends."""
    with cast():
        y = model(x)
    loss_of(y).backward()
    return [y]


def inside(model: tnn.Module, x: torch.Tensor, cast: Cast) -> list[torch.Tensor]:
    with cast():
        y = model(x)
        loss_of(y).backward()
    return [y]


def twice(model: tnn.Module, x: torch.Tensor, cast: Cast, **options: Any) -> list[torch.Tensor]:
    """The cast weights come out of autocast's cache the second time."""
    with cast(**options):
        ys = [model(x), model(2 * x)]
    loss_of(*ys).backward()
    return ys


def uncached(model: tnn.Module, x: torch.Tensor, cast: Cast) -> list[torch.Tensor]:
    return twice(model, x, cast, cache_enabled=False)


def nested(model: tnn.Module, x: torch.Tensor, cast: Cast) -> list[torch.Tensor]:
    """Autocast to another dtype, and none, inside. torch's cache would return weights of the first dtype."""
    with cast(cache_enabled=False):
        ys = [model(x)]
        with cast(other=True, cache_enabled=False):
            ys.append(model(x))
        with cast(enabled=False):
            ys.append(model(x))
        ys.append(model(x))
    loss_of(*ys).backward()
    return ys


def without_gradient(model: tnn.Module, x: torch.Tensor, cast: Cast) -> list[torch.Tensor]:
    """The weights in the cache have no gradient; later calls must get gradients all the same."""
    with cast():
        with torch.no_grad():
            a = model(x)
        with torch.inference_mode():
            b = model(x)
        c = model(x)
    loss_of(c).backward()
    return [a, b.clone(), c]


def penalty(model: tnn.Module, x: torch.Tensor, cast: Cast) -> list[torch.Tensor]:
    """create_graph: a gradient penalty, as in PyTorch's documentation of automatic mixed precision."""
    with cast():
        y = model(x)
    (grad,) = torch.autograd.grad(loss_of(y), x, create_graph=True)
    with cast():
        loss = loss_of(y) + grad.float().square().sum()
    loss.backward()
    return [y, grad]


def decorated(model: tnn.Module, x: torch.Tensor, cast: Cast) -> list[torch.Tensor]:
    y = cast()(model)(x)
    loss_of(y).backward()
    return [y]


SCENES = (outside, inside, twice, uncached, nested, without_gradient, penalty, decorated)


def casting(device: torch.device, dtype: torch.dtype) -> Cast:
    def cast(other: bool = False, **options: Any) -> torch.autocast:
        return torch.autocast(device.type, HALVES[1 - HALVES.index(dtype)] if other else dtype, **options)

    return cast


def casting_nothing(**options: Any) -> Any:
    return torch.autocast("cpu", enabled=False)


def results(scene: Any, model: tnn.Module, x: torch.Tensor, cast: Cast) -> list[torch.Tensor | None]:
    """The scene's outputs, and the gradients of x and of the parameters."""
    leaf = x.detach().clone().requires_grad_()
    outputs = scene(model, leaf, cast)
    gradients = [leaf.grad, *(parameter.grad for parameter in model.parameters())]
    return [None if t is None else t.detach() for t in (*outputs, *gradients)]


def compare(mine: Any, torchs: Any, exact: Any, route: Route, factor: float) -> None:
    for i, (our, its, right) in enumerate(zip(mine, torchs, exact, strict=True)):
        assert (our is None) == (its is None), f"result {i}"
        if our is None:
            continue
        assert our.dtype == its.dtype
        if None in route.reasons:
            assert_right(our, its, right, f"result {i}", factor=factor)
        else:
            assert torch.equal(our, its), f"result {i}"


def factor_of(dtype: torch.dtype, device: torch.device) -> float:
    """The bound, in units of PyTorch's error. Several roundings follow one another, PyTorch's own error is
    sometimes small by luck, and the interpreter truncates to bfloat16 where others round."""
    return 8.0 if dtype is torch.bfloat16 and device.type == "cpu" else 4.0


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.capability("Mixed precision", "torch.autocast to float16 and bfloat16")
def test_autocast(name: str, scene: Any, dtype: torch.dtype, route: Route, device: torch.device) -> None:
    ours, torchs = pair(name, device)
    exactly = copy.deepcopy(torchs).double()
    x = torch.randn(32, 20, device=device)
    before = [p.clone() for p in ours.parameters()]
    mine, theirs = (results(scene, model, x, casting(device, dtype)) for model in (ours, torchs))
    exact = results(scene, exactly, x.double(), casting_nothing)
    worst = torch.bfloat16 if scene is nested else dtype
    compare(mine, theirs, exact, route, factor_of(worst, device))
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))
    assert not torch.is_autocast_enabled(device.type)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.capability("Mixed precision", "torch.amp.GradScaler")
def test_scaled_training_skips_a_step_that_overflows(name: str, route: Route, device: torch.device) -> None:
    ours, torchs = pair(name, device)
    data = torch.randn(6, 32, 20, device=device)
    histories = []
    for model in (ours, torchs):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=2)
        history = []
        for step, x in enumerate(data):
            optimizer.zero_grad()
            before = [p.detach().clone() for p in model.parameters()]
            with torch.autocast(device.type, torch.float16):
                y = model(x)
                loss = y.float().square().mean() * (math.inf if step == 3 else 1)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)
            scaler.step(optimizer)
            scaler.update()
            moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            history.append((scaler.get_scale(), moved, loss.item(), norm.item()))
        histories.append(history)
        assert [moved for _, moved, _, _ in history] == [step != 3 for step in range(6)]
    scales = [[scale for scale, *_ in history] for history in histories]
    assert scales == [[1024.0, 2048.0, 2048.0, 1024.0, 1024.0, 2048.0]] * 2
    exact = {} if None in route.reasons else {"rtol": 0.0, "atol": 0.0}
    for (_, _, *mine), (_, _, *theirs) in zip(*histories, strict=True):
        mine, theirs = (torch.tensor(numbers) for numbers in (mine, theirs))
        torch.testing.assert_close(mine, theirs, equal_nan=True, **({"rtol": 2e-3, "atol": 1e-4} | exact))
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 2e-3, "atol": 1e-3} | exact))


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("autocast", [None, *HALVES], ids=["no autocast", "float16", "bfloat16"])
@pytest.mark.parametrize("of_parameters", DTYPES, ids=str)
@pytest.mark.capability("Mixed precision", "parameters and inputs of other dtypes than each other")
def test_mixed_dtypes(
    of_parameters: torch.dtype, autocast: torch.dtype | None, route: Route, device: torch.device
) -> None:
    """The result has torch.nn's dtypes, or the error has its type."""
    ours, torchs = (model.to(of_parameters) for model in pair("MLP", device))
    for of_input in (*DTYPES, torch.int64):
        x = (3 * torch.randn(32, 20, device=device)).to(of_input)
        outcomes, before = [], len(route.reasons)
        for model in (ours, torchs):
            model.zero_grad()
            try:
                with torch.autocast(device.type, autocast or torch.float16, enabled=autocast is not None):
                    y = model(x)
                loss_of(y).backward()
                outcomes.append([y.detach(), *(p.grad for p in model.parameters())])
            except RuntimeError as error:
                outcomes.append(error)
        mine, theirs = outcomes
        if isinstance(theirs, Exception):
            assert type(mine) is type(theirs), f"{of_input}: {mine}"
            assert all(str(d) in str(mine) for d in (of_parameters, of_input, tuple(x.shape))), mine
            del route.reasons[before:]  # reasons of calls that raise do not count
            continue
        assert not isinstance(mine, Exception), f"{of_input}: {mine}"
        exact = copy.deepcopy(torchs).double()
        exact.zero_grad()
        y = exact(x.double())
        loss_of(y).backward()
        right = [y.detach(), *(p.grad for p in exact.parameters())]
        compare(mine, theirs, right, route, factor_of(autocast or of_parameters, device))


@pytest.mark.capability("Mixed precision", "torch.autocast of another device, or to another dtype")
def test_autocast_to_another_dtype(route: Route, device: torch.device) -> None:
    """On a CPU torch.autocast warns about these dtypes and does nothing."""
    ours, torchs = pair("MLP", device)
    x = torch.randn(32, 20, device=device)
    for dtype in (torch.float32, torch.float64):
        results = []
        for model in (ours, torchs):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    with torch.autocast(device.type, dtype):
                        results.append(model(x))
                except RuntimeError as error:
                    results.append(type(error))
        if isinstance(results[1], torch.Tensor):
            torch.testing.assert_close(results[0], results[1])
        else:
            assert results[0] is results[1]


@pytest.mark.capability("Mixed precision", "torch.autocast of another device, or to another dtype")
def test_autocast_of_another_device(route: Route, device: torch.device) -> None:
    ours, torchs = pair("MLP", device)
    x = torch.randn(32, 20, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where there is no such device
        with torch.autocast("cuda" if device.type == "cpu" else "cpu", torch.bfloat16):
            mine, theirs = ours(x), torchs(x)
    assert mine.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(mine, theirs)


@pytest.mark.capability("Mixed precision", "torch.autocast to float16 and bfloat16")
def test_the_functions_under_autocast(route: Route, device: torch.device) -> None:
    x, weight, bias = (torch.randn(s, device=device) for s in ((32, 20), (12, 20), (12,)))
    with torch.autocast(device.type, torch.float16):
        for mine, theirs in (
            (functional.linear(x, weight, bias), F.linear(x, weight, bias)),
            (functional.linear(x[0], weight.half()), F.linear(x[0], weight.half())),
            (functional.linear_relu(x, weight, bias), F.relu(F.linear(x, weight, bias))),
            (functional.mlp(x.half(), [weight], [bias]), F.linear(x.half(), weight, bias)),
            (functional.linear(x.double(), weight.double()), F.linear(x.double(), weight.double())),
        ):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs)


class Switched(tnn.Module):
    """The function after the Linear changes after `fuse` has read the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.after = tnn.Linear(20, 12), "relu"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(torch, self.after)(self.fc(x))  # type: ignore[no-any-return]


def test_autocast_holds_for_an_output_that_waited_for_its_relu(route: Route, device: torch.device) -> None:
    torchs = Switched().to(device)
    ours = fusedmlp.fuse(copy.deepcopy(torchs))
    torchs.after = ours.after = "sin"
    x = torch.randn(7, 20, device=device)
    results = []
    for model in (ours, torchs):
        with torch.autocast(device.type, torch.float16):
            y = model(x)
        y.float().sum().backward()
        results.append([y.detach(), model.fc.weight.grad, model.fc.bias.grad])
    for our, its in zip(*results, strict=True):
        torch.testing.assert_close(our, its, rtol=0, atol=0)
