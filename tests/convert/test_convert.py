"""fuse and unfuse: what is fused, what is left alone, and that nothing else can be noticed."""

import contextlib
import copy
import gc
import io
import pickle
import random
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_right
from torch import nn as tnn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import fusedmlp
from fusedmlp import nn
from fusedmlp.convert import Report, Row, fuse, module_classes, pending_relu, report, unfuse

ROOT = Path(__file__).parents[2]


class Net(tnn.Module):
    """fc1 and ReLU in the forward, then a Sequential with a pair of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = tnn.Linear(5, 6)
        self.tail = tnn.Sequential(tnn.Linear(6, 4), tnn.ReLU(), tnn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> Any:
        return self.tail(F.relu(self.fc1(x)))


class Custom(tnn.Module):
    """fc, act and whatever a test wants its forward to be."""

    def __init__(self, inplace: bool = False, **attributes: Any) -> None:
        super().__init__()
        self.act = tnn.ReLU(inplace)
        self.fc, self.other = tnn.Linear(5, 5), tnn.Linear(5, 5)
        self.__dict__.update(attributes)

    def forward(self, x: torch.Tensor) -> Any:
        return self.code(self, x)


class Blocks(tnn.Sequential):
    """A Sequential subclass without its own forward, as torchvision's are."""

    def __init__(self, width: int) -> None:
        super().__init__(tnn.Linear(5, width), tnn.ReLU(), tnn.Linear(width, 3))
        self.width = width


class Residual(tnn.Sequential):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input + super().forward(input)


