"""Mistakes raise the same type as in torch, say what was given and what is needed, and change nothing."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compatibility import Route
from torch import nn as tnn
from torch.nn import functional as F

import fusedmlp
from fusedmlp import functional, nn
from fusedmlp.dispatch import backend_choice

Layer = tuple[Any, Any, Any]


class Net(tnn.Module):
    """A user's model: fuse finds the ReLU in its forward."""

    def __init__(self, *layer: Any) -> None:
        super().__init__()
        self.fc = tnn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.fc(x))


def module(kind: Callable[..., tnn.Module]) -> Callable[..., Any]:
    """Return a function that builds a layer, replaces its parameters and calls it."""

    def call(x: Any, weight: Any, bias: Any) -> Any:
        model = kind(4, 3)
        linear = next(m for m in model.modules() if isinstance(m, tnn.Linear))
        for name, value in (("weight", weight), ("bias", bias)):
            delattr(linear, name)
            if isinstance(value, torch.Tensor) and value.is_leaf:
                value = tnn.Parameter(value, requires_grad=value.requires_grad)
            setattr(linear, name, value)
        return model(x)

    return call


FUNCTIONS = ("linear", "linear_relu", "mlp")
# Our call, and the same in torch
CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear": (functional.linear, F.linear),
    "linear_relu": (functional.linear_relu, lambda *layer: F.relu(F.linear(*layer))),
    "mlp": (
        lambda x, weight, bias: functional.mlp(x, [weight, torch.ones(2, 3)], [bias, None]),
        lambda *layer: F.linear(F.relu(F.linear(*layer)), torch.ones(2, 3)),
    ),
    "Linear": (module(nn.Linear), module(tnn.Linear)),
    "LinearReLU": (module(nn.LinearReLU), module(lambda *a: tnn.Sequential(tnn.Linear(*a), tnn.ReLU()))),
    "Sequential": (
        module(lambda *a: nn.Sequential(nn.Linear(*a), nn.ReLU(), nn.Linear(3, 2))),
        module(lambda *a: tnn.Sequential(tnn.Linear(*a), tnn.ReLU(), tnn.Linear(3, 2))),
    ),
    "fused model": (module(lambda *a: fusedmlp.fuse(Net())), module(Net)),
}


