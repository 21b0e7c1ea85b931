"""torch.compile: the kernels are operators in its graph, all else is compiled, and `explain` agrees."""

import itertools
import shutil
from collections.abc import Callable
from typing import Any

import compatibility
import pytest
import torch
import torch._dynamo
from compatibility import Route
from oracle import assert_all_right, nearby
from torch import nn as tnn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import fusedmlp
from fusedmlp import nn
from fusedmlp.dispatch import predicate

Graphs = list[list[str]]


class Plain(tnn.Module):
    """Written for torch.nn: one pair in the forward, one in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.first = tnn.Linear(7, 6)
        self.rest = tnn.Sequential(tnn.Linear(6, 5), tnn.ReLU(), tnn.Linear(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(F.relu(self.first(x)))  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], tnn.Module]] = {
    "Linear": lambda: nn.Linear(7, 3),
    "LinearReLU": lambda: nn.LinearReLU(7, 3),
    "Sequential": lambda: nn.Sequential(
        nn.Linear(7, 6), nn.ReLU(), nn.Dropout(0.0), nn.Linear(6, 3), nn.ReLU()
    ),
    "MLP": lambda: nn.MLP(7, [6, 5], 3),
    "a fused model": lambda: fusedmlp.fuse(Plain()),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def compiled(model: Any, **options: Any) -> tuple[Any, Graphs]:
    """The model under torch.compile without a graph break, and a list of the operators of each graph."""
    graphs: Graphs = []

    def note(module: Any, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return make_boxed_func(module)

    both = aot_autograd(fw_compiler=note, bw_compiler=note)
    return torch.compile(model, backend=both, fullgraph=True, **options), graphs


def ours(graphs: Graphs, route: Route | None = None) -> list[str]:
    """The package's operators in the graphs, in order. They are noted on the route."""
    names = [name.split(".")[1] for graph in graphs for name in graph if name.startswith("fusedmlp.")]
    if names and route:
        route.reasons.append(None)
    return names


