"""fusedmlp.nn behaves like torch.nn in every visible way."""

import abc
import copy
import functools
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn as tnn
from torch.nn.utils import parametrizations, prune

import fusedmlp
from fusedmlp import nn
from fusedmlp.dispatch import backend_choice


@pytest.fixture(params=["auto", pytest.param("triton", marks=pytest.mark.kernels)])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with fusedmlp.backend(request.param):
        yield request.param


def network(nn: Any, inplace: bool = False) -> Any:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(7, 10),
        nn.ReLU(inplace),
        nn.Linear(10, 10, bias=False),
        nn.ReLU(inplace),
        nn.Dropout(0.0),
        nn.Linear(10, 5),
        nn.Tanh(),
        nn.Linear(5, 2),
    )


def pair(inplace: bool = False) -> tuple[Any, Any]:
    return network(nn, inplace), network(tnn, inplace)


def assert_same_run(ours: Any, torchs: Any, x: torch.Tensor) -> None:
    """Check that both models have the same output and gradients."""
    results = []
    for model in (ours, torchs):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_everything_of_torch_nn_is_there() -> None:
    for name in dir(tnn):
        if not name.startswith("__"):
            assert hasattr(nn, name), name
            if name not in ("Linear", "LazyLinear", "Sequential"):
                assert getattr(nn, name) is getattr(tnn, name), name
    assert set(dir(nn)) >= set(dir(tnn))
    with pytest.raises(AttributeError):
        _ = nn.NoSuchLayer
    # If it had torch.nn's __path__, it would import torch's files a second time.
    assert not set(nn.__path__) & set(tnn.__path__)
    public: dict[str, Any] = {}
    exec("from fusedmlp.nn import *", public)
    assert public["Linear"] is nn.Linear
    assert public["Conv2d"] is tnn.Conv2d
    assert not {"Any", "copy", "torch"} & set(public)


def test_same_initial_weights_repr_and_keys() -> None:
    ours, torchs = pair()
    assert repr(ours) == repr(torchs)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.rand(3), (network(tnn), torch.rand(3))[1]), (
        "building draws as many random numbers"
    )
    assert isinstance(ours, tnn.Sequential)
    assert isinstance(ours[0], tnn.Linear)
    for kind in (nn.Linear, nn.LinearReLU):
        torch.manual_seed(5)
        layer = kind(4, 3, False, "cpu", torch.float64)
        torch.manual_seed(5)
        assert torch.equal(layer.weight, tnn.Linear(4, 3, False, "cpu", torch.float64).weight)
        assert layer.bias is None
    assert repr(nn.LinearReLU(4, 3)) == "LinearReLU(in_features=4, out_features=3, bias=True)"


@pytest.mark.parametrize("inplace", [False, True])
def test_same_outputs_and_gradients(inplace: bool, path: str, device: torch.device) -> None:
    if path == "triton":
        device = torch.device(device)
        ours, torchs = (m.to(device) for m in pair(inplace))
    else:
        ours, torchs = pair(inplace)
        device = torch.device("cpu")
    for shape in ((7,), (4, 7), (2, 3, 7), (0, 7)):
        assert_same_run(ours, torchs, torch.randn(shape, device=device))
    y = ours(input=torch.ones(1, 7, device=device))
    torch.testing.assert_close(y, torchs(input=torch.ones(1, 7, device=device)))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_equal_training_curves(optimizer: Any) -> None:
    """On the CPU the losses of ten steps are equal bit for bit."""
    curves = []
    for model in pair():
        torch.manual_seed(11)
        stepper = optimizer(model.parameters(), lr=0.05)
        losses = []
        for _ in range(10):
            x, target = torch.randn(16, 7), torch.randn(16, 2)
            stepper.zero_grad()
            loss = tnn.functional.mse_loss(model(x), target)
            loss.backward()
            stepper.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    assert torch.equal(*curves)
    assert curves[0][-1] != curves[0][0]