def ones(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(shape, **options)


FEATURES, RANK, BIAS = "wrong number of features", "wrong rank", "wrong bias"
DTYPE, DEVICE, KIND = "mixed or integer dtypes", "mixed devices", "what is no tensor"
W, B = (3, 4), (3,)
# The mistake's row in docs/compatibility.md; and input, weight and bias, which should have the shapes
# (..., 4), (3, 4) and (3,)
LAYERS: dict[str, tuple[str, Callable[[], Layer]]] = {
    "features": (FEATURES, lambda: (ones(2, 5), ones(*W), ones(*B))),
    "features of a vector": (FEATURES, lambda: (ones(5), ones(*W), ones(*B))),
    "features of nothing": (FEATURES, lambda: (ones(0, 5), ones(*W), ones(*B))),
    "no features": (FEATURES, lambda: (ones(2, 0), ones(*W), None)),
    "transposed weight": (FEATURES, lambda: (ones(2, 5, 4), ones(4, 3), ones(*B))),
    "weight that is no leaf": (
        FEATURES,
        lambda: (ones(2, 4), (ones(*W, requires_grad=True) * 2)[:, :3], ones(*B)),
    ),
    "several mistakes": (FEATURES, lambda: (ones(2, 5).half(), ones(*W), ones(7))),
    "rank 0": (RANK, lambda: (ones(), ones(*W), ones(*B))),
    "rank 0 and one feature": (RANK, lambda: (ones(), ones(3, 1), ones(*B))),
    "weight of rank 0": (RANK, lambda: (ones(2, 4), ones(), ones(*B))),
    "weight of rank 1": (RANK, lambda: (ones(2, 4), ones(4), ones(*B))),
    "weight of rank 3": (RANK, lambda: (ones(2, 4), ones(1, *W), ones(*B))),
    "bias too long": (BIAS, lambda: (ones(2, 4), ones(*W), ones(7))),
    "empty bias": (BIAS, lambda: (ones(2, 3, 4), ones(*W), ones(0))),
    "bias as a column": (BIAS, lambda: (ones(2, 4), ones(*W), ones(3, 1))),
    "bias of other rows": (BIAS, lambda: (ones(2, 4), ones(*W), ones(5, 3))),
    "bias of rank 3": (BIAS, lambda: (ones(2, 4), ones(*W), ones(1, 2, 3))),
    "matrix as the bias of a vector": (BIAS, lambda: (ones(4), ones(*W), ones(2, 3))),
    "float64 input": (DTYPE, lambda: (ones(2, 4).double(), ones(*W), ones(*B))),
    "float64 weight": (DTYPE, lambda: (ones(2, 4), ones(*W).double(), ones(*B))),
    "half bias": (DTYPE, lambda: (ones(2, 4), ones(*W), ones(*B).half())),
    "bfloat16 and half": (DTYPE, lambda: (ones(2, 4).half(), ones(*W).bfloat16(), None)),
    "int64": (DTYPE, lambda: (ones(2, 4, dtype=torch.int64), ones(*W), ones(*B))),
    "uint8, an image": (DTYPE, lambda: (ones(2, 4, dtype=torch.uint8), ones(*W), ones(*B))),
    "complex": (DTYPE, lambda: (ones(2, 4) + 0j, ones(*W), ones(*B))),
    "input on meta": (DEVICE, lambda: (ones(2, 4, device="meta"), ones(*W), ones(*B))),
    "weight on meta": (DEVICE, lambda: (ones(2, 4), ones(*W, device="meta"), ones(*B))),
    "bias on meta": (DEVICE, lambda: (ones(2, 4), ones(*W), ones(*B, device="meta"))),
    "a list": (KIND, lambda: ([1.0, 2.0, 3.0, 4.0], ones(*W), ones(*B))),
    "None": (KIND, lambda: (None, ones(*W), ones(*B))),
    "an array": (KIND, lambda: (ones(2, 4).numpy(), ones(*W), ones(*B))),
}
# For functions only: modules do not accept such parameters
NOT_PARAMETERS: dict[str, tuple[str, Callable[[], Layer]]] = {
    "no weight": (KIND, lambda: (ones(2, 4), None, ones(*B))),
    "a list as the bias": (KIND, lambda: (ones(2, 4), ones(*W), [1.0, 2.0, 3.0])),
    "a number as the bias": (KIND, lambda: (ones(2, 4), ones(*W), 1.0)),
}
ALL = {**LAYERS, **NOT_PARAMETERS}


@contextlib.contextmanager
def nothing_changes(*tensors: Any) -> Iterator[None]:
    """Check that settings, values, versions and gradients are unchanged afterwards."""

    def state() -> list[Any]:
        settings = [backend_choice.chosen.backend, backend_choice.chosen.note, backend_choice.quiet()]
        settings += [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()]
        return settings + [
            (t._version, t.requires_grad, t.is_leaf and t.grad, None if t.is_meta else t.tolist())
            for t in tensors
            if isinstance(t, torch.Tensor)
        ]

    before = state()
    yield
    assert state() == before


def error_of(function: Callable[..., Any], *arguments: Any) -> Exception | None:
    try:
        function(*arguments)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.capability("Errors", ALL[name][0])) for name in ALL]
)
def test_a_layer_that_does_not_fit(name: str, route: Route) -> None:
    for what, (ours, torchs) in CALLS.items():
        if name in NOT_PARAMETERS and what not in FUNCTIONS:
            continue
        layer = ALL[name][1]()
        expected = error_of(torchs, *layer)
        with nothing_changes(*layer):
            error = error_of(ours, *layer)
        assert type(error) is type(expected), what
        assert str(expected) in str(error), what  # users' code may match torch's text
        if isinstance(error, RuntimeError):
            message = f"{what}: {error}"
            given = [t for t in layer if t is not None]
            for words in (
                {str(tuple(t.shape)) for t in given},
                {str(t.dtype) for t in given} if "one dtype" in message else set(),
                {str(t.device) for t in given} if "one device" in message else set(),
            ):
                assert all(word in message for word in words), message
            assert "needs" in message
        right = ones(2, 4, requires_grad=True), ones(*W), ones(*B)
        ours(*right).sum().backward()
        assert right[0].grad is not None


