"""torch.func: every transform, in any order, gives the same as with torch.nn."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import parameters
from torch import nn as tnn
from torch.func import functional_call
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

SECTION = "torch.func and autograd"


def loss_of(model: tnn.Module) -> Callable[..., torch.Tensor]:
    """A loss of the parameters and the input whose derivatives of every order are not zero."""

    def loss(given: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        y = functional_call(model, given, (x,))
        return (y.square() * y).sum() + y.square().sum()

    return loss


@pytest.mark.capability(SECTION, "`torch.func.grad`, `grad_and_value`, `vjp`, `jacrev`")
def test_reverse_transforms(compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        given, loss = parameters(model), loss_of(model)
        yield from torch.func.grad(loss)(given, x).values()
        grads, value = torch.func.grad_and_value(loss, argnums=(0, 1))(given, x)
        yield from (value, grads[1], *grads[0].values())
        y, pull, aux = torch.func.vjp(lambda x: (model(x), x), x, has_aux=True)
        yield from (y, *pull(torch.ones_like(y)), aux)
        yield torch.func.jacrev(model)(x)
        yield torch.func.jacrev(model, chunk_size=2)(x)

    compare(run, fused=False)


@pytest.mark.capability(SECTION, "`torch.func.vmap` over inputs, weights, both; `in_dims`, `chunk_size`")
def test_vmap(compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        vmap, given = torch.func.vmap, parameters(model)
        call = lambda given, x: functional_call(model, given, (x,))  # noqa: E731
        several = {name: torch.stack([p, p / 2, -p]) for name, p in given.items()}
        xs = torch.stack([x, x + 1, 2 * x])
        yield vmap(model)(x)  # row by row
        yield vmap(model)(xs)
        yield vmap(model, in_dims=1, out_dims=2)(xs.transpose(0, 1))
        yield vmap(model, chunk_size=2)(xs)
        yield vmap(vmap(model))(xs)
        yield vmap(call, in_dims=(0, None))(several, x)
        yield vmap(call)(several, xs)
        yield vmap(call, in_dims=(None, 0), randomness="different")(given, xs)
        one = next(iter(given))  # the weight of the first layer alone
        yield vmap(lambda w: call({**given, one: w}, x))(several[one])

    compare(run, fused=False)


@pytest.mark.capability(SECTION, "`torch.func.jvp`, `jacfwd`")
@pytest.mark.filterwarnings("ignore:.*torch.jit")  # PyTorch's own forward mode uses it
def test_forward_transforms(compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        given = parameters(model)
        tangents = {name: p.cos() for name, p in given.items()}
        call = lambda given, x: functional_call(model, given, (x,))  # noqa: E731
        yield from torch.func.jvp(model, (x,), (x.sin(),))
        yield from torch.func.jvp(call, (given, x), (tangents, x.sin()))
        yield torch.func.jacfwd(model)(x)
        yield from torch.func.jacfwd(call)(given, x).values()

    compare(run, fused=False)


@pytest.mark.capability(SECTION, "`torch.func.linearize`, `functionalize`")
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Attempted to insert a get_attr Node")
def test_linearize(compare: Any) -> None:
    """linearize also calls the model itself once, so a kernel runs."""

    def run(model: tnn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        y, push = torch.func.linearize(model, x)
        yield from (y.detach(), push(x.sin()), push(x.cos()))
        yield torch.func.functionalize(model)(x).detach()

    compare(run, fused=True)


@pytest.mark.capability(SECTION, "`torch.func.hessian`, and transforms of transforms")
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_second_derivatives_by_transforms(compare: Any) -> None:
    func = torch.func

    def run(model: tnn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        given, loss = parameters(model), loss_of(model)
        of_x = lambda x: loss(given, x)  # noqa: E731
        yield func.hessian(of_x)(x[:2])
        yield func.jacrev(func.jacrev(of_x))(x[:2])
        yield func.jacrev(func.jacfwd(of_x))(x[:2])
        yield from func.jvp(func.grad(of_x), (x,), (x.sin(),))  # Hessian-vector product
        yield func.grad(lambda x: func.grad(of_x)(x).square().sum())(x)
        second = func.hessian(loss)(given, x[:2])
        yield from (block for row in second.values() for block in row.values())

    compare(run, fused=False, factor=4)


@pytest.mark.capability(SECTION, "`functional_call`")
def test_functional_call(compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        given = {name: (2 * p).requires_grad_() for name, p in parameters(model).items()}
        y = functional_call(model, given, (x,))
        yield y.detach()
        yield from torch.autograd.grad(y.square().sum(), list(given.values()))
        last = list(given)[-1]  # some of the parameters; parameters in two dictionaries
        yield functional_call(model, {last: given[last]}, (x,)).detach()
        yield functional_call(model, ({last: given[last]}, {next(iter(given)): given[next(iter(given))]}), x)
        yield model(x)

    compare(lambda model, x: [t.detach() for t in run(model, x)], fused=True)


@pytest.mark.capability(SECTION, "ensembles: `stack_module_state` and `vmap`")
def test_ensembles(compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        members = [copy.deepcopy(model) for _ in range(3)]
        with torch.no_grad():
            for i, member in enumerate(members):
                for p in member.parameters():
                    p.mul_(i + 0.5)
        stacked, buffers = torch.func.stack_module_state(members)
        skeleton = copy.deepcopy(model).to("meta")
        call = lambda given, x: functional_call(skeleton, (given, buffers), (x,))  # noqa: E731
        y = torch.func.vmap(call, in_dims=(0, None))(stacked, x)
        yield y.detach()
        yield from torch.autograd.grad(y.square().sum(), list(stacked.values()))

    compare(run, fused=False)


@pytest.mark.capability(SECTION, "per-sample gradients: `vmap` of `grad` of `functional_call`")
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_gradients_of_each_sample(chunk_size: int | None, compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        given, loss = parameters(model), loss_of(model)
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), chunk_size=chunk_size)(given, x)
        yield from each.values()

    compare(run, fused=False)


@pytest.mark.capability(SECTION, "per-sample gradients: `call_for_per_sample_grads`")
def test_expanded_weights(compare: Any) -> None:
    def run(model: tnn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        call_for_per_sample_grads(model, loss_reduction="sum")(x).square().sum().backward()
        return [p.grad_sample for p in model.parameters()]

    compare(run, fused=False)