def test_checkpoints_go_both_ways() -> None:
    ours, torchs = pair()
    for source, target in ((ours, torchs), (torchs, ours)):
        with torch.no_grad():
            for p in source.parameters():
                p.normal_()
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
        x = torch.randn(3, 7)
        assert torch.equal(ours(x), torchs(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict({k: v[:1] for k, v in torchs.state_dict().items()})


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(clone: Any) -> None:
    model = network(nn)
    twin = clone(model)
    x = torch.randn(3, 7)
    assert type(twin) is type(model)
    assert torch.equal(twin(x), model(x))


def test_indexing_slicing_appending() -> None:
    ours, torchs = pair()
    x = torch.randn(3, 7)
    assert torch.equal(ours[0](x), torchs[0](x))
    assert torch.equal(ours[:2](x), torchs[:2](x))
    assert type(ours[:2]) is nn.Sequential
    assert len(ours[1:-1]) == len(torchs[1:-1])
    for model in (ours, torchs):
        torch.manual_seed(1)
        model.append(tnn.Linear(2, 3)).append(tnn.ReLU())
        model[1] = tnn.GELU()
        del model[4]
    assert torch.equal(ours(x), torchs(x))
    assert list(ours.state_dict()) == list(torchs.state_dict())
    both = ours[:2] + torchs[2:]
    assert type(both) is nn.Sequential
    assert torch.equal(both(x), torchs(x))
    assert list((ours[:2] * 2).state_dict()) == list((torchs[:2] * 2).state_dict())
    assert torch.equal(nn.Sequential()(x), x)

    class Residual(nn.Sequential):  # type: ignore[misc, name-defined]
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input + super().forward(input)

    residual = Residual(nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 7))
    assert type(residual[:2]) is Residual
    assert torch.equal(residual[:2](x), x + residual[1](residual[0](x)))
    named = nn.Sequential(OrderedDict(first=nn.Linear(7, 3), act=nn.ReLU()))
    assert list(named.state_dict()) == ["first.weight", "first.bias"]
    assert (named(x) >= 0).all()


def test_a_shared_layer_and_frozen_ones() -> None:
    models = []
    for module in (nn, tnn):
        torch.manual_seed(2)
        shared = module.Linear(7, 7)
        model = module.Sequential(shared, module.ReLU(), shared, module.ReLU(), module.Linear(7, 2))
        shared.bias.requires_grad_(False)
        models.append(model)
    assert_same_run(*models, torch.randn(4, 7))


def stretches(model: tnn.Module, x: torch.Tensor) -> list[str]:
    """The chains that one call ran: "3+" is a chain of three layers with a ReLU at its end."""
    runs: list[backend_choice.Run] = []
    with backend_choice.recorded(runs.append):
        model(x)
    return [f"{len(run.weights)}{'+' if run.final_relu else ''}" for run in runs]


def layers(*members: tnn.Module | str) -> Any:
    """A Sequential of 7 features: "l" is a Linear, "r" a ReLU."""
    made = {"l": lambda: nn.Linear(7, 7), "r": tnn.ReLU}
    return nn.Sequential(*(made[m]() if isinstance(m, str) else m for m in members))


STRETCHES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "as long as can be": (lambda: layers(*"lrlrl"), ["3"]),
    "with a ReLU at the end": (lambda: layers(*"lrlr"), ["2+"]),
    "an MLP": (lambda: nn.MLP(7, [7] * 4, 2), ["5"]),
    "one layer": (lambda: layers("l"), ["1"]),
    "torch's own Linear": (lambda: layers(tnn.Linear(7, 7), "r", "l"), ["2"]),
    "a ReLU first": (lambda: layers(*"rlrl"), ["2"]),
    "two ReLUs": (lambda: layers(*"lrrl"), ["1+", "1"]),
    "no ReLU between": (lambda: layers(*"llrl"), ["1", "2"]),
    "ReLU in place": (lambda: layers("l", tnn.ReLU(inplace=True), "l"), ["2"]),
    "LinearReLU": (lambda: layers(nn.LinearReLU(7, 7), nn.LinearReLU(7, 7), "l"), ["3"]),
    "LinearReLU and a ReLU": (lambda: layers(nn.LinearReLU(7, 7), "r", "l"), ["1+", "1"]),
    "dropout": (lambda: layers(*"lrl", tnn.Dropout(0.5), *"lr"), ["2", "1+"]),
    "dropout behind the ReLU": (lambda: layers(*"lr", tnn.Dropout(0.5), *"lrl"), ["1+", "2"]),
    "a norm": (lambda: layers("l", tnn.LayerNorm(7), *"rlrl"), ["1", "2"]),
    "another activation": (lambda: layers(*"lrl", tnn.GELU(), *"lrl"), ["2", "2"]),
    "a nested Sequential": (lambda: layers(*"lr", layers(*"lrl"), *"rlr"), ["1+", "2", "1+"]),
    "an Identity": (lambda: layers(*"lr", tnn.Identity(), "l"), ["1+", "1"]),
    "a subclass": (lambda: layers(type("Mine", (tnn.Linear,), {})(7, 7), *"rlrl"), ["2"]),
    "a slice": (lambda: layers(*"lrlrlr")[2:5], ["2"]),
    "appended": (lambda: layers(*"lrl").append(tnn.ReLU()).append(nn.Linear(7, 7)), ["3"]),
    "inserted": (lambda: layers(*"lrl").insert(1, tnn.Dropout(0.0)), ["1", "1"]),
    "no bias": (lambda: layers("l", "r", nn.Linear(7, 7, bias=False)), ["2"]),
    "a frozen layer": (lambda: layers(nn.Linear(7, 7).requires_grad_(False), *"rl"), ["2"]),
}