@pytest.mark.capability("Errors", FEATURES)
def test_the_wrong_layer_of_several_is_named(route: Route) -> None:
    x, first, last = ones(2, 7), ones(6, 7), ones(4, 5)
    for weight, bias, words in (
        (ones(5, 9), None, r"in_features=9 .* \(\.\.\., 9\), got input \(2, 6\), weight \(5, 9\)"),
        (ones(5, 6), ones(6), r"out_features=5 .* shape \(5,\), got .*bias \(6,\)"),
        (ones(5, 6).half(), None, r"one dtype, got .*weight torch\.float16 .*weight \(5, 6\)"),
        (ones(5, 6), ones(5, device="meta"), r"one device, got .*bias on meta .*weight \(5, 6\)"),
    ):
        layers = [tnn.Linear(7, 6), tnn.ReLU(), tnn.Linear(6, 5), tnn.ReLU(), tnn.Linear(5, 4)]
        layers[2].weight = tnn.Parameter(weight)
        layers[2].bias = None if bias is None else tnn.Parameter(bias)
        with pytest.raises(RuntimeError, match=words):
            nn.Sequential(*layers)(x)
        with pytest.raises(RuntimeError, match=words):
            functional.mlp(tnn.Parameter(x), [first, weight, last], [None, bias, None])
        expected = error_of(tnn.Sequential(*layers), x)
        assert type(expected) is RuntimeError
        assert str(expected) in str(error_of(nn.Sequential(*layers), x))


@pytest.mark.capability("Errors", "in the backward: wrong gradient, changed in place, a second time")
@pytest.mark.parametrize("mistake", ["shape", "kind", "in place", "twice"])
def test_mistakes_in_the_backward(mistake: str, route: Route, device: torch.device) -> None:
    torchs = tnn.Sequential(tnn.Linear(4, 3), tnn.ReLU(), tnn.Linear(3, 2), tnn.ReLU()).to(device)
    ours = nn.Sequential(*copy.deepcopy(torchs))
    errors = []
    for model in (ours, torchs):
        y = model(ones(2, 4, device=device))
        gradient: Any = {"shape": ones(2, 3, device=device), "kind": [1.0]}.get(mistake, torch.ones_like(y))
        if mistake == "in place":
            y.add_(1)
        if mistake == "twice":
            y.backward(gradient)
            model.zero_grad()
        errors.append(error_of(y.backward, gradient))
        assert all(p.grad is None for p in model.parameters())
    assert isinstance(errors[0], Exception)
    assert type(errors[0]) is type(errors[1])
    words = {
        "shape": ("[2, 3]", "[2, 2]"),
        "kind": (),
        "in place": ("modified by an inplace operation",),
        "twice": ("Trying to backward through the graph a second time", "retain_graph=True"),
    }[mistake]
    assert all(word in str(errors[0]) for word in words)


def mlp_of_torch(*widths: Any, **options: Any) -> tnn.Module:
    layers: list[tnn.Module] = []
    for K, N in itertools.pairwise(widths):
        layers += [tnn.Linear(K, N, **options), tnn.ReLU()]
    return tnn.Sequential(*layers[:-1])


# Our call, torch's call, and words of the message
CONSTRUCTORS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "negative inputs": (lambda: nn.Linear(-4, 3), lambda: tnn.Linear(-4, 3), r"negative .*\[3, -4\]"),
    "negative outputs": (lambda: nn.LinearReLU(4, -3), lambda: tnn.Linear(4, -3), r"negative .*\[-3, 4\]"),
    "negative MLP": (lambda: nn.MLP(4, [-3], 2), lambda: mlp_of_torch(4, -3, 2), r"negative .*\[-3, 4\]"),
    "negative last": (lambda: nn.MLP(4, [3], -2), lambda: mlp_of_torch(4, 3, -2), r"negative .*\[-2, 3\]"),
    "too large": (lambda: nn.Linear(2**40, 2**40), lambda: tnn.Linear(2**40, 2**40), "1099511627776"),
    "float": (lambda: nn.Linear(4.0, 3), lambda: tnn.Linear(4.0, 3), "float"),  # type: ignore[arg-type]
    "integer parameters": (
        lambda: nn.MLP(4, [3], 2, dtype=torch.int64),
        lambda: mlp_of_torch(4, 3, 2, dtype=torch.int64),
        "floating point",
    ),
    "dtype's name": (
        lambda: nn.Linear(4, 3, dtype="half"),  # type: ignore[arg-type]
        lambda: tnn.Linear(4, 3, dtype="half"),  # type: ignore[arg-type]
        "dtype.*str",
    ),
    "device": (
        lambda: nn.Linear(4, 3, device="no"),
        lambda: tnn.Linear(4, 3, device="no"),
        "cpu, cuda.* no$",
    ),
    "one width": (lambda: nn.Linear(4), lambda: tnn.Linear(4), "'out_features'"),  # type: ignore[call-arg]
    "keyword": (
        lambda: nn.LinearReLU(4, 3, activation="relu"),  # type: ignore[call-arg]
        lambda: tnn.Linear(4, 3, activation="relu"),  # type: ignore[call-arg]
        "unexpected keyword argument 'activation'",
    ),
    "a function": (
        lambda: nn.Sequential(nn.Linear(4, 3), torch.relu),  # type: ignore[arg-type]
        lambda: tnn.Sequential(tnn.Linear(4, 3), torch.relu),  # type: ignore[arg-type]
        "relu is not a Module subclass",
    ),
    "index": (lambda: nn.MLP(4, [3], 2)[3], lambda: mlp_of_torch(4, 3, 2)[3], "index 3 is out of range"),  # type: ignore[index]
    "checkpoint": (
        lambda: nn.MLP(4, [3], 2).load_state_dict(nn.MLP(4, [5], 2).state_dict()),
        lambda: mlp_of_torch(4, 3, 2).load_state_dict(mlp_of_torch(4, 5, 2).state_dict()),
        r"size mismatch for 0\.weight.*\[5, 4\].*\[3, 4\]",
    ),
}


