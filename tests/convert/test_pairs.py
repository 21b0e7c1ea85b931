"""fuse finds the pairs of a Linear and its ReLU in a forward, and no others."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from converted import Clipped, Reverse, assert_right_on_kernels, assert_same_bits, custom, row, run, spied
from torch import nn as tnn
from torch.nn import functional as F

import fusedmlp
from fusedmlp import nn
from fusedmlp.convert import Row, fuse, report

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
def test_every_spelling_of_relu_is_fused(
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
    """The bias's gradient where the Linear's output is 0 or NaN: relu and clamp_min(0) differ there."""
    model.zero_grad()
    with torch.no_grad():
        model.fc.bias.copy_(torch.tensor([0.0, -0.0, float("nan"), 1, -1]))
    with fusedmlp.backend("auto" if type(model.fc) is tnn.Linear else "triton"):
        model.to(device)(torch.zeros(3, 5, device=device)).sum().backward()
    return model.fc.bias.grad


@pytest.mark.kernels
@pytest.mark.parametrize("spelling", SPELLINGS | CLAMPS)
def test_the_gradient_where_the_output_is_zero_or_nan(spelling: str, device: torch.device) -> None:
    code = (SPELLINGS | CLAMPS)[spelling]
    plain, fused = custom(code), fuse(custom(code))
    assert torch.equal(gradient_at_the_edge(fused, device), gradient_at_the_edge(plain, device))


@pytest.mark.kernels
def test_a_later_clamp_min_keeps_its_own_gradient(device: torch.device) -> None:
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
def test_other_uses_are_no_pair(case: str) -> None:
    model = custom(ALONE[case][0])
    assert row(model, "fc").status == "Linear only"
    assert ALONE[case][1] in row(model, "fc").reason
    fused = fuse(copy.deepcopy(model))
    assert type(fused.fc) is nn.Linear
    assert_same_bits(run(fused, torch.ones(4, 5)), run(model, torch.ones(4, 5)))


def test_modules_that_do_not_count_as_relu() -> None:
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
        assert in_sequential.pairs == (type(act) is tnn.ReLU and act is not hooked)  # in place is allowed
