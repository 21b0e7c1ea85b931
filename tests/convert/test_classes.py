"""fuse changes only the classes of layers, and unfuse restores them."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from converted import Blocks, assert_same_bits, custom, row, run, state
from networks import Net
from torch import nn as tnn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fusedmlp
from fusedmlp import nn
from fusedmlp.convert import fuse, module_classes, pending_relu, report, unfuse


def test_classes_change_and_nothing_else() -> None:
    model = Net().eval()
    model.fc1.weight.requires_grad_(False)
    before, modules = state(model), list(model.modules())
    assert fuse(model) is model
    assert list(map(id, model.modules())) == list(map(id, modules))
    assert type(model) is Net
    assert nn.Linear in type(model.fc1).__mro__
    assert type(model.tail) is nn.Sequential
    assert type(model.tail[0]) is type(model.tail[2]) is nn.Linear
    assert state(model)[:4] == before[:4]
    assert unfuse(model) is model
    assert state(model) == before


class Empty(tnn.Module):
    """A model with empty Sequentials, which many models use as identity shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut, self.fc = tnn.Sequential(), tnn.Linear(5, 5)
        self.blocks = tnn.Sequential(tnn.Sequential(), tnn.Linear(5, 4), tnn.Sequential(), tnn.ReLU())
        self.lists, self.dicts = tnn.ModuleList(), tnn.ModuleDict()

    def forward(self, x: torch.Tensor) -> Any:
        return self.blocks(F.relu(self.fc(x)) + self.shortcut(x))


@pytest.mark.parametrize("make", [tnn.Sequential, Empty, tnn.Module, tnn.ModuleList])
def test_empty_models_and_sequentials(make: Callable[[], tnn.Module]) -> None:
    model = make()
    plain, before = copy.deepcopy(model), state(model)
    fuse(model, verbose=True)
    assert str(report(model)) == str(report(plain))
    if make in (tnn.Sequential, Empty):
        x = torch.randn(3, 5)
        assert torch.equal(model(x), plain(x))
        assert fusedmlp.verify(model, x)
        assert str(fusedmlp.explain(model, x))
    assert state(unfuse(model)) == before
    assert len(nn.Sequential()) == 0
    assert nn.Sequential()(before) is before


def test_a_fused_linear_is_called_linear() -> None:
    """Tools that look at the class name see Linear, and pickles still find the fused class."""
    model = tnn.Sequential(Net(), tnn.LazyLinear(3))
    names = [type(module).__name__ for module in model.modules()]
    fuse(model)
    assert {pending_relu.LinearBeforeReLU, nn.LazyLinear} <= {type(module) for module in model.modules()}
    assert [type(module).__name__ for module in model.modules()] == names
    assert [module._get_name() for module in model.modules()] == names
    for copied in (copy.deepcopy(model[0]), pickle.loads(pickle.dumps(model[0]))):
        assert type(copied.fc1) is pending_relu.LinearBeforeReLU
        assert type(unfuse(copied).fc1) is tnn.Linear


def test_a_root_that_is_a_layer_itself() -> None:
    for layer in (tnn.Linear(3, 2), tnn.Sequential(tnn.Linear(3, 2), tnn.ReLU()), Blocks(3)):
        before = state(layer)
        fuse(layer)
        assert {nn.Linear, nn.Sequential} & {*type(layer).__mro__}
        unfuse(layer)
        assert state(layer) == before
    assert row(tnn.Linear(3, 2), "").reason == "no forward that could be read calls it"
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, not list"):
        report([])  # type: ignore[arg-type]


def test_fuse_and_unfuse_a_copy() -> None:
    model = Net()
    before = state(model)
    fused = fuse(model, inplace=False)
    assert state(model) == before
    assert fused is not model
    assert type(fused.tail) is nn.Sequential
    inner = copy.deepcopy(fused)
    again = unfuse(fused, inplace=False)
    assert type(again.tail) is tnn.Sequential
    assert type(fused.tail) is nn.Sequential
    assert_same_bits(run(fused, torch.ones(2, 5)), run(inner, torch.ones(2, 5)))