@pytest.mark.parametrize("case", STRETCHES)
def test_stretches(case: str, path: str, device: torch.device) -> None:
    build, expected = STRETCHES[case]
    model = build()
    plain = copy.deepcopy(model).eval()
    for module in plain.modules():  # replace our classes by torch.nn's
        if type(module) in (nn.Sequential, nn.MLP):
            module.__class__ = tnn.Sequential
        elif type(module) is nn.Linear:
            module.__class__ = tnn.Linear
    if path == "triton":
        model, plain = model.to(device), plain.to(device)
    x = torch.randn(4, 7, device=device if path == "triton" else "cpu")
    assert stretches(model.eval(), x) == expected
    assert_same_run(model, plain, x)


def test_a_layer_used_twice_ends_a_chain() -> None:
    shared = nn.Linear(7, 7)
    x = torch.randn(4, 7)
    assert stretches(layers(shared, "r", "l", "r", shared, "r", "l"), x) == ["2+", "2"]
    tied = layers(*"lrlr")
    tied[2].weight = tied[0].weight  # two layers that share one weight
    assert stretches(tied, x) == ["2+"]


@pytest.mark.parametrize(
    ("index", "expected"), [(0, ["1", "2"]), (1, ["1", "2"]), (2, ["1+", "1", "1"]), (3, ["2", "1"])]
)
def test_a_hook_on_a_member_ends_a_chain(index: int, expected: list[str]) -> None:
    model = layers(*"lrlrl")
    handle = model[index].register_forward_hook(lambda *_: None)
    assert stretches(model, torch.randn(4, 7)) == expected
    handle.remove()
    assert stretches(model, torch.randn(4, 7)) == ["3"]


HOOKS = {
    "forward": lambda m, note: m.register_forward_hook(lambda *a: note(a[2])),
    "pre": lambda m, note: m.register_forward_pre_hook(lambda *a: note(a[1][0])),
    "backward": lambda m, note: m.register_full_backward_hook(lambda *a: note(a[1][0])),
    "backward pre": lambda m, note: m.register_full_backward_pre_hook(lambda *a: note(a[1][0])),
    "global": lambda m, note: tnn.modules.module.register_module_forward_hook(
        lambda mod, args, out: note(out) if mod is m else None
    ),
}


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_members_see_what_they_would_in_torch(kind: str, index: int) -> None:
    seen: list[list[torch.Tensor]] = []
    for model in pair():
        notes: list[torch.Tensor] = []
        handle = HOOKS[kind](model[index], lambda t, notes=notes: notes.append(t.detach().clone()))
        torch.manual_seed(0)
        model(torch.randn(3, 7, requires_grad=True)).sum().backward()
        handle.remove()
        seen.append(notes)
    assert len(seen[0]) == len(seen[1]) == 1
    assert torch.equal(seen[0][0], seen[1][0])


