"""Measurements decide which products and which chains run on the kernels."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from available import HAS_TRITON
from oracle import assert_right

import fusedmlp
from fusedmlp import nn
from fusedmlp.dispatch import backend_choice, predicate, reference

if not HAS_TRITON:
    pytest.skip("Triton is not installed: no kernels to choose", allow_module_level=True)

from fusedmlp.kernels import tuning_table
from fusedmlp.kernels.launch import setting_of
from fusedmlp.kernels.layer import forward, grad_input, grad_weight
from fusedmlp.kernels.tiles import TILES, Tile

M, WIDTHS = 40, (16, 32, 48, 10)
LAYERS = list(zip(WIDTHS[1:], WIDTHS, strict=False))  # (N, K)
SMALL = TILES["ieee"][0]
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Use these products and chains as the measurements of this device."""

    def put(products: dict[Any, tuning_table.Product], stretches: dict[Any, tuning_table.Stretch]) -> None:
        table = tuning_table.Table(products, stretches)
        monkeypatch.setattr(tuning_table, "_read", lambda index: table)
        tuning_table.forget()

    yield put
    monkeypatch.undo()
    tuning_table.forget()


def products(choose: Callable[[str, int], float], tile: Tile = SMALL) -> dict[Any, tuning_table.Product]:
    """Every product of the chain. PyTorch's operator takes 1 us, and ``choose`` gives our time."""
    return {
        (operation, "ieee", tuning_table.bucket(M), N, K): tuning_table.Product(
            tile, choose(operation, i), 1.0
        )
        for operation in ("forward", "grad_input", "grad_weight")
        for i, (N, K) in enumerate(LAYERS)
    }


def chain(device: torch.device) -> tuple[torch.nn.Module, torch.Tensor]:
    model = nn.MLP(WIDTHS[0], list(WIDTHS[1:-1]), WIDTHS[-1], device=device)
    return model, torch.randn(M, WIDTHS[0], device=device, requires_grad=True)


def launches(model: torch.nn.Module, x: torch.Tensor) -> tuple[list[str], list[str]]:
    (row,) = fusedmlp.explain(model, x).rows
    assert row.reason is None
    assert row.backward is not None
    return list(row.forward.launches or ()), list(row.backward.launches or ())


# The operations and layers for which PyTorch's operator was faster.
CHOICES = {
    "none": lambda operation, i: False,
    "all": lambda operation, i: True,
    "forward": lambda operation, i: operation == "forward",
    "grad_input": lambda operation, i: operation == "grad_input",
    "grad_weight": lambda operation, i: operation == "grad_weight",
    "the middle layer": lambda operation, i: i == 1,
    "all but the first weight": lambda operation, i: (operation, i) != ("grad_weight", 0),
}