class Residual(tnn.Sequential):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input + super().forward(input)


def test_sequentials_and_their_subclasses() -> None:
    model = tnn.ModuleDict(
        {
            "plain": tnn.Sequential(tnn.Linear(5, 5), tnn.ReLU(True)),
            "sub": Blocks(4),
            "own": Residual(tnn.Linear(5, 5)),
        }
    )
    was = state(model)
    fuse(model)
    assert type(model["own"]) is Residual
    assert report(model).sequentials == 2
    # There is one pair in plain, although its ReLU works in place, one in sub and none in own.
    assert report(model).pairs == 2
    assert row(model, "own.0").reason == "its output goes to add"
    sub: Any = model["sub"]
    assert isinstance(sub, Blocks)
    assert nn.Sequential in type(sub).__mro__
    assert type(sub).__qualname__ == "Blocks"
    assert type(sub).__module__ == Blocks.__module__
    assert sub.width == 4
    for twin in (
        copy.copy(sub),
        copy.deepcopy(sub),
        pickle.loads(pickle.dumps(sub)),
        pickle.loads(pickle.dumps(sub, 0)),
    ):
        assert type(twin) is type(sub)
        assert torch.equal(twin(torch.ones(2, 5)), sub(torch.ones(2, 5)))
        assert type(unfuse(twin)) is Blocks
    first, last = model["plain"][:1], fuse(Blocks(4))
    last.__dict__.pop("_fused_from")  # a slice of it has no such entry
    assert type(first) is nn.Sequential
    assert type(unfuse(last)) is Blocks
    assert "_fused_from" not in last.__dict__
    assert state(unfuse(model)) == was


def test_a_linear_in_several_places() -> None:
    shared = tnn.Linear(5, 5)
    first, second = custom(lambda m, x: F.relu(m.fc(x))), custom(lambda m, x: m.fc(x))
    first.fc = second.fc = shared
    model = tnn.ModuleList([first, second, custom(lambda m, x: F.relu(m.fc(x)))])
    assert row(model, "0.fc").names == ("0.fc", "1.fc")
    assert row(model, "0.fc").status == "Linear only"
    second.code = first.code  # type: ignore[assignment]
    assert row(model, "0.fc").status == "pair in forward of Custom"
    assert report(model).linears == 5  # the shared fc, the third model's fc, and each model's other

    class Loop(tnn.Module):
        """Runs the members of a Sequential one by one."""

        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.layers = tnn.Sequential(tnn.Linear(5, 5), tnn.ReLU(inplace))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    assert row(Loop(False), "layers.0").status == "pair in forward of Loop"
    assert row(Loop(True), "layers.0").status == "pair in a Sequential"
    assert type(fuse(Loop(True)).layers[0]) is nn.Linear


def test_fusing_again_changes_nothing_unless_the_model_changed() -> None:
    model = custom(lambda m, x: m.act(m.fc(x)))
    before = state(model)
    once = state(fuse(model))
    assert state(fuse(model)) == once
    assert state(unfuse(unfuse(model))) == before
    fuse(model)
    model.act = tnn.GELU()
    assert isinstance(model.fc, pending_relu.LinearBeforeReLU)
    fuse(model)
    assert type(model.fc) is nn.Linear
    assert type(unfuse(model).fc) is tnn.Linear


def test_layers_of_fusedmlp_stay() -> None:
    model = custom(lambda m, x: F.relu(m.fc(x)))
    model.fc, model.mlp = nn.Linear(5, 5), nn.MLP(5, [4], 3)
    before = state(model)
    fuse(model)
    assert isinstance(model.fc, pending_relu.LinearBeforeReLU)
    assert type(model.mlp) is nn.MLP
    assert row(model, "mlp.0").status == "pair in a Sequential"
    assert state(unfuse(model)) == before
    fuse(model)
    model.code = lambda m, x: m.fc(x)  # type: ignore[assignment]
    fuse(model)
    assert type(model.fc) is nn.Linear
    assert "_fused_from" not in model.fc.__dict__