class OwnLinear(tnn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Reverse(torch.autograd.Function):
    """As domain adaptation uses it: forward gives back what it is given."""

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
    """Output and all gradients."""
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
    """Counts the pairs of a forward that run as one."""
    calls: list[int] = []
    output = pending_relu._DeferredOutput
    of = output.of
    with monkeypatch.context() as patch:
        patch.setattr(output, "of", staticmethod(lambda *a: (calls.append(1), of(*a))[1]))
        yield calls


def assert_right_on_kernels(
    model: tnn.Module, x: torch.Tensor, runner: Callable[..., list[torch.Tensor]] = run
) -> list[torch.Tensor]:
    """Of a fused model under backend("triton"), against the same model unfused and in float64."""
    plain = unfuse(model, inplace=False)
    exact = runner(copy.deepcopy(plain).double(), x.double())
    torchs = runner(plain, x)
    with fusedmlp.backend("triton"):
        ours = runner(model, x)
    assert len(ours) == len(torchs) == len(exact)
    for i, tensors in enumerate(zip(ours, torchs, exact, strict=True)):
        assert_right(*tensors, what=f"tensor {i}")
    return ours


# --- what is fused ---


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
    """With Sequentials that hold nothing, as shortcuts that are the identity are written."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut, self.fc = tnn.Sequential(), tnn.Linear(5, 5)
        self.blocks = tnn.Sequential(tnn.Sequential(), tnn.Linear(5, 4), tnn.Sequential(), tnn.ReLU())
        self.lists, self.dicts = tnn.ModuleList(), tnn.ModuleDict()

    def forward(self, x: torch.Tensor) -> Any:
        return self.blocks(F.relu(self.fc(x)) + self.shortcut(x))


@pytest.mark.parametrize("make", [tnn.Sequential, Empty, tnn.Module, tnn.ModuleList])
def test_what_is_empty(make: Callable[[], tnn.Module]) -> None:
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
    """By tools that go by the name of its class; pickles find it all the same."""
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


def test_on_a_copy() -> None:
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


SPELLINGS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "F.relu": lambda m, x: F.relu(m.fc(x)),
    "F.relu, inplace=False": lambda m, x: F.relu(m.fc(x), inplace=False),
    "torch.relu": lambda m, x: torch.relu(m.fc(x)),
    ".relu()": lambda m, x: m.fc(x).relu(),
    "nn.ReLU": lambda m, x: m.act(m.fc(x)),
    "a new nn.ReLU": lambda m, x: tnn.ReLU()(m.fc(x)),
}
CLAMPS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "clamp_min(0)": lambda m, x: m.fc(x).clamp_min(0),
    "clamp(min=0)": lambda m, x: m.fc(x).clamp(min=0),
    "clamp(0)": lambda m, x: m.fc(x).clamp(0),
    "torch.clamp": lambda m, x: torch.clamp(m.fc(x), min=0.0),
    "torch.clamp_min": lambda m, x: torch.clamp_min(m.fc(x), 0.0),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_relu_is_a_pair(spelling: str) -> None:
    model = custom(SPELLINGS[spelling])
    torchs = run(model, torch.randn(4, 5))
    assert row(model, "fc") == Row(("fc",), 5, 5, "pair in forward of Custom", "")
    torch.manual_seed(0)
    model = custom(SPELLINGS[spelling])
    assert_same_bits(run(fuse(model), torch.randn(4, 5)), torchs)


@pytest.mark.kernels
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_runs_as_one(
    spelling: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fuse(custom(SPELLINGS[spelling])).to(device)
    x = torch.randn(4, 5, device=device)
    with spied(monkeypatch) as calls:
        assert_right_on_kernels(model, x)
        assert len(calls) == 1
        with torch.no_grad():
            assert_right_on_kernels(model, x, lambda m, x: [m(x)])
        assert len(calls) == 2


@pytest.mark.kernels
@pytest.mark.parametrize("spelling", CLAMPS)
def test_clamp_is_not_fused(spelling: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fuse(custom(CLAMPS[spelling])).to(device)
    name = "clamp_min" if "clamp_min" in spelling else "clamp"
    assert row(model, "fc")[3:] == ("Linear only", f"its output goes to {name}")
    x = torch.randn(4, 5, device=device)
    with spied(monkeypatch) as calls:
        assert_right_on_kernels(model, x)
        with torch.no_grad():
            assert_right_on_kernels(model, x, lambda m, x: [m(x)])
    assert calls == []


def gradient_at_the_edge(model: tnn.Module, device: torch.device) -> torch.Tensor:
    """Of the bias, where the Linear's output is 0 or NaN: there relu and clamp_min(0) are not the same."""
    model.zero_grad()
    with torch.no_grad():
        model.fc.bias.copy_(torch.tensor([0.0, -0.0, float("nan"), 1, -1]))
    with fusedmlp.backend("auto" if type(model.fc) is tnn.Linear else "triton"):
        model.to(device)(torch.zeros(3, 5, device=device)).sum().backward()
    return model.fc.bias.grad


@pytest.mark.kernels
@pytest.mark.parametrize("spelling", SPELLINGS | CLAMPS)
def test_the_gradient_at_the_edge(spelling: str, device: torch.device) -> None:
    code = (SPELLINGS | CLAMPS)[spelling]
    plain, fused = custom(code), fuse(custom(code))
    assert torch.equal(gradient_at_the_edge(fused, device), gradient_at_the_edge(plain, device))


@pytest.mark.kernels
def test_relu_that_became_clamp_min_later_has_its_gradient(device: torch.device) -> None:
    gradients = []
    for fusing in (False, True):
        model = custom(lambda m, x: m.use(m.fc(x)), use=torch.relu)
        if fusing:
            assert report(fuse(model)).pairs == 1
        for use in (torch.relu, lambda z: z.clamp_min(0), tnn.ReLU()):
            model.__dict__["use"] = use
            gradients.append(gradient_at_the_edge(model, device))
    assert all(map(torch.equal, gradients[:3], gradients[3:]))
    assert not torch.equal(gradients[0], gradients[1])


def while_unknown(m: Any, x: torch.Tensor) -> Any:
    y = F.relu(m.fc(x))
    while y.sum() > 1e9:
        y = y / 2
    return y


FOUND: dict[str, tuple[Callable[[Any, torch.Tensor], Any], int]] = {
    "both branches": (lambda m, x: F.relu(m.fc(x)) if x.sum() > 0 else torch.relu(m.fc(x)), 1),
    "a check that raises": (lambda m, x: F.relu(m.fc(x)) if x.dim() == 2 else m.no_such_thing, 1),
    "a loop of unknown length": (while_unknown, 1),
    "two Linears and one ReLU module": (lambda m, x: m.act(m.fc(x)) + m.act(m.other(x)), 2),
    "something in between": (lambda m, x: (m.fc(x), x * 2, m.other(x))[0].relu(), 1),
    "unpacking and shapes": (lambda m, x: F.relu(m.fc(x.view(x.shape[0], -1))).reshape(x.size()), 1),
    "called twice": (lambda m, x: F.relu(m.fc(F.relu(m.fc(x)))), 1),
    "a dtype asked of a parameter": (
        lambda m, x: F.relu(m.fc(x)) if isinstance(m.fc.weight, torch.Tensor) and m.fc.weight.dtype else x,
        1,
    ),
    "a parameter used with an unknown size": (
        lambda m, x: F.relu(m.fc(m.fc.bias.expand(x.shape[0], -1) + x)),
        1,
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_pairs_are_found(case: str) -> None:
    model = custom(FOUND[case][0])
    assert report(model).pairs == FOUND[case][1]
    assert_same_bits(run(fuse(copy.deepcopy(model)), torch.ones(4, 5)), run(model, torch.ones(4, 5)))


def keeps(m: Any, x: torch.Tensor) -> Any:
    m.seen = [m.fc(x)]
    return F.relu(m.seen[0])


ALONE: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str]] = {
    "used twice": (lambda m, x: (z := m.fc(x)) * torch.sigmoid(z) + F.relu(z), "is used 3 times"),
    "not used": (lambda m, x: (m.fc(x), x)[1], "is used 0 times"),
    "returned": (lambda m, x: m.fc(x), "its output is returned"),
    "returned beside its ReLU": (lambda m, x: [z := m.fc(x), F.relu(z)], "is used 2 times"),
    "another function": (lambda m, x: F.gelu(m.fc(x)), "its output goes to gelu"),
    "another module": (lambda m, x: m.act(m.other(m.fc(x))), "its output goes to Linear"),
    "in between": (lambda m, x: F.relu(F.dropout(m.fc(x), 0.5, m.training)), "its output goes to dropout"),
    "added": (lambda m, x: F.relu(m.fc(x) + x), "its output goes to add"),
    "both at once": (lambda m, x: F.relu(torch.cat([m.fc(x), x])), "its output goes to cat"),
    "F.relu in place": (lambda m, x: F.relu(m.fc(x), inplace=True), "ReLU works in place"),
    "F.relu in place by position": (lambda m, x: F.relu(m.fc(x), True), "ReLU works in place"),
    "relu_": (lambda m, x: m.fc(x).relu_(), "ReLU works in place"),
    "F.relu_": (lambda m, x: torch.relu_(m.fc(x)), "ReLU works in place"),
    "clamped on both sides": (lambda m, x: m.fc(x).clamp(0, 6), "its output goes to clamp"),
    "clamped elsewhere": (lambda m, x: m.fc(x).clamp_min(0.1), "its output goes to clamp_min"),
    "clamped by -0.0": (lambda m, x: m.fc(x).clamp_min(-0.0), "its output goes to clamp_min"),
    "relu6": (lambda m, x: F.relu6(m.fc(x)), "its output goes to relu6"),
    "one branch only": (lambda m, x: F.relu(m.fc(x)) if x.sum() > 0 else m.fc(x), "but not everywhere"),
    "one call of two": (lambda m, x: m.fc(F.relu(m.fc(x))), "but not everywhere"),
    "through an autograd.Function": (lambda m, x: F.relu(Reverse.apply(m.fc(x))), "goes to Reverse"),
    "an autograd.Function that clamps": (lambda m, x: Clipped.apply(m.fc(x)), "goes to Clipped"),
    "kept": (keeps, "its output is kept for later"),
    "untraceable": (
        lambda m, x: F.relu(m.fc(x)) + sum(1 for _ in x),
        "Custom.forward cannot be traced: TraceError: Proxy object cannot be iterated",
    ),
    "never called": (lambda m, x: F.relu(m.other(x)), "no forward that could be read calls it"),
}


@pytest.mark.parametrize("case", ALONE)
def test_pairs_that_are_none(case: str) -> None:
    model = custom(ALONE[case][0])
    assert row(model, "fc").status == "Linear only"
    assert ALONE[case][1] in row(model, "fc").reason
    fused = fuse(copy.deepcopy(model))
    assert type(fused.fc) is nn.Linear
    assert_same_bits(run(fused, torch.ones(4, 5)), run(model, torch.ones(4, 5)))


def test_relu_modules_that_are_none() -> None:
    odd = type("Odd", (tnn.ReLU,), {})()
    hooked = tnn.ReLU()
    hooked.register_forward_hook(lambda *a: None)
    for act, reason in (
        (tnn.ReLU(True), "ReLU works in place"),
        (odd, "its output goes to Odd"),
        (hooked, "its ReLU has hooks"),
        (tnn.ReLU6(), "its output goes to ReLU6"),
    ):
        model = custom(lambda m, x: m.act(m.fc(x)))
        model.act = act
        assert row(model, "fc").reason == reason
        in_sequential = report(tnn.Sequential(tnn.Linear(5, 5), act))
        assert in_sequential.pairs == (type(act) is tnn.ReLU and act is not hooked)  # in place or not


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
def test_old_reparametrizations_go_on(change: Any) -> None:
    """They are forward pre-hooks of an ordinary Linear."""
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
    # Linear+ReLU in plain, whatever the ReLU writes to; Linear+ReLU in sub; none in own.
    assert report(model).pairs == 2
    assert row(model, "own.0").reason == "its output goes to add"
    sub: Any = model["sub"]
    assert isinstance(sub, Blocks)
    assert nn.Sequential in type(sub).__mro__
    assert type(sub).__qualname__ == "Blocks"
    assert type(sub).__module__ == __name__
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
    last.__dict__.pop("_fused_from")  # as a slice of it would be
    assert type(first) is nn.Sequential
    assert type(unfuse(last)) is Blocks
    assert "_fused_from" not in last.__dict__
    assert state(unfuse(model)) == was


@pytest.mark.parametrize("name", ["__call__", "__iter__", "__reduce_ex__", "__init_subclass__"])
def test_sequentials_that_run_otherwise_are_left_alone(name: str) -> None:
    def method(*arguments: Any, **keywords: Any) -> Any:
        raise ValueError

    kind = type("Odd", (Blocks,), {name: classmethod(method) if name == "__init_subclass__" else method})
    model = tnn.ModuleList([kind(4)])
    fuse(model)
    assert type(model[0]) is kind
    assert report(model).sequentials == 0
    assert nn.Linear in type(model[0][0]).__mro__


def test_a_linear_in_several_places() -> None:
    shared = tnn.Linear(5, 5)
    first, second = custom(lambda m, x: F.relu(m.fc(x))), custom(lambda m, x: m.fc(x))
    first.fc = second.fc = shared
    model = tnn.ModuleList([first, second, custom(lambda m, x: F.relu(m.fc(x)))])
    assert row(model, "0.fc").names == ("0.fc", "1.fc")
    assert row(model, "0.fc").status == "Linear only"
    second.code = first.code  # type: ignore[assignment]
    assert row(model, "0.fc").status == "pair in forward of Custom"
    assert report(model).linears == 5  # fc of the first two is one, of the third another; three others

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


def test_twice_is_once_and_a_changed_model_is_read_again() -> None:
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


def test_built_layers_that_torch_has_not() -> None:
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


# --- what reading a forward leaves behind ---


def test_reading_a_forward_leaves_no_trace(capfd: pytest.CaptureFixture[str]) -> None:
    random_state = random.getstate()

    def busy(m: Any, x: torch.Tensor) -> Any:
        print("here")
        warnings.warn("here", stacklevel=1)
        m.counter += 1
        m.history.append(x)
        m.by_name["x"] = x
        m.new = x
        m.steps.add_(1)
        m.steps.data.mul_(2)
        m.fc.weight.data.zero_()
        m.other.extra = 3
        torch.rand(3)
        random.random()
        m.register_buffer("late", torch.ones(1))
        m.hook = m.fc.register_forward_hook(lambda *a: None)
        m.training = False
        local = torch.zeros(3)
        local.fill_(1)
        assert local.sum() == 3
        return F.relu(m.fc(x))

    for raises in (False, True):
        model = custom(lambda m, x, raises=raises: [busy(m, x), 1 / 0 if raises else 0][0])
        model.__dict__.update(counter=0, history=[1], by_name={"y": 2})
        model.register_buffer("steps", torch.ones(2))
        before, values = state(model), copy.deepcopy(model.state_dict())
        found = report(model)
        assert state(model) == before
        assert model.__dict__["history"] == [1]
        assert model.__dict__["by_name"] == {"y": 2}
        assert_same_bits(list(model.state_dict().values()), list(values.values()))
        assert found.pairs == (not raises)
    assert "ZeroDivisionError: division by zero" in row(model, "fc").reason
    assert random.getstate() == random_state
    assert capfd.readouterr() == ("", "")


def test_reading_draws_no_random_numbers() -> None:
    model = custom(lambda m, x: F.relu(m.fc(x + torch.rand(5))))
    torch.manual_seed(1)
    drawn = torch.rand(2)
    torch.manual_seed(1)
    report(model)
    assert torch.equal(torch.rand(2), drawn)


def test_interrupting_leaves_no_trace() -> None:
    def interrupted(m: Any, x: torch.Tensor) -> Any:
        m.counter = 5
        raise KeyboardInterrupt

    model = custom(interrupted)
    before, apply = state(model), torch.autograd.Function.__dict__["apply"]
    with pytest.raises(KeyboardInterrupt):
        fuse(model)
    assert state(model) == before
    assert torch.autograd.Function.__dict__["apply"] is apply
    assert torch.equal(Reverse.apply(torch.ones(2)), torch.ones(2))


# --- what goes on afterwards ---


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_made_before_goes_on(optimizer: Any) -> None:
    """Plain, fused after step 3, and unfused again after step 6: one curve, bit for bit."""
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
        warnings.simplefilter("ignore")  # of torch.jit, that it is old
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


# --- the report ---


def test_the_report_as_data_and_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    layer = tnn.TransformerEncoderLayer(8, 2, 16)
    model = tnn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    before = report(model)
    assert isinstance(before, Report)
    assert (before.pairs, before.linears, before.sequentials) == (12, 36, 0)
    fuse(model, verbose=True)
    text = capsys.readouterr().out
    assert report(model) == before
    assert text == f"{before}\n"
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) == 10
    assert text.splitlines()[0] == "12 of 36 Linears fused with ReLU, 0 Sequentials fused"
    assert "  layers.*.linear1  8 -> 16  x 12" in text.splitlines()
    unfuse(model, verbose=True)
    assert capsys.readouterr().out == "24 Linears and 0 Sequentials given back their former class\n"
    long = Row(("a" * 100 + ".3",), 10**6, 10**6, "Linear only", "word " * 40)
    lines = str(Report((long, long._replace(names=("b", "c"))), 1)).splitlines()
    assert max(map(len, lines)) == 80
    assert any("..." in line for line in lines)
    assert any("b (and 1 other name)" in line for line in lines)
    assert str(report(tnn.Linear(2, 1))).splitlines()[-1] == "  (the model)  2 -> 1"
    assert str(report(tnn.ReLU())) == "0 of 0 Linears fused with ReLU, 0 Sequentials fused"


