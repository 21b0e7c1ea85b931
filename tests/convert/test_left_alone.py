"""fuse leaves alone what is not a plain Linear or Sequential."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from converted import Blocks, assert_same_bits, row, run
from networks import Net
from torch import nn as tnn
from torch.nn.utils import parametrizations, prune

from fusedmlp import nn
from fusedmlp.convert import fuse, report, unfuse


class OwnLinear(tnn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def quantized() -> tnn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(tnn.Sequential(tnn.Linear(5, 5)), {tnn.Linear})[0]


OTHERS: dict[str, tuple[Callable[[], tnn.Module], str]] = {
    "subclass": (lambda: OwnLinear(5, 5), "a subclass of Linear: OwnLinear"),
    "parametrized": (
        lambda: parametrizations.weight_norm(tnn.Linear(5, 5)),
        "its weight or bias is parametrized",
    ),
    "orthogonal": (
        lambda: parametrizations.orthogonal(tnn.Linear(5, 5)),
        "its weight or bias is parametrized",
    ),
    "quantized": (quantized, "Linear is no torch.nn.Linear"),
    "LinearReLU": (lambda: nn.LinearReLU(5, 5), "LinearReLU is a pair by itself"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_layers_that_are_left_alone(kind: str) -> None:
    if kind == "quantized" and not torch.backends.quantized.supported_engines[1:]:
        pytest.skip("this torch has no quantized kernels")
    make, reason = OTHERS[kind]
    layer = make()
    before, was = dict(layer.__dict__), type(layer)
    model = fuse(tnn.Sequential(layer, tnn.ReLU()))
    assert type(model[0]) is was
    assert layer.__dict__.keys() == before.keys()
    assert report(model).rows[0][3:] == ("left alone", reason)
    x = torch.randn(3, 5)
    assert torch.equal(model(x), torch.relu(layer(x)))
    unfuse(model)
    assert type(model[0]) is was


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", [prune.identity, tnn.utils.weight_norm, tnn.utils.spectral_norm])
def test_old_reparametrizations_still_work(change: Any) -> None:
    """Old reparametrizations are forward pre-hooks of an ordinary Linear."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Net())
        change(models[-1].fc1, "weight")
        change(models[-1].tail[0], "weight")
        models[-1].eval()
    fuse(models[1])
    assert row(models[1], "fc1").reason == "it has hooks"
    assert row(models[1], "tail.0").reason == "it has hooks"
    assert_same_bits(*(run(model, torch.ones(2, 5)) for model in models))


def test_patched_forwards_and_modules_are_not_read() -> None:
    model = Net()
    model.forward = lambda x: x  # type: ignore[method-assign]
    assert row(model, "fc1").reason == "Net.forward is patched"
    model = Net()
    model.fc1.forward = lambda x: x.new_ones(2, 6)  # type: ignore[method-assign]
    fuse(model)
    assert row(model, "fc1").reason == "it has a patched forward"
    assert torch.equal(model(torch.ones(2, 5)), model.tail(torch.ones(2, 6)))


@pytest.mark.parametrize("name", ["__call__", "__iter__", "__reduce_ex__", "__init_subclass__"])
def test_sequentials_with_special_methods_are_left_alone(name: str) -> None:
    def method(*arguments: Any, **keywords: Any) -> Any:
        raise ValueError

    kind = type("Odd", (Blocks,), {name: classmethod(method) if name == "__init_subclass__" else method})
    model = tnn.ModuleList([kind(4)])
    fuse(model)
    assert type(model[0]) is kind
    assert report(model).sequentials == 0
    assert nn.Linear in type(model[0][0]).__mro__