def test_built_layers_become_torchs_own(capsys: pytest.CaptureFixture[str]) -> None:
    class Mine(nn.Linear):  # type: ignore[misc, name-defined]
        pass

    def model(nn: Any) -> Any:
        torch.manual_seed(1)
        head = nn.Sequential(
            nn.Linear(5, 6), nn.ReLU(), nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 3)))
        )
        net = Net() if nn is tnn else fuse(Net())
        return tnn.ModuleDict(
            {"net": net, "head": head, "lazy": nn.LazyLinear(2), "last": nn.LazyLinear(2), "mine": Mine(1, 1)}
        )

    ours, torchs = model(nn), model(tnn)
    mlp = nn.MLP(5, [4], 3)
    for one in (ours, torchs):
        one.last(torch.ones(1, 4))
    copied = unfuse(ours, built=True, inplace=False)
    assert type(ours.head) is nn.Sequential
    assert type(unfuse(mlp, built=True)) is tnn.Sequential
    before = state(ours)
    assert unfuse(ours, built=True, verbose=True) is ours
    assert capsys.readouterr().out == "7 Linears and 3 Sequentials made torch.nn's own\n"
    for one in (ours, copied):
        assert [(type(m).__name__, type(m).__mro__[1:]) for m in one.modules()] == [
            (type(m).__name__, type(m).__mro__[1:]) for m in torchs.modules()
        ]
    assert state(ours)[:4] == before[:4]
    assert all(
        a.__dict__.keys() == b.__dict__.keys() for a, b in zip(ours.modules(), torchs.modules(), strict=True)
    )
    x = torch.randn(3, 5)
    assert_same_bits(run(ours.head, x), run(torchs.head, x))
    torch.nn.utils.parametrize.remove_parametrizations(ours.head[2][0], "weight")
    assert type(ours.head[2][0]) is tnn.Linear


def test_built_layers_that_torch_does_not_have() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LinearReLU(2, 2), nn.Sequential(nn.LinearReLU(2, 2)))
    parametrizations.weight_norm(model[1])
    before = state(model)
    with pytest.raises(TypeError, match=r"use Linear and ReLU in place of: 1, 2\.0$"):
        unfuse(model, built=True)
    assert state(model) == before
    assert unfuse(model) is model


def test_lazy_layers_before_and_after_their_first_call() -> None:
    plain = Net()
    plain.fc1 = tnn.LazyLinear(6)
    model = fuse(copy.deepcopy(plain))
    lazy = "it is lazy: call fuse again after the first call"
    assert row(model, "fc1")[1:] == (0, 6, "Linear only", lazy)
    assert repr(model) == repr(plain)
    assert type(model.fc1) is nn.LazyLinear
    never = copy.deepcopy(model)
    assert type(unfuse(never).fc1) is tnn.LazyLinear
    x = torch.randn(3, 5)
    for one in (model, plain):
        torch.manual_seed(2)
        one(x)
    assert row(model, "fc1")[1:4] == (5, 6, "pair in forward of Net")
    assert_same_bits(run(model, x), run(plain, x))
    assert type(model.fc1) is nn.Linear
    assert_same_bits(run(fuse(model), x), run(plain, x))
    assert [type(m) for m in model.modules()] == [type(m) for m in fuse(copy.deepcopy(plain)).modules()]
    assert [type(m) for m in unfuse(model).modules()] == [type(m) for m in plain.modules()]


def test_nothing_changes_if_anything_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    before = state(model)

    set_class = module_classes._set
    for fails_at in range(4):
        left = [fails_at]

        def fail(*arguments: Any, left: list[int] = left) -> None:
            left[0] -= 1
            set_class(*arguments)
            if left[0] == -1:
                raise ValueError("not me")

        with monkeypatch.context() as patch:
            patch.setattr(module_classes, "_set", fail)
            with pytest.raises(ValueError, match="not me"):
                fuse(model)
        assert state(model) == before
    monkeypatch.setattr("fusedmlp.convert.fuse_model.calls_in_forward", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fuse(model)
    assert state(model) == before