# --- the pair of a forward, on the kernels ---


def flagged(m: Any, x: torch.Tensor) -> Any:
    z = m.fc(x)
    if m.flag:
        z = m.flag(m, z)
    return F.relu(z) if m.rectify else z


def checkpointed(m: Any, z: torch.Tensor) -> torch.Tensor:
    return torch.utils.checkpoint.checkpoint(torch.tanh, z, use_reentrant=False)


# What code may do with the output of the Linear once a flag is set that was not when fuse read it.
DEVIATIONS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "arithmetic": lambda m, z: 2 * z + 1 - z / 3,
    "dropout": lambda m, z: F.dropout(z, 0.5),
    "in place": lambda m, z: z.add_(1),
    "in place, and the name is kept": lambda m, z: (z.mul_(-1), z)[1],
    "an item": lambda m, z: (z.__setitem__(0, 1.0), z)[1],
    "relu_": lambda m, z: (z.relu_(), z)[1],
    "out": lambda m, z: (torch.neg(z.detach(), out=torch.empty_like(z)), z)[1],
    "length": lambda m, z: z[: len(z)],
    "iteration": lambda m, z: torch.stack(list(z)),
    "bool": lambda m, z: -z if z.sum() > 0 else z * 2,
    "isinstance": lambda m, z: -z if isinstance(z, torch.Tensor) else z,
    "type": lambda m, z: -z if z.detach().cpu().numpy().shape == (4, 5) else z,
    "a list": lambda m, z: torch.cat([z, z], dim=1)[:, :5],
    "a hook": lambda m, z: (z.register_hook(lambda g: 2 * g), z)[1],
    "deepcopy and repr": lambda m, z: (repr(z), copy.deepcopy(z.detach()), z)[2],
    "an autograd.Function": lambda m, z: Reverse.apply(z + 0),
    "a function": lambda m, z: F.linear(z, m.other.weight),
    "a module": lambda m, z: tnn.Tanh()(z),
    "another relu": lambda m, z: F.relu(z) + F.relu(z),
    "no_grad": lambda m, z: (m.notes.append(torch.no_grad()(torch.sigmoid)(z)), z)[1],
    "inference_mode": lambda m, z: (m.notes.append(torch.inference_mode()(torch.sigmoid)(z)), z)[1],
    "relu under no_grad": lambda m, z: torch.no_grad()(F.relu)(z) + z,
    "a detached one": lambda m, z: z.detach() + z,
    "checkpoint": checkpointed,
    "a weak reference": lambda m, z: (m.notes.append(torch.utils.weak.WeakTensorKeyDictionary({z: 1})), z)[1],
    "a weak reference and two hooks": lambda m, z: [
        m.notes.append(torch.utils.weak.WeakTensorKeyDictionary({z: 1})),
        z.register_hook(lambda g: 2 * g),
        z.register_hook(lambda g: 3 * g),
        z,
    ][3],
    "its values first": lambda m, z: z * z.mean().item(),
    "vmap": lambda m, z: torch.vmap(torch.sin)(z),
    "kept": lambda m, z: (m.notes.append(z), z)[1],
    "einsum": lambda m, z: torch.einsum("ij,ij->ij", z, z),
    "matmul": lambda m, z: z @ m.other.weight,
}