def test_a_hook_may_change_the_output() -> None:
    ours, torchs = pair()
    for model in (ours, torchs):
        model[0].register_forward_hook(lambda module, args, output: output * 0 - 1)
    x = torch.randn(3, 7)
    assert torch.equal(ours(x), torchs(x))


CHANGES = {
    "parametrization": lambda m: parametrizations.weight_norm(
        m[0]
    ).parametrizations.weight.original0.data.mul_(2),
    "spectral norm": lambda m: parametrizations.spectral_norm(m[0]),
    "old weight_norm": lambda m: tnn.utils.weight_norm(m[0]).weight_g.data.mul_(2),
    "pruning": lambda m: prune.l1_unstructured(m[0], "weight", amount=0.5),
    "data": lambda m: m[0].weight.data.zero_(),
    "assigned data": lambda m: setattr(m[0].weight, "data", torch.ones(10, 7)),
    "new parameter": lambda m: setattr(m[0], "weight", tnn.Parameter(torch.ones(10, 7))),
    "plain attribute": lambda m: (m[0]._parameters.pop("bias"), setattr(m[0], "bias", torch.ones(10))),
    "attribute in the way": lambda m: object.__setattr__(m[0], "bias", torch.full((10,), 9.0)),
    "no bias": lambda m: setattr(m[0], "bias", None),
    "patched forward": lambda m: setattr(m[0], "forward", lambda input: input.new_ones(3, 10)),
    "patched relu": lambda m: setattr(m[1], "forward", torch.neg),
    "subclass of ReLU": lambda m: m.__setitem__(1, type("Odd", (tnn.ReLU,), {"forward": lambda s, t: -t})()),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_changes_to_members_take_effect(change: str) -> None:
    x = torch.randn(3, 7)
    ours, torchs = pair()
    before = ours(x)
    for model in (ours, torchs):
        torch.manual_seed(4)
        CHANGES[change](model)
        model.eval()  # so that spectral_norm's power iteration does not change the weight
    assert torch.equal(ours(x), torchs(x))
    assert not torch.equal(ours(x), before)


def test_a_patched_call_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracers and profilers patch Module.__call__."""
    called = []
    call = tnn.Module.__call__
    monkeypatch.setattr(tnn.Module, "__call__", lambda self, *a: (called.append(self), call(self, *a))[1])
    model = network(nn)
    model(torch.randn(3, 7))
    assert called == [model, *model]


def test_a_patched_forward_of_the_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(tnn.Linear(7, 10), tnn.ReLU())
    monkeypatch.setattr(tnn.Linear, "forward", lambda self, input: input.new_full((3, 10), 2.0))
    assert torch.equal(model(torch.randn(3, 7)), torch.full((3, 10), 2.0))


def test_a_compiled_member_is_called() -> None:
    model = network(nn)
    calls = []

    def spy(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph

    model[0].compile(backend=spy)
    model(torch.randn(3, 7))
    assert calls


def test_functional_call_uses_the_given_weights() -> None:
    ours, torchs = pair()
    given = {name: torch.randn_like(p) for name, p in torchs.named_parameters()}
    x = torch.randn(3, 7)
    assert torch.equal(
        torch.func.functional_call(ours, given, x), torch.func.functional_call(torchs, given, x)
    )


def test_fx_traces_into_plain_operators() -> None:
    ours, torchs = pair()
    x = torch.randn(3, 7)
    traced = torch.fx.symbolic_trace(ours)
    assert torch.equal(traced(x), torchs(x))
    assert not any("fusedmlp" in str(node.target) for node in traced.graph.nodes)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript() -> None:
    ours, torchs = pair()
    x = torch.randn(3, 7)
    for scripted in (torch.jit.script(ours), torch.jit.trace(ours, x)):
        assert torch.equal(scripted(x), torchs(x))
    assert [type(layer) for layer in ours] == [type(layer) for layer in network(nn)]

    class Doubled(nn.Linear):  # type: ignore[misc, name-defined]
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * input

    assert torch.equal(torch.jit.script(nn.Sequential(Doubled(7, 7)))(x), 2 * x)


def test_compiles_without_a_graph_break(path: str) -> None:
    ours, torchs = pair()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same_run(compiled, torchs, torch.randn(3, 7))


def test_other_inputs_run_as_in_torch() -> None:
    ours = network(nn)
    assert ours.to("meta")(torch.randn(3, 7, device="meta")).shape == (3, 2)
    first, second = nn.Sequential(tnn.Identity()), tnn.Sequential(tnn.Identity())
    assert first("text") == second("text") == "text"


def test_mlp() -> None:
    model = nn.MLP(784, [256, 128], 10)
    assert list(model.state_dict()) == [f"{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")]
    torch.manual_seed(9)
    ours = nn.MLP(7, (5, 4), 2, bias=False, device="cpu", dtype=torch.float64)
    torch.manual_seed(9)
    options = {"bias": False, "dtype": torch.float64}
    torchs = tnn.Sequential(
        tnn.Linear(7, 5, **options),
        tnn.ReLU(),
        tnn.Linear(5, 4, **options),
        tnn.ReLU(),
        tnn.Linear(4, 2, **options),
    )
    torchs.load_state_dict(ours.state_dict())
    assert_same_run(ours, torchs, torch.randn(3, 7, dtype=torch.float64))
    assert len(nn.MLP(3, [], 2)) == 1
    assert type(ours[:2]) is nn.Sequential


def test_linear_relu_layer() -> None:
    layer = nn.LinearReLU(7, 5)
    x = torch.randn(3, 7)
    assert torch.equal(layer(input=x), torch.relu(tnn.functional.linear(x, layer.weight, layer.bias)))
    stacked = nn.Sequential(layer, nn.ReLU())
    assert torch.equal(stacked(x), layer(x))


def test_torchs_own_layers_are_instances() -> None:
    """isinstance(m, nn.Linear) is true for torch's layers too, so users' isinstance checks find them."""
    transformer = tnn.TransformerEncoderLayer(8, 2, 12)
    plain, ours = tnn.Sequential(tnn.Linear(3, 2), tnn.ReLU()), nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    for model in (transformer, plain, ours, fusedmlp.fuse(copy.deepcopy(transformer)), nn.MLP(3, [2], 1)):
        for module in model.modules():
            assert isinstance(module, nn.Linear) == isinstance(module, tnn.Linear)
            assert isinstance(module, nn.Sequential) == isinstance(module, tnn.Sequential)
            assert not isinstance(module, nn.LazyLinear)
    assert isinstance(tnn.LazyLinear(3), nn.LazyLinear)
    assert isinstance(tnn.LazyLinear(3), nn.Linear)
    assert not isinstance(tnn.Linear(3, 2), (nn.LinearReLU, nn.MLP, nn.LazyLinear))
    assert not isinstance(3, nn.Linear)

    class Own(nn.Linear):
        pass

    class Stack(nn.Sequential, abc.ABC):
        """A subclass may have another abstract base, as with torch's class."""

    assert isinstance(Own(3, 2), (nn.Linear, tnn.Linear))
    assert not isinstance(nn.Linear(3, 2), Own)
    assert not isinstance(tnn.Linear(3, 2), Own)
    assert not isinstance(plain, Stack)
    assert isinstance(Stack(), nn.Sequential)
    assert isinstance(copy.deepcopy(Stack(nn.Linear(3, 2))), Stack)

    @functools.singledispatch
    def what(module: Any) -> str:
        return "other"

    what.register(tnn.Linear)(lambda module: "torch's")
    what.register(nn.Linear)(lambda module: "ours")
    assert [what(m) for m in (tnn.Linear(3, 2), nn.Linear(3, 2), Own(3, 2))] == ["torch's", "ours", "ours"]


def test_a_subclass_of_torchs_linear_keeps_its_forward() -> None:
    """A subclass of torch's Linear keeps its own forward, also in our Sequential."""

    class Twice(tnn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    layers = Twice(5, 4), tnn.ReLU(), tnn.Linear(4, 3)
    x = torch.randn(3, 5)
    assert isinstance(layers[0], nn.Linear)
    assert torch.equal(nn.Sequential(*layers)(x), tnn.Sequential(*layers)(x))
    found = fusedmlp.explain(tnn.Sequential(*layers), x)
    assert (found.layers_not_fused, found.layers_not_run) == (("2",), ())
