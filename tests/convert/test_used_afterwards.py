"""A fused model can be trained, copied, saved and compiled like the plain one."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from converted import Blocks, assert_same_bits, row, run
from networks import Net
from torch import nn as tnn
from torch.nn.utils import parametrizations

from fusedmlp.convert import fuse, report, unfuse


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_made_before_fuse_still_works(optimizer: Any) -> None:
    """Fusing after step 3 and unfusing after step 6 changes no bit of the losses."""
    curves = []
    for fusing in (False, True):
        torch.manual_seed(5)
        model = Net()
        options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
        stepper = optimizer(model.parameters(), lr=0.05, **options)
        losses = []
        for step in range(10):
            if fusing and step in (3, 6):
                (fuse if step == 3 else unfuse)(model)
            stepper.zero_grad()
            loss = (model(torch.randn(8, 5)) - 1).square().mean()
            loss.backward()
            stepper.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    assert torch.equal(*curves)
    assert curves[0][-1] < curves[0][0]


def test_copies_pickles_and_checkpoints() -> None:
    x = torch.randn(3, 5)
    plain = Net()
    model = fuse(copy.deepcopy(plain))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert_same_bits(run(twin, x), run(plain, x))
        assert [type(m) for m in unfuse(twin).modules()] == [type(m) for m in plain.modules()]
        assert all(
            a.__dict__.keys() == b.__dict__.keys()
            for a, b in zip(twin.modules(), plain.modules(), strict=True)
        )
    for source, target in ((model, Net()), (Net(), model)):
        target.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(target(x), source(x))


def test_ties_dtypes_and_devices() -> None:
    model = Net().double()
    model.tail[2].weight = model.tail[0].weight
    model.tail[2] = tnn.Linear(6, 4, dtype=torch.float64)
    model.tail[0].weight = model.tail[2].weight
    fuse(model)
    assert model.tail[0].weight is model.tail[2].weight
    assert row(model, "fc1").status == "pair in forward of Net"
    assert model.fc1(torch.ones(1, 5).double()).dtype == torch.float64
    with torch.device("meta"):
        assert report(Net()).pairs == 2
    assert fuse(Net()).to("meta")(torch.ones(2, 5, device="meta")).shape == (2, 3)


def test_functional_call_scripting_compiling_exporting() -> None:
    x = torch.randn(3, 5)
    plain = Net()
    model = fuse(copy.deepcopy(plain))
    model.blocks = fuse(Blocks(3))
    given = {name: torch.randn_like(p) for name, p in plain.named_parameters()}
    assert torch.equal(
        torch.func.functional_call(model, given, x), torch.func.functional_call(plain, given, x)
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x))
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), plain(x))
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), plain(x))
    gradients = torch.func.vmap(torch.func.grad(lambda v: model(v).sum()))(x)
    torch.testing.assert_close(gradients, torch.func.vmap(torch.func.grad(lambda v: plain(v).sum()))(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit warns that it is deprecated
        assert torch.equal(torch.jit.trace(model, x)(x), plain(x))
        assert torch.equal(torch.jit.script(model)(x), plain(x))
        assert torch.equal(torch.jit.script(fuse(Blocks(3)))(x[:0]), torch.empty(0, 3))


def test_parametrized_after_it_was_fused() -> None:
    model = fuse(Net())
    parametrizations.weight_norm(model.fc1)
    x = torch.ones(2, 5)
    expected = model(x)
    assert torch.equal(unfuse(model)(x), expected)
    torch.nn.utils.parametrize.remove_parametrizations(model.fc1, "weight")
    assert type(unfuse(model).fc1) is tnn.Linear