@pytest.mark.capability("Errors", "wrong arguments of layers: negative sizes, floats, unknown keywords")
@pytest.mark.parametrize("mistake", CONSTRUCTORS)
def test_wrong_arguments_of_layers(mistake: str, route: Route) -> None:
    ours, torchs, words = CONSTRUCTORS[mistake]
    expected = error_of(torchs)
    assert expected is not None
    with nothing_changes(), pytest.raises(type(expected), match=f"(?s){words}") as error:
        ours()
    assert error.type is type(expected)


def enter(name: Any) -> None:
    with fusedmlp.backend(name):
        raise AssertionError("inside")


# Calls that torch does not have, the error's type, and words of the message that say what to do
OURS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "MLP of an int": (lambda: nn.MLP(4, 3, 2), TypeError, r"list of widths, such as \[256, 128\], got 3"),  # type: ignore[arg-type]
    "MLP of a float": (lambda: nn.MLP(4, 3.5, 2), TypeError, "list of widths, .* got 3.5"),  # type: ignore[arg-type]
    "MLP of a string": (lambda: nn.MLP(4, "3", 2), TypeError, "list of widths, .* got '3'"),  # type: ignore[arg-type]
    "MLP of floats": (lambda: nn.MLP(4, [3.0], 2), TypeError, r"list of widths, .* got \[3\.0\]"),  # type: ignore[list-item]
    "MLP of None": (lambda: nn.MLP(4, None, 2), TypeError, "list of widths, .* got None"),  # type: ignore[arg-type]
    "MLP's activation": (lambda: nn.MLP(4, [3], 2, nn.GELU), TypeError, "bias is True .*GELU.* always ReLU"),  # type: ignore[arg-type]
    "MLP's keyword": (lambda: nn.MLP(4, [3], 2, dropout=0.1), TypeError, "argument 'dropout'"),  # type: ignore[call-arg]
    "fewer biases": (
        lambda: functional.mlp(ones(4), [ones(3, 4), ones(2, 3)], [None]),
        ValueError,
        "for each a bias or None, got 2 weights and 1 biases",
    ),
    "no weights": (lambda: functional.mlp(ones(4), [], []), ValueError, "got 0 weights and 0 biases"),
    "no biases": (
        lambda: functional.mlp(ones(4), [ones(3, 4)], None),  # type: ignore[arg-type]
        TypeError,
        "a list of biases, got list and NoneType",
    ),
    "no list": (
        lambda: functional.mlp(ones(4), ones(3, 4), ones(3)),  # type: ignore[arg-type]
        TypeError,
        "a list of weights and a list of biases, got Tensor and Tensor",
    ),
    "a generator": (
        lambda: functional.mlp(ones(4), (w for w in [ones(3, 4)]), [None]),  # type: ignore[arg-type]
        TypeError,
        "got generator and list",
    ),
    "final_relu by position": (
        lambda: functional.mlp(ones(4), [ones(3, 4)], [None], True),  # type: ignore[misc]
        TypeError,
        "positional arguments",
    ),
    "fuse": (lambda: fusedmlp.fuse([]), TypeError, r"fuse takes a torch\.nn\.Module, not list"),  # type: ignore[arg-type]
    "fuse of a class": (lambda: fusedmlp.fuse(Net), TypeError, r"takes a torch\.nn\.Module, not type"),  # type: ignore[arg-type]
    "unfuse": (lambda: fusedmlp.unfuse(None), TypeError, r"unfuse takes a torch\.nn\.Module, not NoneType"),  # type: ignore[arg-type]
    "fuse by position": (lambda: fusedmlp.fuse(Net(), True), TypeError, "positional argument"),  # type: ignore[misc]
    "explain": (
        lambda: fusedmlp.explain(enter, ones(4)),  # type: ignore[arg-type]
        TypeError,
        r"explain takes a torch\.nn\.Module, not function",
    ),
    "explain without input": (lambda: fusedmlp.explain(nn.Linear(4, 3)), TypeError, "'input'"),
    "explain of a wrong input": (
        lambda: fusedmlp.explain(nn.MLP(5, [4], 3), ones(3, 6)),
        RuntimeError,
        r"needs an input of shape \(\.\.\., 5\), got input \(3, 6\)",
    ),
    "backend": (lambda: enter("cuda"), ValueError, "one of 'auto', 'triton', 'torch', got 'cuda'"),
    "no backend": (lambda: enter(None), ValueError, "one of 'auto', 'triton', 'torch', got None"),
}