@pytest.mark.kernels
@pytest.mark.parametrize("by_torch", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_each_product_runs_where_it_was_faster(
    by_torch: Callable[[str, int], bool], bias: bool, install: Install, device: torch.device
) -> None:
    install(products(lambda operation, i: 2.0 if by_torch(operation, i) else 0.5), {})
    model, x = chain(device)
    if not bias:
        for layer in model[::2]:  # type: ignore[index]
            layer.bias = None
    with backend_choice.measuring():
        there, back = launches(model, x)
        y = model(x)
    grad_output = torch.randn_like(y)
    inputs = [x, *model.parameters()]
    ours = [y, *torch.autograd.grad(y, inputs, grad_output, retain_graph=True)]
    again = [y, *torch.autograd.grad(y, inputs, grad_output)]
    with fusedmlp.backend("torch"):
        y = model(x)
        torchs = [y, *torch.autograd.grad(y, inputs, grad_output)]
        double = [t.detach().double().requires_grad_() for t in inputs]
        weights = [t for t in double[1:] if t.dim() == 2]
        biases = [t for t in double[1:] if t.dim() == 1] or [None] * len(weights)
        (y,) = reference.mlp_forward(double[0], weights, biases, False, len(weights) - 1)  # type: ignore[arg-type]
        exact = [y, *torch.autograd.grad(y, double, grad_output.double())]
    for one, same, its, true in zip(ours, again, torchs, exact, strict=True):
        assert torch.equal(one, same)  # the first backward changed nothing that was saved
        assert_right(one, its, true, "result")
    # The expected launches: PyTorch's forward is linear and, except in the last layer, relu_.
    expected = []
    for i in range(3):
        expected += (["linear"] + ["relu_"] * (i < 2)) if by_torch("forward", i) else ["linear_forward"]
    assert there == expected
    by_mm = [(o, i) for o in ("grad_input", "grad_weight") for i in range(3) if by_torch(o, i)]
    assert back.count("mm") == len(by_mm)
    assert back.count("grad_input") == 3 - sum(o == "grad_input" for o, _ in by_mm)
    assert back.count("grad_weights") == (sum(o == "grad_weight" for o, _ in by_mm) < 3)
    # After PyTorch's product one relu_backward applies the mask and sums the bias gradient. The gradient of x
    # needs neither. Another one sums the last layer's bias gradient if no grad_weights does.
    masks = sum(o == "grad_input" and i > 0 for o, i in by_mm)
    alone = bias and "grad_weights" not in back
    assert back.count("relu_backward") == masks + alone


@pytest.mark.kernels
@pytest.mark.parametrize("need_x", [True, False], ids=["input gradient", "no input gradient"])
@pytest.mark.parametrize("known", [True, False], ids=["products measured", "no products measured"])
@pytest.mark.parametrize("in_one", [True, False, None])
def test_one_launch_where_that_was_measured_to_be_faster(
    in_one: bool | None, known: bool, need_x: bool, install: Install, device: torch.device
) -> None:
    """Without measurements a rule decides. If only products were measured, each layer has its launch."""
    for measured, other in (("training", "inference"), ("inference", "training")):
        stretch = {} if in_one is None else stretches(50.0, measured, in_one=in_one)
        install(products(lambda operation, i: 0.5) if known else {}, stretch)
        model, x = chain(device)
        x.requires_grad_(need_x)
        with backend_choice.measuring():
            there, back = launches(model, x)
            with torch.no_grad():
                (row,) = fusedmlp.explain(model, x.detach()).rows
        found = {"training": (there, back[0]), "inference": (list(row.forward.launches or ()), None)}
        one = ["narrow_forward"], "narrow_backward" if measured == "training" else None
        assert (found[measured] == one) is (not known if in_one is None else in_one)
        assert (found[other][0] == ["narrow_forward"]) is not known


@pytest.mark.kernels
def test_forced_kernels_run_in_the_backward_too(install: Install, device: torch.device) -> None:
    install(products(lambda operation, i: 2.0), {})
    model, x = chain(device)
    with fusedmlp.backend("triton"):
        there, back = launches(model, x)
        y = model(x)
    assert "linear" not in there
    assert "mm" not in back
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y.sum().backward()  # outside the block, and on a GPU in another thread
    assert not {"aten::mm", "aten::linear", "aten::addmm"} & {event.name for event in profile.events()}


@pytest.mark.kernels
def test_the_measured_tile_is_used(install: Install, device: torch.device) -> None:
    half = dict(
        zip("abc", (Tile(64, 64, 64, 4, 4), Tile(64, 64, 32, 8, 3), Tile(128, 128, 64, 8, 3)), strict=True)
    )
    N, K = 32, 16
    table = {
        (operation, "half", tuning_table.bucket(M), N, K): tuning_table.Product(tile, 0.5, 1.0)
        for operation, tile in zip(("forward", "grad_input", "grad_weight"), half.values(), strict=True)
    }
    install(table, {})
    setting = setting_of(torch.empty(1, 1, dtype=torch.float16, device=device))
    plan = forward._plan(M, N, K, True, True, setting, None)
    assert plan is not None
    assert plan[1]["BLOCK_M"] == 64
    assert plan[1]["BLOCK_K"] == 64
    found = grad_input._plan(M, N, K, True, setting, None)
    assert found is not None
    assert found[0] == half["b"]
    *_, options = grad_weight._plan(M, ((N, K),), (), 0, setting, None)
    assert options["TILE"] == (128, 128, 64)
    # It is not used for other sizes, nor for unaligned operands, for which it was not compiled.
    for sizes, aligned in (((M, N, K), False), ((M, N, 2 * K), True), ((4 * M, N, K), True)):
        assert setting.measured("forward", *sizes, aligned, None) == (None, False)


def stretches(
    us: float, mode: str = "training", widths: tuple[int, ...] = WIDTHS, in_one: bool = False
) -> dict[Any, tuning_table.Stretch]:
    measured = tuning_table.Stretch(us, 100.0, in_one, "a test's device, today")
    return {(mode, "ieee", tuning_table.bucket(M), widths, False): measured}


@pytest.mark.parametrize(("us", "worth"), [(50, True), (97, True), (99, False), (100, False), (200, False)])
def test_a_measured_chain_goes_where_it_was_faster(us: float, worth: bool, install: Install) -> None:
    install({}, stretches(us))
    model, x = chain(torch.device("cpu"))
    weights, biases = [m.weight for m in model[::2]], [m.bias for m in model[::2]]  # type: ignore[index]
    reason = predicate._why_not_worth_it(x, weights, biases, False, False)
    figures = f"Measured as a whole for training: {us} us against PyTorch's 100, on a test's device, today."
    if worth:
        assert reason is None
        assert predicate._why_fused(x, weights, biases, False) == figures
        install({}, stretches(us, in_one=True))
        assert "as a whole in one launch for training" in predicate._why_fused(x, weights, biases, False)
    else:
        assert reason == f"The kernels are not faster. {figures}"
    # With measurements, the quick check leaves the choice to them.
    assert not predicate.surely_too_little(x, weights)
    # The rule decides what was not measured: inference, a final ReLU, and calls that a compiler fuses.
    with torch.no_grad():
        assert "too little" in str(predicate._why_not_worth_it(x, weights, biases, False, False))
    assert "too little" in str(predicate._why_not_worth_it(x, weights, biases, True, False))
    assert "too little" in str(predicate._why_not_worth_it(x, weights, biases, False, True))


@pytest.mark.kernels
def test_explain_shows_what_the_choice_rests_on(install: Install, device: torch.device) -> None:
    install(products(lambda operation, i: 2.5 if operation == "forward" else 0.5), stretches(50.0))
    model, x = chain(device)
    with backend_choice.measuring():
        explanation = fusedmlp.explain(model, x)
    (row,) = explanation.rows
    assert [(f.layer, f.operation) for f in row.measured] == [
        (i, operation) for i in range(3) for operation in ("forward", "grad_input", "grad_weight")
    ]
    assert {(f.us, f.torch_us) for f in row.measured if f.operation == "forward"} == {(2.5, 1.0)}
    text = re.sub(r"\s+", " ", str(explanation))
    assert "layer 0: forward 2.5 us (PyTorch 1), grad_input 0.5 us (PyTorch 1)" in text
    assert max(map(len, str(explanation).splitlines())) <= 80
    json.dumps(explanation.to_dict())
    with torch.no_grad(), backend_choice.measuring():
        (row,) = fusedmlp.explain(model, x.detach()).rows
    assert [f.operation for f in row.measured] == ["forward"] * 3