@pytest.mark.kernels
@pytest.mark.parametrize("rectify", [True, False])
@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_flags_flipped_after_fuse(
    deviation: str, rectify: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = custom(flagged, flag=None, rectify=True, notes=[]).to(device)
    fuse(model)
    assert row(model, "fc").status == "pair in forward of Custom"
    model.flag, model.rectify = DEVIATIONS[deviation], rectify  # type: ignore[assignment]
    with spied(monkeypatch) as calls:
        assert_right_on_kernels(model, torch.randn(4, 5, device=device))
    assert calls == [1]


@pytest.mark.kernels
@pytest.mark.parametrize("deviation", ["dropout", "in place", "length", "its values first"])
def test_an_output_without_relu_keeps_nothing_alive(deviation: str, device: torch.device) -> None:
    model = fuse(custom(flagged, flag=None, rectify=True).to(device))
    model.flag, model.rectify = DEVIATIONS[deviation], False  # type: ignore[assignment]
    x = torch.randn(4, 5, device=device)
    memory = weakref.ref(x)
    gc.disable()
    try:
        with fusedmlp.backend("triton"):
            model(x).sum().backward()
        del x
        assert memory() is None
    finally:
        gc.enable()


def after_relu(m: Any, x: torch.Tensor) -> Any:
    z = m.fc(x)
    y = F.relu(z)
    return y + m.flag(z) if m.flag else y


@pytest.mark.kernels
def test_the_output_of_the_linear_is_used_after_its_relu(device: torch.device) -> None:
    model = fuse(custom(after_relu, flag=None).to(device))
    x = torch.randn(4, 5, device=device)
    for flag in (torch.sin, F.relu, lambda z: z.mul_(3), lambda z: z[0] * z.sum()):
        model.flag = flag  # type: ignore[assignment]
        assert_right_on_kernels(model, x)
    for flag in (lambda z: z.register_hook(print), lambda z: z.retain_grad(), lambda z: z.grad_fn):
        model.flag = flag  # type: ignore[assignment]
        with (
            fusedmlp.backend("triton"),
            pytest.raises(RuntimeError, match="the gradient of a Linear's output"),
        ):
            model(x)


@pytest.mark.kernels
def test_what_cannot_be_right_raises(device: torch.device) -> None:
    model = fuse(custom(flagged, flag=None, rectify=True).to(device))
    x = torch.randn(4, 5, device=device)

    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return x.relu()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0]

    for function in (Reverse, Clipped, Outer):
        model.flag = lambda m, z, function=function: function.apply(z)  # type: ignore[assignment]
        with fusedmlp.backend("triton"), pytest.raises(RuntimeError, match=r"went to an autograd\.Function"):
            model(x)
        with fusedmlp.backend("triton"), torch.no_grad():
            torch.testing.assert_close(model(x), unfuse(model, inplace=False)(x))
    model.flag = None
    with fusedmlp.backend("triton"):
        z = torch.utils.checkpoint.checkpoint(model.fc, x.clone().requires_grad_(), use_reentrant=True)
        with pytest.raises(RuntimeError, match=r"went to an autograd\.Function"):
            F.relu(z)

        class Inner(Outer):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                with torch.enable_grad():
                    return model.fc(x)

        with pytest.raises(RuntimeError, match=r"went to an autograd\.Function"):
            F.relu(Inner.apply(x.clone().requires_grad_()))
        with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match=r"C\+\+"):
            torch.sin(model.fc(x))
        for changed in (x, model.fc.weight, model.fc.bias):
            z = model.fc(x)
            with torch.no_grad():
                changed.add_(1)
            expected = F.relu(F.linear(x - (changed is x) * 1, model.fc.weight, model.fc.bias))
            if changed is x:
                torch.testing.assert_close(F.relu(z), expected)  # computed when the Linear was called
                z = model.fc(x)
                x.add_(1)
            with pytest.raises(RuntimeError, match="changed in place"):
                z.sin()