def results(call: Callable[[torch.Tensor], torch.Tensor], model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = call(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [
        y.detach(),
        *torch.autograd.grad(
            y, wanted, torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view_as(y)
        ),
    ]


def same(route: Route, call: Any, model: tnn.Module, x: torch.Tensor) -> None:
    """Assert the model's results on PyTorch's operators: the same bits, or within the bound on kernels."""
    mine = results(call, model, x)
    with fusedmlp.backend("torch"):
        theirs = results(model, model, x)
        exact = results(model.double(), model, x.double())
        model.float()

    def again(nudge: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        with fusedmlp.backend("torch"):
            other = nearby(model, nudge)
            return results(other, other, nudge(x))

    if route.kernels:
        assert_all_right(mine, theirs, exact, [f"result {i}" for i in range(len(exact))], again)
    else:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def fused_of(model: tnn.Module, x: torch.Tensor) -> list[str]:
    """The operators that `explain` expects of the compiled model: one for each chain on the kernels."""
    explanation = fusedmlp.explain(torch.compile(model, backend="eager"), x)
    assert explanation.compiled
    for row in explanation.rows:
        assert row.forward.backend == ("torch.compile's own code" if row.reason else "Triton kernels")
    return ["mlp_forward" for row in explanation.rows if row.reason is None]


@pytest.mark.capability("torch.compile", "fullgraph, forward and backward, every kind of layer")
@pytest.mark.parametrize("name", MODELS)
def test_one_graph_with_the_kernels_in_it(name: str, route: Route, device: torch.device) -> None:
    model = MODELS[name]().to(device)
    call, graphs = compiled(model)
    x = torch.randn(9, 7, device=device)
    same(route, call, model, x)
    assert len(graphs) == 2  # one forward, one backward
    forward = [name for name in ours(graphs) if name == "mlp_forward"]
    assert forward == fused_of(model, x)
    assert ours(graphs, route) == forward + ["mlp_backward"] * len(forward)
    if route.kernels:  # a ReLU that a forward calls itself is left to the compiler
        relus = sum("relu" in name for name in graphs[0])
        assert relus == (1 if name == "a fused model" else 0)
        assert len(forward) == (2 if name == "Sequential" else 1)
    else:
        assert forward == []


@pytest.mark.capability("torch.compile", "any batch size by one graph")
@pytest.mark.parametrize("name", ["Linear", "MLP", "a fused model"])
def test_one_graph_serves_every_batch(name: str, route: Route, device: torch.device) -> None:
    model = MODELS[name]().to(device)
    call, graphs = compiled(model, dynamic=True)
    for rows in (9, 4, 130):
        same(route, call, model, torch.randn(rows, 7, device=device))
    assert len(graphs) == 2
    assert len(ours(graphs, route)) == (2 if route.kernels else 0)
    x = torch.randn(5, 7, device=device)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.reset()
    call(x)


@pytest.mark.capability("torch.compile", "inputs of any rank, no_grad, frozen layers, autocast")
def test_what_else_is_traced(route: Route, device: torch.device) -> None:
    model = nn.MLP(7, [6, 5], 3).to(device)
    call, graphs = compiled(model)
    same(route, call, model, torch.randn(2, 4, 7, device=device))
    with torch.no_grad():
        x = torch.randn(7, device=device)
        torch.testing.assert_close(call(x), model(x))
    model[2].weight.requires_grad_(False)
    model[0].requires_grad_(False)
    same(route, call, model, torch.randn(4, 7, device=device))
    assert ours(graphs, route).count("mlp_forward") == (3 if route.kernels else 0)
    graphs.clear()
    with torch.autocast(device.type, torch.float16):
        y = call(torch.randn(4, 7, device=device))
    assert y.dtype is torch.float16
    assert ("mlp_forward" in ours(graphs)) is route.kernels
    y.float().sum().backward()
    assert model[4].weight.grad.dtype is torch.float32


@pytest.mark.capability("torch.compile", "torch.func transforms in compiled code")
def test_transforms_inside(route: Route, device: torch.device) -> None:
    model = nn.MLP(7, [6], 3).to(device)
    x = torch.randn(4, 7, device=device)
    for transform in (
        lambda x: torch.func.vmap(model)(x),
        lambda x: torch.func.jvp(model, (x,), (x,))[1],
        lambda x: torch.func.grad(lambda x: model(x).sum())(x),
    ):
        call, graphs = compiled(transform)
        torch.testing.assert_close(call(x), transform(x))
        assert ours(graphs) == []


def test_a_change_of_backend_is_noticed_and_forcing_raises(device: torch.device) -> None:
    model = nn.MLP(7, [6], 3).to(device)
    call, graphs = compiled(model)
    x = torch.randn(4, 7, device=device)
    with torch.no_grad():
        call(x)
        assert ours(graphs) == []
        if predicate.has_triton():
            with fusedmlp.backend("triton"):
                call(x)
            assert ours(graphs) == ["mlp_forward"]
        graphs.clear()
        with fusedmlp.backend("torch"):
            call(x)
        assert ours(graphs) == []
        broken = torch.compile(nn.MLP(7, [6], 3).to(device).double(), backend="eager")
        with fusedmlp.backend("triton"), pytest.raises(RuntimeError, match="cannot run here"):
            broken(x.double())


@pytest.mark.kernels
@pytest.mark.parametrize("final_relu", [True, False])
def test_operators_keep_torch_librarys_rules(final_relu: bool, device: torch.device) -> None:
    widths = (7, 6, 3)
    weights = [torch.randn(n, k, device=device) for k, n in itertools.pairwise(widths)]
    biases = [torch.randn(6, device=device), None]
    x = torch.randn(9, 7, device=device)
    checks = torch.library.opcheck(
        torch.ops.fusedmlp.mlp_forward.default, (x, weights, biases, final_relu, 0, True)
    )
    assert set(checks.values()) == {"SUCCESS"}
    ys = torch.ops.fusedmlp.mlp_forward(x, weights, biases, final_relu, 0, True)
    grad_output = torch.randn(3, 9, device=device).t()
    for need_x in (True, False):
        needs = need_x, [True, True], [need_x, False]
        arguments = (grad_output, [x, *ys], weights, final_relu, 0, *needs, True)
        checks = torch.library.opcheck(torch.ops.fusedmlp.mlp_backward.default, arguments)
        assert set(checks.values()) == {"SUCCESS"}


# How many chains run on the kernels by "auto" if the batch is large: not a lone Linear, nor a ReLU that a
# forward calls itself.
STRETCHES = {"Linear": 0, "LinearReLU": 1, "Sequential": 2, "MLP": 1, "a fused model": 1}


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch is built without CUDA")
@pytest.mark.parametrize("name", MODELS)
def test_captured_for_cuda_with_fake_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a GPU the backward cannot run on CUDA tensors, but the captured graphs can be read.
    if not torch.cuda.is_available():
        monkeypatch.setattr(predicate, "_why_not_here", lambda device_type, index: None)
    captured: Graphs = []

    def note(module: Any, inputs: Any) -> Any:
        captured.extend(
            [str(node.target) for node in part.graph.nodes]
            for part in module.modules()
            if isinstance(part, torch.fx.GraphModule)
        )
        return module

    model = MODELS[name]()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                fake = mode.from_tensor(parameter.detach()).to("cuda", torch.bfloat16)
                setattr(module, key, tnn.Parameter(fake))
        call = torch.compile(model, backend=note, fullgraph=True)
        large = torch.empty(10**8, 7, device="cuda", dtype=torch.bfloat16)
        y = call(large)
        assert (y.shape, y.device.type, y.dtype) == ((10**8, 3), "cuda", torch.bfloat16)
        names = ours(captured)
        assert names.count("mlp_forward") == names.count("mlp_backward") == STRETCHES[name]
        captured.clear()
        call(large[:100])  # "auto" leaves a small batch to the compiler
        assert captured
        assert ours(captured) == []


@pytest.mark.skipif(
    not (shutil.which("g++") or torch.cuda.is_available()), reason="no C++ compiler for Inductor"
)
@pytest.mark.capability("torch.compile", "Inductor, with the operators in its code")
def test_inductor(route: Route, device: torch.device) -> None:
    model = nn.MLP(7, [6], 3).to(device)
    x = torch.randn(9, 7, device=device)
    call = torch.compile(model, fullgraph=True)
    mine, theirs = results(call, model, x), results(model, model, x)
    for our, its in zip(mine, theirs, strict=True):
        torch.testing.assert_close(our, its)


@pytest.mark.gpu
@pytest.mark.capability("torch.compile", "modes reduce-overhead and max-autotune on a GPU")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_on_a_gpu(mode: str, route: Route, device: torch.device) -> None:
    model = nn.MLP(64, [64, 48], 10).to(device)
    call = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):  # the first two warm up, then CUDA graphs are replayed with new data
        x = torch.randn(256, 64, device=device)
        mine = results(call, model, x)
        for our, its in zip(mine, results(model, model, x), strict=True):
            torch.testing.assert_close(our, its, rtol=1e-3, atol=1e-3)


def test_compiled_code_is_not_recorded() -> None:
    route = Route(False)
    call, _ = compiled(nn.MLP(7, [6], 3))
    with compatibility.taken(route):
        call(torch.randn(4, 7))
    assert route.reasons == []
