"""``pytest benchmarks -k host``: the time of Python and C++ around the kernels, without launching any.

It measures Linear+ReLU, and a chain of four of them. Each row includes those below it: ``module`` is
nn.Sequential, ``functional`` is functional.mlp with the predicate, ``Function`` is the autograd.Function,
``launcher`` chooses tiles and grids and allocates the outputs. ``predicate`` is measured alone, and ``eager``
is torch.nn's Sequential of the same layers. The matrices are so small (16 x 16) that PyTorch's arithmetic
hardly counts. On a GPU, PyTorch's times include its launches, and ours do not.
"""

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fusedmlp
from fusedmlp import functional
from fusedmlp.dispatch import predicate
from fusedmlp.dispatch.autograd_function import fused_mlp

pytest.importorskip("triton", reason="Triton is not installed: no kernels to launch")


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not torch.cuda.is_available():  # so that the predicate accepts CPU tensors
        monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    from fusedmlp.kernels import dry_run

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with fusedmlp.backend("triton"), dry_run(lambda *_: None):
        yield
    torch.set_num_threads(before)


COUNTS = {"Linear+ReLU": 1, "4-layer chain": 4}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def networks(count: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A network of torch.nn, and ours with the same parameters."""
    torch.manual_seed(0)
    modules = [module for _ in range(count) for module in (torch.nn.Linear(16, 16), torch.nn.ReLU())]
    plain = torch.nn.Sequential(*modules).to(DEVICE)
    return plain, fusedmlp.fuse(copy.deepcopy(plain))


def calls(count: int, training: bool) -> dict[str, Callable[[], object]]:
    """The function that is called at each layer of the stack."""
    from fusedmlp import kernels

    plain, fused = networks(count)
    linears = [module for module in fused.modules() if isinstance(module, torch.nn.Linear)]
    weights, biases = [layer.weight for layer in linears], [layer.bias for layer in linears]
    x, grad_output = torch.randn(16, 16, device=DEVICE), torch.randn(16, 16, device=DEVICE)
    yes = [True] * count

    def launcher() -> None:
        keep = 0 if training else count - 1
        ys = kernels.mlp_forward(x, weights, biases, True, keep, True)
        if training:
            kernels.mlp_backward(grad_output, [x, *ys], weights, True, 0, False, yes, yes, True)

    def with_backward(forward: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def call() -> None:
            for parameter in (*plain.parameters(), *fused.parameters()):
                parameter.grad = None
            forward().backward(grad_output)

        return call if training else forward

    return {
        "eager": with_backward(lambda: plain(x)),
        "module": with_backward(lambda: fused(x)),
        "functional": with_backward(lambda: functional.mlp(x, weights, biases, final_relu=True)),
        "Function": with_backward(lambda: fused_mlp(x, weights, biases, True)),
        "launcher": launcher,
        "predicate": lambda: functional.why_not_fused_mlp(x, weights, biases, final_relu=True),
    }


LAYERS = ("eager", "module", "functional", "Function", "launcher")


@pytest.mark.parametrize(
    ("mode", "layer"),
    [(mode, layer) for mode in ("forward", "forward+backward") for layer in LAYERS]
    + [("forward", "predicate")],  # a backward does not ask the predicate
)
@pytest.mark.parametrize("what", COUNTS)
def test_host(benchmark: Any, what: str, mode: str, layer: str) -> None:
    benchmark.group = f"host time, {what}, {mode}"
    call = calls(COUNTS[what], mode == "forward+backward")[layer]
    with torch.set_grad_enabled(mode == "forward+backward"):
        benchmark(call)


@pytest.mark.parametrize("who", ["eager", "auto", "auto, all asked"])
@pytest.mark.parametrize("what", COUNTS)
def test_host_where_little_is_computed(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, what: str, who: str
) -> None:
    """The overhead of backend("auto") when it leaves a small network to PyTorch's operators.

    "auto, all asked" skips the fast check, so the whole predicate runs. Without a GPU, CPU tensors stand in.
    """
    benchmark.group = f"host time where little is computed, {what}, forward"
    plain, fused = networks(COUNTS[what])
    x = torch.randn(16, 16, device=DEVICE)
    if DEVICE == "cpu":
        monkeypatch.setattr(predicate, "_interpreted", lambda x: True)
        monkeypatch.setattr(predicate, "_why_not_here", lambda device_type, index: None)

    def choose(x: torch.Tensor, weights: Any, biases: Any, final_relu: bool) -> bool:
        if who == "auto" and predicate.surely_too_little(x, weights):
            return False
        return functional.why_not_fused_mlp(x, weights, biases, final_relu=final_relu) is None

    if DEVICE == "cpu" or who == "auto, all asked":
        monkeypatch.setattr(functional, "choose_kernels", choose)
    with fusedmlp.backend("auto"):
        benchmark(lambda: (plain if who == "eager" else fused)(x))
