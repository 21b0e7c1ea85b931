"""Models for the tests of fuse and unfuse, and helpers that compare them."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import assert_right
from torch import nn as tnn

import fusedmlp
from fusedmlp.convert import Row, pending_relu, report, unfuse


class Custom(tnn.Module):
    """A model with fc, other and act, whose forward is the function that a test passes."""

    def __init__(self, inplace: bool = False, **attributes: Any) -> None:
        super().__init__()
        self.act = tnn.ReLU(inplace)
        self.fc, self.other = tnn.Linear(5, 5), tnn.Linear(5, 5)
        self.__dict__.update(attributes)

    def forward(self, x: torch.Tensor) -> Any:
        return self.code(self, x)


class Blocks(tnn.Sequential):
    """A Sequential subclass without its own forward, like those of torchvision."""

    def __init__(self, width: int) -> None:
        super().__init__(tnn.Linear(5, width), tnn.ReLU(), tnn.Linear(width, 3))
        self.width = width


class Reverse(torch.autograd.Function):
    """Reverse the gradient, as in domain adaptation; forward returns its input itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return -grads[0]


class Clipped(torch.autograd.Function):
    """ReLU as tutorials write it, but with another gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return 3 * grads[0]


def custom(code: Callable[[Any, torch.Tensor], Any], **attributes: Any) -> Custom:
    return Custom(code=code, **attributes)


def row(model: tnn.Module, name: str) -> Row:
    (found,) = (row for row in report(model).rows if name in row.names)
    return found


def state(model: tnn.Module) -> Any:
    """Everything that fuse and unfuse together must leave as it was."""
    return (
        repr(model),
        list(model.state_dict()),
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        [(name, id(b)) for name, b in model.named_buffers()],
        [(type(m), m.training, [(k, id(v)) for k, v in m.__dict__.items()]) for m in model.modules()],
    )


def run(model: tnn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output and all gradients."""
    leaf = x.clone().requires_grad_()
    torch.manual_seed(7)
    model.zero_grad()
    y = model(leaf)
    (y if isinstance(y, torch.Tensor) else sum(y)).square().sum().backward()
    tensors = [y, leaf.grad, *(p.grad for p in model.parameters())]
    return [t.detach().clone() for t in tensors if isinstance(t, torch.Tensor)]


def assert_same_bits(ours: list[torch.Tensor], torchs: list[torch.Tensor]) -> None:
    assert len(ours) == len(torchs)
    assert all(map(torch.equal, ours, torchs))


@contextlib.contextmanager
def spied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Collect a 1 for each Linear in a forward that the kernels compute together with its ReLU."""
    calls: list[int] = []
    output = pending_relu._DeferredOutput
    of = output.of
    with monkeypatch.context() as patch:
        patch.setattr(output, "of", staticmethod(lambda *a: (calls.append(1), of(*a))[1]))
        yield calls


def assert_right_on_kernels(
    model: tnn.Module, x: torch.Tensor, runner: Callable[..., list[torch.Tensor]] = run
) -> list[torch.Tensor]:
    """Compare a fused model under backend("triton") with the same model unfused and in float64."""
    plain = unfuse(model, inplace=False)
    exact = runner(copy.deepcopy(plain).double(), x.double())
    torchs = runner(plain, x)
    with fusedmlp.backend("triton"):
        ours = runner(model, x)
    assert len(ours) == len(torchs) == len(exact)
    for i, tensors in enumerate(zip(ours, torchs, exact, strict=True)):
        assert_right(*tensors, what=f"tensor {i}")
    return ours