@pytest.mark.capability("Errors", "wrong arguments of MLP, mlp, fuse, unfuse, explain, backend")
@pytest.mark.parametrize("mistake", OURS)
def test_wrong_arguments_of_functions(mistake: str, route: Route) -> None:
    call, kind, words = OURS[mistake]
    with nothing_changes(), pytest.raises(kind, match=words) as error:
        call()
    assert error.type is kind


# Layers that torch can run and the kernels cannot, and words of the reason
STRICT: dict[str, tuple[Callable[[], Layer], str]] = {
    "float64": (lambda: (ones(2, 4).double(), ones(*W).double(), None), "float32, float16 and bfloat16"),
    "integers": (lambda: (ones(2, 4).long(), ones(*W).long(), None), r"not for torch\.int64"),
    "meta": (
        lambda: (ones(2, 4, device="meta"), ones(*W, device="meta"), None),
        "The input is on the meta device",
    ),
    "sparse": (lambda: (ones(2, 4).to_sparse(), ones(*W), ones(*B)), "A tensor is sparse"),
    "one bias for all": (lambda: (ones(2, 4), ones(*W), ones(1)), r"bias \(1,\), weight \(3, 4\)"),
    "bias for each row": (lambda: (ones(2, 4), ones(*W), ones(2, 3)), r"bias \(2, 3\), weight \(3, 4\)"),
    "weight of rank 1": (lambda: (ones(2, 4), ones(4), None), r"input \(2, 4\), weight \(4,\)"),
}


@pytest.mark.kernels
@pytest.mark.capability("Errors", 'backend("triton") where the kernels cannot run')
@pytest.mark.parametrize("case", STRICT)
def test_a_strict_backend_says_why_not_and_what_to_do(case: str, route: Route, device: torch.device) -> None:
    make, words = STRICT[case]
    layer = [t if t is None or t.is_meta else t.to(device) for t in make()]
    hint = r"backend\('auto'\) uses PyTorch's operators instead\."
    with fusedmlp.backend("triton"):
        for call in (functional.linear, functional.linear_relu):
            with (
                nothing_changes(*[t for t in layer if t is not None and t.layout is torch.strided]),
                pytest.raises(
                    RuntimeError, match=rf"backend\('triton'\) cannot run here\. .*{words}.*\. {hint}"
                ),
            ):
                call(*layer)
        functional.linear_relu(ones(2, 4, device=device), ones(*W, device=device))
        with fusedmlp.backend("auto"):
            y = functional.linear(*layer)
    assert y.shape == F.linear(*layer).shape


@pytest.mark.kernels
@pytest.mark.parametrize("name", ALL)
def test_a_strict_backend_raises_torchs_type_for_mistakes(name: str) -> None:
    layer = ALL[name][1]()
    with fusedmlp.backend("triton"), nothing_changes(*layer):
        error = error_of(functional.linear, *layer)
    expected = error_of(F.linear, *layer) or RuntimeError()
    assert type(error) is type(expected)
    assert str(expected) in str(error)


@pytest.mark.kernels
def test_a_strict_backend_keeps_torchs_words_of_a_chain(device: torch.device) -> None:
    layers = [tnn.Linear(7, 6), tnn.ReLU(), tnn.Linear(9, 5), tnn.ReLU(), tnn.Linear(5, 4)]
    model, x = nn.Sequential(*layers).to(device), ones(2, 7, device=device)
    expected = error_of(tnn.Sequential(*layers), x)
    with fusedmlp.backend("triton"), pytest.raises(RuntimeError, match="in_features=9") as error:
        model(x)
    assert str(expected) in str(error.value)


def test_a_backend_ends_with_the_error_inside_it() -> None:
    with nothing_changes():
        with pytest.raises(RuntimeError), fusedmlp.backend("triton"), torch.no_grad():
            functional.linear(ones(2, 5), ones(*W))
        with pytest.raises(KeyError), fusedmlp.backend("torch"):
            raise KeyError
