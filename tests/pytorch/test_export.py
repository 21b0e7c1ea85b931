"""Export: graphs contain only PyTorch's operators, and the files can be read without fusedmlp."""

import copy
import pathlib
import subprocess
import sys

import pytest
import torch
from compatibility import Route, taken
from networks import NETWORKS, pair
from oracle import assert_right
from torch import nn as tnn
from torch.fx.experimental.proxy_tensor import make_fx

import fusedmlp
from fusedmlp import nn

SECTION = "Export"
PLAIN = "the graph is of PyTorch's own operators"
ROWS = torch.export.Dim("rows")

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:", "ignore::FutureWarning", "ignore::UserWarning")


def operators(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op.startswith("call")]


@pytest.mark.capability(SECTION, "torch.export, strict and not, with a dynamic batch")
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool, network: str, route: Route, device: torch.device) -> None:
    ours, torchs = pair(network, device)
    x, other = (torch.randn(rows, 5, device=device) for rows in (6, 3))
    program = torch.export.export(ours, (x,), dynamic_shapes=({0: ROWS},), strict=strict)
    ops = operators(program.graph)
    assert ops == operators(torch.export.export(torchs, (x,), dynamic_shapes=({0: ROWS},)).graph)
    assert all(op.startswith("aten.") for op in ops)
    route.reasons.append(PLAIN)
    assert torch.equal(program.module()(other), torchs(other))


@pytest.mark.capability(SECTION, "torch.fx.symbolic_trace, make_fx")
def test_fx(network: str, route: Route, device: torch.device) -> None:
    ours, torchs = pair(network, device)
    x, other = (torch.randn(rows, 5, device=device) for rows in (6, 3))
    both = [make_fx(model)(x) for model in (ours, torchs)]
    assert operators(both[0].graph) == operators(both[1].graph)
    for traced in (both[0], torch.fx.symbolic_trace(ours)):
        assert not any("fusedmlp" in op for op in operators(traced.graph))
        assert torch.equal(traced(x), torchs(x))
    assert torch.equal(traced(other), torchs(other))


@pytest.mark.capability(SECTION, "torch.jit.trace")
def test_jit_trace(network: str, route: Route, device: torch.device) -> None:
    ours, torchs = pair(network, device)
    x, other = (torch.randn(rows, 5, device=device) for rows in (6, 3))
    traced = torch.jit.trace(ours, x, check_trace=False)
    assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} <= {"aten", "prim"}
    assert torch.equal(traced(other), torchs(other))
    assert not route.kernels or set(route.reasons) == {"torch.jit is tracing this call."}


@pytest.mark.capability(SECTION, "torch.jit.script")
def test_jit_script(network: str, route: Route, device: torch.device) -> None:
    ours, torchs = pair(network, device)
    x = torch.randn(6, 5, device=device)
    before = list(ours.modules())
    scripted = torch.jit.script(ours)
    assert {node.kind().split("::")[0] for node in scripted.inlined_graph.nodes()} <= {"aten", "prim"}
    route.reasons.append(PLAIN)
    assert torch.equal(scripted(x), torchs(x))
    assert list(ours.modules()) == before
    with taken(after := Route(route.kernels)):
        y = ours(x)
    assert not route.kernels or set(after.reasons) == {None}  # fused as before
    assert_right(y.detach(), torchs(x).detach(), copy.deepcopy(torchs).double()(x.double()).detach())


@pytest.mark.capability(SECTION, "ONNX, run by onnxruntime")
@pytest.mark.parametrize("network", ["LinearReLU", "MLP", "fused"])
def test_onnx(network: str, route: Route, tmp_path: pathlib.Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="for ONNX, install fusedmlp[onnx]")
    import onnx
    import onnxruntime

    ours, torchs = pair(network, torch.device("cpu"))
    x, other = torch.randn(6, 5), torch.randn(3, 5)
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(ours, (x,), file, dynamo=True, verbose=False, dynamic_shapes=({0: ROWS},))
    assert {node.domain for node in onnx.load(file).graph.node} == {""}  # ONNX's own operators
    route.reasons.append("the graph is of ONNX's own operators")
    session = onnxruntime.InferenceSession(file)
    (y,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    exact = copy.deepcopy(torchs).double()(other.double())
    assert_right(torch.from_numpy(y), torchs(other).detach(), exact.detach())


ELSEWHERE = """
import pathlib, pickle, sys, warnings

class NoFusedmlp:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "fusedmlp":
            raise ModuleNotFoundError("there is no fusedmlp here")

sys.meta_path.insert(0, NoFusedmlp())
warnings.simplefilter("ignore")
import torch

x, wanted = torch.load("wanted.pt")
for name, y in wanted.items():
    kind = name.split(".")[-1]
    if kind == "pt2":
        model = torch.export.load(name).module()
    elif kind == "jit":
        model = torch.jit.load(name)
    else:
        model = torch.load(name, weights_only=False)
    assert torch.equal(model(x), y), name
    print(name)
for name in ("built.whole", "fused.whole"):
    try:
        torch.load(name, weights_only=False)
    except ModuleNotFoundError as error:
        print(error)
assert not any(name.startswith("fusedmlp") for name in sys.modules)
"""


@pytest.mark.capability(
    SECTION, "files read without fusedmlp: exported, traced, scripted, pickled after unfuse(built=True)"
)
def test_files_are_read_without_fusedmlp(route: Route, tmp_path: pathlib.Path) -> None:
    x, wanted = torch.randn(6, 5), {}
    for network in NETWORKS:
        ours, torchs = pair(network, torch.device("cpu"))
        program = torch.export.export(ours, (x,), dynamic_shapes=({0: ROWS},))
        torch.export.save(program, tmp_path / f"{network}.pt2")
        torch.jit.trace(ours, x, check_trace=False).save(tmp_path / f"{network}.trace.jit")
        torch.jit.script(ours).save(tmp_path / f"{network}.script.jit")
        for kind in ("pt2", "trace.jit", "script.jit"):
            wanted[f"{network}.{kind}"] = torchs(x).detach()
    for name, model in (
        ("built", nn.Sequential(nn.MLP(5, [4], 3), nn.ReLU(), nn.Linear(3, 2))),
        ("fused", fusedmlp.fuse(tnn.Sequential(tnn.Linear(5, 4), tnn.ReLU(), tnn.Linear(4, 3)))),
    ):
        torch.save(model, tmp_path / f"{name}.whole")
        torch.save(fusedmlp.unfuse(model, built=True), tmp_path / f"{name}.unfused")
        wanted[f"{name}.unfused"] = model(x).detach()
    torch.save((x, wanted), tmp_path / "wanted.pt")
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=tmp_path, env={}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:-1] == [*wanted, *["there is no fusedmlp here"] * 2]
