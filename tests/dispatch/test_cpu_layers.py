"""Layers on a CPU: training equals PyTorch's bit for bit, and inference may use oneDNN's product."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import assert_right
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import fusedmlp
from fusedmlp.dispatch import onednn
from fusedmlp.functional import linear, linear_relu, mlp

ONEDNN = "mkldnn::_linear_pointwise"
# On CPUs where layers do not use oneDNN's product, it runs other code, with larger errors.
BOUND = 2.0 if onednn.why_not_here() is None else 6.0


@pytest.fixture
def with_onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use oneDNN's product on any CPU, fast or not, with one thread so that the size limits are known."""
    if not (torch.backends.mkldnn.is_available() and onednn._is_right()):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(onednn, "why_not_here", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def operators(run: Callable[[], object]) -> list[str]:
    with profile() as seen:
        run()
    return [event.name for event in seen.events()]


def layer(*x_shape: int, N: int = 256, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s).to(dtype) for s in (x_shape, (N, x_shape[-1]), (N,))]


# --- oneDNN's product ---


@pytest.mark.parametrize("shape", [(64, 784), (33, 257), (2, 3, 40, 100), (500, 1024), (8, 1000), (4096, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_is_right(with_onednn: None, shape: tuple[int, ...], bias: bool) -> None:
    x, weight, b = layer(*shape)
    given = b if bias else None
    exact = F.linear(x.double(), weight.double(), None if given is None else given.double())
    with torch.no_grad():
        assert operators(lambda: linear_relu(x, weight, given)).count(ONEDNN) == 1
        right = F.linear(x, weight, given)
        assert_right(linear(x, weight, given), right, exact, factor=BOUND)
        assert_right(linear_relu(x, weight, given), F.relu(right), exact.relu(), factor=BOUND)


def test_explain_names_onednn_in_a_chain(with_onednn: None) -> None:
    model = fusedmlp.MLP(784, [256, 128], 10)
    x = torch.randn(128, 784)
    with torch.no_grad():
        row = fusedmlp.explain(model, x).rows[0]
        names = operators(lambda: model(x))
        exact = mlp(
            x.double(),
            [p.double() for p in model.parameters() if p.dim() == 2],
            [b.double() for b in model.parameters() if b.dim() == 1],
        )
        assert_right(model(x), torch.nn.Sequential(*model)(x), exact)
    # The last layer is too small.
    assert row.forward.launches == ("linear by oneDNN", "relu", "linear by oneDNN", "relu", "linear")
    assert names.count(ONEDNN) == 2
    assert "linear by oneDNN" not in str(fusedmlp.explain(model, x))  # with gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_nan(with_onednn: None, dtype: torch.dtype) -> None:
    # oneDNN's own ReLU turns NaN into 0: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu", [], "").
    x, weight, bias = layer(64, 784, dtype=dtype)
    x[0, 0], x[1, 1], x[2, 2], bias[3] = torch.nan, torch.inf, -torch.inf, torch.nan
    with torch.no_grad():
        y = linear_relu(x, weight, bias)
        expected = F.relu(F.linear(x, weight, bias))
    assert y[0].isnan().all()
    assert y[:, 3].isnan().all()
    assert torch.equal(y[1:3].nan_to_num(7), expected[1:3].nan_to_num(7))


@contextlib.contextmanager
def no_onednn() -> Iterator[None]:
    with torch.backends.mkldnn.flags(enabled=False):
        yield


SPECIAL: dict[str, tuple[Callable[[list[torch.Tensor]], object], Callable[[], Any]]] = {
    "backend('torch')": (lambda t: t, lambda: fusedmlp.backend("torch")),
    "Autocast": (lambda t: t, lambda: torch.autocast("cpu", torch.bfloat16)),
    "torch.backends": (lambda t: t, no_onednn),
    "A mode": (lambda t: t, lambda: FlopCounterMode(display=False)),
    "A mode or": (lambda t: t, forward_ad.dual_level),
    "Grad mode": (lambda t: t, torch.enable_grad),
    "too little": (lambda t: [t[0][:7], *t[1:]], contextlib.nullcontext),
    "sums of more than 1024": (lambda t: layer(64, 1025), contextlib.nullcontext),
    "not contiguous": (lambda t: [t[0], t[1].t().contiguous().t(), t[2]], contextlib.nullcontext),
    "not float32": (lambda t: [one.double() for one in t], contextlib.nullcontext),
    "not a plain": (lambda t: [t[0].as_subclass(Subclass), *t[1:]], contextlib.nullcontext),
}  # fmt: skip


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("special", SPECIAL)
def test_special_cases_run_pytorchs_operators(with_onednn: None, special: str) -> None:
    change, context = SPECIAL[special]
    tensors: Any = change(layer(64, 784))
    with torch.no_grad(), context():
        assert special in str(onednn.why_not(*tensors))
        expected, y = F.relu(F.linear(*tensors)), linear_relu(*tensors)
        assert torch.equal(y, expected)


def test_transforms_and_tracers(with_onednn: None) -> None:
    x, weight, bias = layer(64, 784)
    with torch.no_grad():
        expected = F.relu(F.linear(x, weight, bias))
        batched = torch.func.vmap(lambda one: linear_relu(one, weight, bias))(x.expand(2, 64, 784))
        torch.testing.assert_close(batched, expected.expand(2, 64, 256))
        traced = torch.jit.trace(lambda one: linear_relu(one, weight, bias), (x,))
        assert "mkldnn" not in str(traced.graph)
    _, tangent = torch.func.jvp(lambda one: linear_relu(one, weight, bias), (x,), (x,))
    assert tangent.abs().max() > 0


def test_mistakes_raise_as_in_pytorch(with_onednn: None) -> None:
    x, weight, bias = layer(64, 784)
    with torch.no_grad():
        for wrong in ((x[:, 1:].contiguous(), weight, bias), (x, weight, bias[1:]), (x, weight[0], bias)):
            with pytest.raises(RuntimeError):
                F.linear(*wrong)
            with pytest.raises(RuntimeError):
                linear(*wrong)
        with pytest.raises(TypeError):
            linear(None, weight, bias)  # type: ignore[arg-type]


# --- training: PyTorch's own ---


def build(nn: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = nn.Sequential(
        nn.Linear(784, 256),
        nn.ReLU(),
        nn.Linear(256, 200),
        nn.ReLU(),
        nn.Tanh(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Tanh(),
        nn.Linear(200, 200),
    )  # a chain of layers, a layer with its ReLU and one alone
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_bitwise_pytorchs(with_onednn: None, dtype: torch.dtype) -> None:
    results = []
    for nn in (torch.nn, fusedmlp.nn):
        model = build(nn).to(dtype)
        x = layer(64, 784, dtype=dtype)[0].requires_grad_()
        y = model(x)
        nodes = [y.grad_fn]
        while nodes:
            node = nodes.pop()
            assert not isinstance(node, BackwardCFunction)  # the node of a torch.autograd.Function in Python
            nodes += [n for n, _ in node.next_functions if n is not None]
        y.float().square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters())])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_special_gradients_match_pytorchs(value: float) -> None:
    x, weight, bias = layer(8, 16, N=5)
    x[2, 3] = torch.nan
    weight[1] = 0  # outputs that are exactly 0, where inf * 0 would be NaN
    bias[1] = 0
    incoming = torch.ones(8, 5)
    incoming[1], incoming[5, 1] = value, value
    results = []
    for function in (lambda *t: F.relu(F.linear(*t)), linear_relu):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        results.append(torch.autograd.grad(function(*leaves), leaves, incoming))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_an_output_that_is_used_twice(with_onednn: None) -> None:
    """Masking a gradient in place would change the caller's tensor and what the other use gets."""
    results = []
    incoming = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    before = incoming.clone()
    for nn in (torch.nn, fusedmlp.nn):
        torch.manual_seed(0)
        first, second, third = (nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(3))
        x = torch.randn(32, 64).requires_grad_()
        h = first(x)
        h = h + second(h)  # a residual, and then two branches
        y = second(h) + third(h)
        parameters = [p for model in (first, second, third) for p in model.parameters()]
        results.append(torch.autograd.grad(y, [x, *parameters], incoming))
        assert torch.equal(incoming, before)
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)


def write_by_numpy(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.detach().numpy()[:] *= 2


def write_data(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = 2 * parameter.data


def step(kind: type[torch.optim.Optimizer]) -> Callable[[torch.nn.Module], None]:
    def write(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        kind(model.parameters(), lr=0.1, fused=True).step()  # type: ignore[call-arg]

    return write


@pytest.mark.parametrize(
    "write", [write_by_numpy, write_data, *map(step, (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW))]
)
def test_writes_that_bump_no_version_are_seen(
    with_onednn: None, write: Callable[[torch.nn.Module], None]
) -> None:
    ours, theirs, x = build(fusedmlp.nn), build(torch.nn), layer(64, 784)[0]
    with torch.no_grad():
        stale = ours(x)
    for model in (ours, theirs):
        write(model)
    with torch.no_grad():
        assert not torch.allclose(ours(x), stale)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [fusedmlp.nn.Linear, fusedmlp.nn.LinearReLU])
def test_compilers_see_no_check_of_sizes(with_onednn: None, kind: type[torch.nn.Linear]) -> None:
    model = kind(784, 256)
    batch = torch.export.Dim("batch", min=2, max=100_000)
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(64, 784),), dynamic_shapes=({0: batch},))
    assert "mkldnn" not in str(exported.graph)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
        for rows in (2, 64, 500):
            assert compiled(torch.randn(rows, 784)).shape == (rows, 256)
    assert len(graphs) == 1
