"""Autograd's features beyond a single backward give the same results as with torch.nn."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compatibility import Route
from networks import NETWORKS, leaves, parameters
from torch import nn as tnn
from torch.autograd import forward_ad
from torch.autograd import functional as autograd_functional
from torch.func import functional_call

SECTION = "torch.func and autograd"


@pytest.mark.capability(SECTION, "`torch.autograd.functional`: `jacobian`, `hessian`, `vhp`, `hvp`")
@pytest.mark.parametrize("vectorize", [False, True])
def test_autograd_functional(vectorize: bool, compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        scalar = lambda x: model(x).pow(3).sum()  # noqa: E731
        yield autograd_functional.jacobian(model, x[:1], vectorize=vectorize)
        yield autograd_functional.hessian(scalar, x[:1], vectorize=vectorize)
        if not vectorize:
            yield from autograd_functional.vhp(scalar, x, x.sin())
            yield from autograd_functional.hvp(scalar, x, x.sin())
            yield from autograd_functional.vjp(model, x, torch.ones_like(model(x)))
            yield from autograd_functional.jvp(model, x, x.sin())
            created = autograd_functional.jacobian(model, x[:1].clone().requires_grad_(), create_graph=True)
            yield created.detach()

    compare(run, fused=True, factor=4)


@pytest.mark.capability(SECTION, "`gradcheck` and `gradgradcheck` in float64")
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("fast_mode", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradcheck(fast_mode: bool, network: str, route: Route, device: torch.device) -> None:
    model = NETWORKS[network][0]().to(device, torch.float64)
    names = [name for name, _ in model.named_parameters()]

    def forward(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return functional_call(model, dict(zip(names, given, strict=True)), (x,))

    x = torch.randn(2, 5, dtype=torch.float64, device=device, requires_grad=True)
    checks = {"check_batched_grad": True, "fast_mode": fast_mode}
    assert torch.autograd.gradcheck(forward, (x, *model.parameters()), check_forward_ad=True, **checks)
    assert torch.autograd.gradgradcheck(forward, (x, *model.parameters()), check_fwd_over_rev=True, **checks)


@pytest.mark.capability(SECTION, "`gradcheck` in float32")
@pytest.mark.filterwarnings("ignore:Input #.* requires gradient and is not a double precision")
def test_gradcheck_in_float32(network: str, route: Route, device: torch.device) -> None:
    """Where no ReLU's input is near 0, the chains are smooth enough for large finite differences."""
    model = NETWORKS[network][0]().to(device)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.where(torch.rand_like(p) > 0.4, 4.0, -4.0) if p.dim() == 1 else p / 2)
    x = torch.rand(2, 5, device=device, requires_grad=True)
    checks = {"eps": 0.05, "atol": 1e-2, "rtol": 1e-2, "check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(model, (x,), **checks)
    assert (None in route.reasons) == route.kernels


@pytest.mark.capability(SECTION, "second and third derivatives")
def test_backward_of_backward_of_backward(compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        leaf, inputs = leaves(model, x)
        loss = model(leaf).pow(3).sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, create_graph=True)
        third = torch.autograd.grad(sum(g.square().sum() for g in second), inputs)
        yield from (t.detach() for t in (*first, *second, *third))

    compare(run, fused=True, factor=4)


@pytest.mark.capability(SECTION, "training with a gradient penalty (WGAN-GP)")
def test_gradient_penalty(compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(3):
            real, fake = x + step, x.cos()
            mixed = (0.3 * real + 0.7 * fake).requires_grad_()
            score = model(mixed).square().sum(1)
            (slope,) = torch.autograd.grad(score.sum(), mixed, create_graph=True)
            penalty = (slope.norm(2, dim=1) - 1).square().mean()
            loss = model(fake).mean() - model(real).mean() + 10 * penalty
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                yield penalty.detach()
                yield from [p.grad.clone() for p in model.parameters()]
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        yield from (p.detach() for p in model.parameters())

    compare(run, fused=True, factor=4)


@pytest.mark.capability(SECTION, "forward-mode AD: dual tensors")
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_dual_tensors(compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        with forward_ad.dual_level():
            y = model(forward_ad.make_dual(x, x.sin()))
            yield from (t.detach() for t in forward_ad.unpack_dual(y))
            weight = next(model.parameters()).detach()
            name = next(iter(parameters(model)))
            dual = forward_ad.make_dual(weight, weight.cos())
            yield forward_ad.unpack_dual(functional_call(model, {name: dual}, (x,))).tangent.detach()

    compare(run, fused=False)


@pytest.mark.capability(SECTION, "forward mode over a backward that was recorded before it")
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_forward_over_reverse(compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        leaf, inputs = leaves(model, x)
        y = model(leaf)  # on the kernels, where they run
        with forward_ad.dual_level():
            grad = forward_ad.make_dual(torch.ones_like(y), y.detach().sin())
            for gradient in torch.autograd.grad(y, inputs, grad, retain_graph=True):
                yield forward_ad.unpack_dual(gradient).tangent
            dual = forward_ad.make_dual(leaf, leaf.detach().sin())
            (slope,) = torch.autograd.grad(model(dual).square().sum(), dual, create_graph=True)
            yield forward_ad.unpack_dual(slope).tangent

    compare(lambda model, x: [t.detach() for t in run(model, x)], fused=True)


@pytest.mark.capability(SECTION, "`detect_anomaly`")
@pytest.mark.filterwarnings(
    "ignore:Anomaly Detection has been enabled",
    "ignore:Error detected in",
    "ignore:invalid value encountered",
)
def test_detect_anomaly(compare: Any, route: Route) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        leaf, inputs = leaves(model, x)
        broken = copy.deepcopy(model)
        with torch.no_grad():
            for p in broken.parameters():
                p.copy_(p.sign() * torch.inf)
        with torch.autograd.detect_anomaly():
            y = model(leaf)
            with pytest.raises(RuntimeError, match=r"Function '\w+' returned nan values"):
                broken(leaf).sum().backward()
            gradients = torch.autograd.grad(model(leaf).sum(), inputs)
        return [y.detach(), *gradients]

    compare(run, fused=True)


@pytest.mark.capability(SECTION, "backward more than once: `retain_graph`")
def test_backward_twice(compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        leaf, inputs = leaves(model, x)
        loss = model(leaf).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()  # gradients add up
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
        return [t.grad for t in inputs]

    compare(run, fused=True)


@pytest.mark.capability(SECTION, "`torch.autograd.grad`: `allow_unused`, `materialize_grads`; `inputs=`")
def test_options_of_grad(compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        leaf, inputs = leaves(model, x)
        y, unused = model(leaf), torch.ones(2, device=x.device, requires_grad=True)
        options: dict[str, Any] = {"grad_outputs": y.detach().sin(), "retain_graph": True}
        with pytest.raises(RuntimeError, match="have been used in the graph"):
            torch.autograd.grad(y, [leaf, unused], **options)
        of_leaf, none = torch.autograd.grad(y, [leaf, unused], allow_unused=True, **options)
        assert none is None
        yield of_leaf
        yield from torch.autograd.grad(y, [unused, *inputs[1:]], materialize_grads=True, **options)
        for wanted in (leaf, inputs[1], inputs[-1]):
            yield from torch.autograd.grad(y, wanted, **options)
        y.backward(y.detach().cos(), inputs=[inputs[-1]])
        assert [t.grad is None for t in inputs] == [True] * (len(inputs) - 1) + [False]
        yield inputs[-1].grad

    compare(run, fused=True)


@pytest.mark.capability(SECTION, "`is_grads_batched=True`")
def test_batched_gradients(compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        leaf, inputs = leaves(model, x)
        y = model(leaf)
        rows = torch.linspace(-1, 1, 3 * y.numel(), device=x.device, dtype=x.dtype).view(3, *y.shape)
        yield from torch.autograd.grad(y, inputs, rows, is_grads_batched=True, retain_graph=True)
        for gradient in torch.autograd.grad(y, inputs, rows, is_grads_batched=True, create_graph=True):
            yield gradient.detach()

    compare(run, fused=True)


@contextlib.contextmanager
def on_disk(folder: Any) -> Iterator[None]:
    """Write to files what autograd saves."""
    numbers = itertools.count()

    def pack(t: torch.Tensor) -> Any:
        path = folder / f"{id(t)}-{next(numbers)}.pt"
        torch.save(t.detach(), path)
        return path

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda path: torch.load(path)):
        yield


SAVED: dict[str, Callable[[Any], Any]] = {
    "to disk": on_disk,
    "save_on_cpu": lambda folder: torch.autograd.graph.save_on_cpu(),
    "copies": lambda folder: torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t),
}


@pytest.mark.capability(SECTION, "`saved_tensors_hooks` and `save_on_cpu`")
@pytest.mark.parametrize("how", SAVED)
def test_saved_tensors_elsewhere(how: str, compare: Any, tmp_path: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        leaf, inputs = leaves(model, x)
        with SAVED[how](tmp_path):
            y = model(leaf)
        first = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
        return [*first, *torch.autograd.grad(y.square().sum(), inputs)]

    compare(run, fused=True)


@pytest.mark.capability(SECTION, "`allow_mutation_on_saved_tensors`")
def test_saved_tensors_changed(compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        leaf, inputs = leaves(model, x)
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            y = model(leaf)
            with torch.no_grad():
                for p in model.parameters():
                    p.zero_()
            y.square().sum().backward()
        return [t.grad for t in inputs]

    compare(run, fused=False)


@pytest.mark.capability(SECTION, "hooks on tensors, parameters and graph nodes")
def test_hooks(compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        leaf, inputs = leaves(model, x)
        seen: list[torch.Tensor] = []
        h = leaf * 1  # not a leaf
        h.register_hook(lambda g: seen.append(g.detach().clone()))
        h.retain_grad()
        y = model(h)
        y.retain_grad()
        y.register_hook(lambda g: 2 * g)
        y.grad_fn.register_prehook(lambda gs: tuple(g + 1 for g in gs))
        h.grad_fn.register_hook(lambda into, out: seen.append(out[0].detach().clone()))
        handle = inputs[1].register_hook(lambda g: 0 * g)
        inputs[2].register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        torch.autograd.graph.register_multi_grad_hook(inputs, lambda gs: seen.extend(g.clone() for g in gs))
        y.square().sum().backward(retain_graph=True)
        handle.remove()
        model.zero_grad()
        y.sum().backward()
        return [*seen, y.grad, h.grad, *(t.grad for t in inputs)]

    compare(run, fused=True)


GRAD_MODES = [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)]


@pytest.mark.capability(SECTION, "`no_grad`, `inference_mode`, `set_grad_enabled`, `enable_grad`")
@pytest.mark.parametrize("mode", GRAD_MODES, ids=["no_grad", "inference_mode", "set_grad_enabled"])
def test_grad_modes(mode: Any, compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        leaf, inputs = leaves(model, x)
        with mode():
            y = model(leaf)
            assert not y.requires_grad
            assert y.is_inference() == torch.is_inference_mode_enabled()
            assert y.grad_fn is None
            if not y.is_inference():
                with torch.enable_grad():
                    yield from torch.autograd.grad(model(leaf).sum(), inputs)
        yield y.clone()
        model.requires_grad_(False)
        assert not model(x).requires_grad
        (slope,) = torch.autograd.grad(model(leaf).sum(), leaf)
        yield slope

    compare(run, fused=True)
