"""Inputs and parameters that are not plain tensors: the results, or the types of errors, are torch.nn's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compatibility import Route
from networks import NETWORKS, pair
from torch import nn as tnn
from torch.testing._internal.two_tensor import TwoTensor

SECTION = "Tools that look at modules"


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the type of the error that it raises."""
    try:
        return call()
    except Exception as error:
        return type(error)


class Logged(torch.Tensor):
    """A tensor that notes the functions called with it."""

    seen: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def two(tensor: torch.Tensor) -> Any:
    return TwoTensor(tensor, tensor.clone())


def parameters_as(model: Any, kind: Callable[[torch.Tensor], Any]) -> None:
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            module._parameters[name] = tnn.Parameter(kind(p.detach()))


@pytest.mark.capability(SECTION, "tensor subclasses, as input and as parameters")
@pytest.mark.parametrize("kind", ["__torch_function__", "TwoTensor"])
@pytest.mark.parametrize("place", ["input", "parameters"])
@pytest.mark.parametrize("network", NETWORKS)
def test_subclasses(network: str, place: str, kind: str, route: Route, device: torch.device) -> None:
    as_kind = two if kind == "TwoTensor" else lambda t: t.as_subclass(Logged)
    found = []
    for model in pair(network, device):
        x = torch.ones(6, 5, device=device)
        Logged.seen = []
        if place == "input":
            x = as_kind(x)
        else:
            parameters_as(model, as_kind)
        y = model(x)
        y.square().sum().backward()
        seen = list(Logged.seen)
        tensors = [y, *(p.grad for p in model.parameters())]
        found.append(
            (
                seen,
                [type(t) for t in tensors],
                [getattr(t, "a", t).detach().as_subclass(torch.Tensor) for t in tensors],
            )
        )
    (*ours, values), (*torchs, wanted) = found
    assert ours == torchs
    assert all(map(torch.equal, values, wanted))
    assert None not in route.reasons


SPARSE, NESTED = "sparse inputs and weights: COO, CSR, CSC", "nested tensors, also jagged, and masked ones"
OTHERS = "complex inputs and weights, integers, quantized tensors"
INPUTS: dict[str, tuple[str, Callable[[torch.Tensor], Any]]] = {
    "COO": (SPARSE, lambda x: x.to_sparse()),
    "CSR": (SPARSE, lambda x: x.to_sparse_csr()),
    "CSC": (SPARSE, lambda x: x.to_sparse_csc()),
    "nested": (NESTED, lambda x: torch.nested.nested_tensor([x[:2], x[2:]])),
    "jagged": (NESTED, lambda x: torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)),
    "masked": (NESTED, lambda x: torch.masked.masked_tensor(x, x > 0)),
    "complex": (OTHERS, lambda x: torch.complex(x, -x)),
    "conjugated": (OTHERS, lambda x: torch.complex(x, -x).conj()),
    "integers": (OTHERS, lambda x: x.long()),
    "quantized": (OTHERS, lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)),
}
WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda weight: weight,
    "complex": lambda weight: torch.complex(weight, -weight),
    "sparse": lambda weight: weight.to_sparse_csr(),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.capability(SECTION, f"{row}: as torch.nn, error or not"))
        for kind, (row, _) in INPUTS.items()
    ],
)
def test_other_inputs(kind: str, weights: str, route: Route, device: torch.device) -> None:
    for network in NETWORKS:
        found = []
        for model in pair(network, device):
            x = INPUTS[kind][1](torch.randn(6, 5, generator=torch.Generator().manual_seed(5)).to(device))
            for module in model.modules():
                if isinstance(module, tnn.Linear):
                    module.weight = tnn.Parameter(WEIGHTS[weights](module.weight.detach()))
                    module.bias.data = module.bias.data.to(module.weight.dtype)
            y = outcome(lambda model=model, x=x: model(x))
            error = y if isinstance(y, type) else outcome(lambda y=y: y.abs().sum().backward())
            found.append((error, [] if isinstance(y, type) else [y, *(p.grad for p in model.parameters())]))
        (error, ours), (torchs_error, torchs) = found
        assert error == torchs_error, network
        for a, b in zip(ours, torchs, strict=True):
            assert type(a) is type(b), network
            if a is not None:
                assert (a.layout, a.dtype, a.is_nested) == (b.layout, b.dtype, b.is_nested), network
                for one, other in zip(dense(a), dense(b), strict=True):
                    # The layers after the one with the sparse input may run on the kernels.
                    bound = {} if route.kernels else {"rtol": 0, "atol": 0}
                    torch.testing.assert_close(one, other, **bound, equal_nan=True)


def dense(t: Any) -> list[torch.Tensor]:
    if t.is_nested:
        return [part for whole in t.unbind() for part in dense(whole)]
    if type(t).__name__ == "MaskedTensor":
        return [t.get_mask(), t.get_data()[t.get_mask()]]
    return [t.to_dense().detach()]