@pytest.mark.kernels
def test_settings_at_the_call_of_the_linear_count(device: torch.device) -> None:
    model = fuse(custom(lambda m, x: F.relu(m.fc(x))).to(device))
    x = torch.randn(4, 5, device=device)
    for use in (F.relu, torch.sin):
        expected = use(F.linear(x, model.fc.weight, model.fc.bias)).detach()
        with fusedmlp.backend("triton"):
            z = model.fc(x)
        with torch.autocast(device.type, torch.bfloat16), fusedmlp.backend("torch"):
            y = use(z)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.detach(), expected)
        assert y.requires_grad
        with fusedmlp.backend("triton"), torch.no_grad():
            z = model.fc(x)
        assert not use(z).requires_grad
        with fusedmlp.backend("triton"):
            z = model.fc(x)
        with torch.no_grad():
            y = use(z)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected)
        with fusedmlp.backend("triton"), torch.inference_mode():
            inner = x.clone()  # an inference tensor: nobody can know later that it was changed
            z = model.fc(inner)
            inner.add_(1)
            torch.testing.assert_close(use(z), expected)


def saw(output: torch.Tensor) -> torch.Tensor:
    assert type(output) is torch.Tensor
    return output.detach().clone()


WATCHERS: dict[str, Callable[[tnn.Module, list[Any]], Any]] = {
    "forward hook": lambda m, seen: m.register_forward_hook(lambda *a: seen.append(saw(a[2]))),
    "a hook that changes": lambda m, seen: m.register_forward_hook(lambda *a: (seen.append(0), a[2] * -1)[1]),
    "pre-hook": lambda m, seen: m.register_forward_pre_hook(lambda *a: seen.append(a[1][0].detach().clone())),
    "backward hook": lambda m, seen: m.register_full_backward_hook(lambda *a: seen.append(a[2][0].clone())),
    "backward pre-hook": lambda m, seen: m.register_full_backward_pre_hook(
        lambda *a: seen.append(a[1][0].clone())
    ),
    "global hook": lambda m, seen: tnn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(saw(output)) if module is m else None
    ),
}


