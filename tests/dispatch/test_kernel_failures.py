"""If a kernel cannot be built or launched, one warning comes, results stay right and a tune goes on."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from available import HAS_TRITON
from compatibility import Route, taken
from failing import ERRORS
from failing import ours as ours_of
from oracle import assert_right

import fusedmlp
from fusedmlp import nn
from fusedmlp.dispatch import backend_choice, predicate

if not HAS_TRITON:
    pytest.skip("Triton is not installed: no kernels to fail", allow_module_level=True)

from fusedmlp.kernels import KernelFailed, chain, tuning_table  # fmt: skip
from fusedmlp.kernels.layer import forward, grad_input, grad_weight, relu_backward
from fusedmlp.kernels.narrow import backward as narrow_backward
from fusedmlp.kernels.narrow import forward as narrow_forward

pytestmark = pytest.mark.kernels

OUT_OF_MEMORY: dict[str, Callable[[], Exception]] = {
    "PyTorch": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "Triton": lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_triton_become_kernel_failed(name: str, fail: Any, device: torch.device) -> None:
    fail(forward, "_linear_forward_kernel", ERRORS[name])
    error = ERRORS[name]()
    with pytest.raises(KernelFailed) as failure, fusedmlp.backend("triton"):
        fusedmlp.functional.linear_relu(*(torch.ones(n, device=device) for n in ((2, 3), (4, 3))))
    assert type(failure.value.__cause__) is type(error)
    message = str(failure.value)
    assert message.startswith(f"the Triton kernel linear_forward failed with {type(error).__name__}")
    assert "\n" not in message
    assert not message.endswith(": ")
    assert not predicate.failed  # forced kernels may be tried again


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_out_of_memory_stays_out_of_memory(name: str, fail: Any, device: torch.device) -> None:
    fail(forward, "_linear_forward_kernel", OUT_OF_MEMORY[name])
    x, weight = torch.ones(2, 3, device=device), torch.ones(4, 3, device=device)
    with pytest.raises(torch.OutOfMemoryError), taken(Route(True)):
        fusedmlp.functional.linear_relu(x, weight)
    assert not predicate.failed


def test_an_interrupt_stays_an_interrupt(fail: Any, device: torch.device) -> None:
    fail(forward, "_linear_forward_kernel", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt), taken(Route(True)):
        fusedmlp.functional.linear_relu(*(torch.ones(n, device=device) for n in ((2, 3), (4, 3))))
    assert not predicate.failed


# --- layers ---

IN_A_CHAIN = {
    "forward": (forward, "_linear_forward_kernel"),
    "grad_input": (grad_input, "_grad_input_kernel"),
    "grad_weights": (grad_weight, "_grad_weights_kernel"),
    "narrow forward": (narrow_forward, "_narrow_forward_kernel"),
    "narrow backward": (narrow_backward, "_narrow_backward_kernel"),
}


def results(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = model(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
    return [y.detach(), *grads]


@pytest.mark.parametrize("error", ["shared memory", "launch"])
@pytest.mark.parametrize(
    ("kernel", "number"), [*((name, 0) for name in IN_A_CHAIN), ("forward", 1), ("grad_input", 1)]
)
def test_layers_go_on_with_pytorchs_operators(
    kernel: str, number: int, error: str, fail: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is complete wherever the failure comes, and no kernel is tried afterwards."""
    if "narrow" not in kernel:
        for name in ("narrow_forward", "narrow_backward"):
            monkeypatch.setattr(chain, name, lambda *arguments: None)
    failing = fail(*IN_A_CHAIN[kernel], ERRORS[error], number)
    model = nn.MLP(6, [9, 7], 4, device=device)
    x = torch.randn(5, 6, device=device)
    with taken(Route(True)):
        with pytest.warns(
            RuntimeWarning, match="Layers on .* run on PyTorch's operators from now on"
        ) as caught:
            ours = results(model, x)
        launched = failing.launches
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            again = results(model, x)
            (row,) = fusedmlp.explain(model, x).rows
    (warning,) = ours_of(caught)
    assert ".." not in warning
    if "forward" in kernel:  # a backward may run in one of autograd's threads
        assert [w.filename for w in caught if str(w.message) == warning] == [__file__]
    assert "python -m fusedmlp --report" in warning
    assert failing.launches == launched
    assert type(ERRORS[error]()).__name__ in str(row.reason)
    with fusedmlp.backend("torch"):
        torchs = results(model, x)
    exact = results(copy.deepcopy(model).double(), x.double())
    for result in (ours, again):
        for one, its, true in zip(result, torchs, exact, strict=True):
            assert_right(one, its, true)


def test_compiled_layers_go_on_too(fail: Any, device: torch.device) -> None:
    """The graph was compiled before the failure, with the kernels in it."""
    torch._dynamo.reset()
    model = nn.MLP(6, [9], 4, device=device)
    x = torch.randn(5, 6, device=device)
    with taken(Route(True)):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected = results(compiled, x)
        fail(narrow_forward, "_narrow_forward_kernel", ERRORS["launch"])
        with pytest.warns(RuntimeWarning, match="run on PyTorch's operators from now on") as caught:
            found = [results(compiled, x) for _ in range(2)]
    assert len(ours_of(caught)) == 1
    for result in found:
        torch.testing.assert_close(result, expected)
    torch._dynamo.reset()


# --- tune ---


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning_table.forget()
    yield
    tuning_table.forget()


@pytest.mark.parametrize("error", ERRORS)
def test_tune_leaves_a_failing_tile_out(error: str, table: None, fail: Any) -> None:
    fail(grad_weight, "_grad_weights_kernel", ERRORS[error])
    tuned = fusedmlp.tune([(8, 16, 32, 7)], torch.float32)
    failed = [p for p in tuned.products if p.operation == "grad_weight"]
    assert [p.tile for p in failed] == [None, None]
    assert all("KernelFailed: the Triton kernel grad_weights failed" in str(p.problem) for p in failed)
    assert all(p.tile is not None for p in tuned.products if p.operation != "grad_weight")
    assert {s.mode for s in tuned.stretches} == {"inference"}
    text = str(tuned)
    assert "left out: training of 8 x 16-32-7: the Triton kernel grad_weights failed" in text
    assert not predicate.failed  # a failure in a tune disables no kernel for layers


def test_tune_goes_on_without_a_kernel_that_pytorchs_path_needs(table: None, fail: Any) -> None:
    """After PyTorch's product our relu_backward applies the mask and sums the bias gradient."""
    fail(relu_backward, "relu_backward_kernel", ERRORS["shared memory"])
    tuned = fusedmlp.tune([(8, 16, 16)], torch.float32)
    assert [p.operation for p in tuned.products] == ["forward", "grad_weight"]
    assert "left out: grad_input of 8 x 16 -> 16: the Triton kernel relu_backward failed" in str(tuned)


@pytest.mark.gpu
def test_tiles_that_the_chip_cannot_hold(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real compiler refuses 512 KB of shared memory. In the interpreter every tile fits."""
    from fusedmlp.kernels import tiles

    monkeypatch.setattr(tiles, "select_tile", lambda *arguments: tiles.Tile(256, 256, 128, 8, 4))
    forward._plan.cache_clear()
    model = nn.LinearReLU(2048, 2048, device=device, dtype=torch.bfloat16)
    x = torch.randn(4096, 2048, device=device, dtype=torch.bfloat16)
    try:
        with backend_choice.measuring(), pytest.raises(KernelFailed, match="OutOfResources"):
            model(x)
    finally:
        monkeypatch.undo()
        forward._plan.cache_clear()