@pytest.mark.kernels
@pytest.mark.parametrize("which", ["fc", "act"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("watcher", WATCHERS)
def test_hooks_before_and_after_fuse(watcher: str, when: str, which: str, device: torch.device) -> None:
    x = torch.randn(4, 5, device=device)
    results = []
    for fusing in (False, True):
        torch.manual_seed(3)
        seen: list[Any] = []
        model = custom(lambda m, x: m.act(m.fc(x))).to(device)
        if fusing and when == "after":
            fuse(model)
        handle = WATCHERS[watcher](getattr(model, which), seen)
        if fusing and when == "before":
            fuse(model)
        with handle, fusedmlp.backend("triton" if fusing else "auto"):
            results.append([*run(model, x), *seen])
        assert len(seen) == 1
    for ours, torchs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.kernels
def test_a_wrapped_forward_sees_tensors(device: torch.device) -> None:
    """As accelerate wraps those of layers that it moves between devices."""
    model = fuse(custom(lambda m, x: F.relu(m.fc(x))).to(device))
    inner, seen = model.fc.forward, []
    model.fc.forward = lambda x: (seen.append(inner(x)), seen[-1])[1]  # type: ignore[method-assign]
    x = torch.randn(4, 5, device=device)
    for forward in (model, unfuse(model)):
        with fusedmlp.backend("triton"):
            torch.testing.assert_close(forward(x), F.relu(F.linear(x, model.fc.weight, model.fc.bias)))
    assert [type(z) for z in seen] == [torch.Tensor] * 2


@pytest.mark.kernels
def test_a_patched_call_sees_tensors(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fuse(Net().to(device))
    seen = []
    call = tnn.Module.__call__

    def spy(self: Any, *arguments: Any) -> Any:
        seen.append(call(self, *arguments))
        return seen[-1]

    with monkeypatch.context() as patch, fusedmlp.backend("triton"):
        patch.setattr(tnn.Module, "__call__", spy)
        model(torch.randn(2, 5, device=device))
    assert {type(t) for t in seen} == {torch.Tensor}


@pytest.mark.kernels
def test_a_whole_model_on_the_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fuse(Net().to(device))
    with spied(monkeypatch) as calls:
        assert_right_on_kernels(model, torch.randn(6, 5, device=device))
        assert calls == [1]
        twin = pickle.loads(pickle.dumps(model))
        assert_right_on_kernels(twin, torch.randn(6, 5, device=device))
        assert calls == [1, 1]
        with fusedmlp.backend("triton"), pytest.raises(RuntimeError, match="float64"):
            copy.deepcopy(model).double()(torch.randn(6, 5, device=device).double())
        second = model(torch.randn(2, 5, device=device, requires_grad=True)).sum()
        assert second.requires_grad
    with fusedmlp.backend("triton"):
        leaf = torch.randn(2, 5, device=device, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
    assert model.fc1.weight.grad is not None


def test_fuse_brings_no_triton() -> None:
    code = (
        "import sys, torch, fusedmlp.convert\n"
        "before = set(sys.modules)\n"
        "model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())\n"
        "fusedmlp.convert.fuse(model)(torch.ones(1, 2))\n"
        "assert not any(name.startswith('fusedmlp.kernels') for name in sys.modules)\n"
        "assert 'triton' not in set(sys.modules) - before"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# --- what others' models have in them ---


def test_script_modules_are_no_obstacle() -> None:
    model = tnn.Sequential(tnn.Linear(5, 5), tnn.ReLU(), torch.jit.script(tnn.Linear(5, 5)))
    assert report(model).pairs == 1
    fuse(model)


def test_blocks_named_linear_are_read_and_odd_features_do_no_harm() -> None:
    block = type("LinearBlock", (Custom,), {"in_features": 5, "out_features": 5})
    assert report(block(code=lambda m, x: F.relu(m.fc(x)))).pairs == 1
    for odd in (None, [5], property(lambda m: 1 / 0)):
        assert report(type("OddLinear", (tnn.Module,), {"in_features": odd, "out_features": 5})()).rows == ()


def test_deeper_containers_and_flags_are_left_and_exit_is_caught() -> None:
    def deep(m: Any, x: torch.Tensor) -> Any:
        m.cache["a"]["b"] = 1
        m.fc.weight.requires_grad_(False)
        return F.relu(m.fc(x))

    model = custom(deep, cache={"a": {}})
    assert report(model).pairs == 1
    assert model.__dict__["cache"] == {"a": {}}
    assert model.fc.weight.requires_grad
    assert "SystemExit" in row(custom(lambda m, x: sys.exit(1)), "fc").reason
    assert "cannot be copied" in row(custom(lambda m, x: m.fc(x), held=(i for i in ())), "fc").reason


@pytest.mark.kernels
def test_gradient_of_a_fused_output_is_refused(device: torch.device) -> None:
    model, x = fuse(custom(lambda m, x: m.act(m.fc(x))).to(device)), torch.randn(4, 5, device=device)
    with fusedmlp.backend("triton"):
        z = model.fc(x)
        y = model.act(z).sum()
        with pytest.raises(RuntimeError, match="asked for after ReLU"):
            torch.autograd.grad(y, z, allow_unused=True)
        with pytest.raises(RuntimeError, match="asked for after ReLU"):
            y.backward(inputs=[z]), z.grad
