"""Reading a forward changes nothing, whatever the forward does."""

import copy
import random
import sys
import warnings
from typing import Any

import pytest
import torch
from converted import Custom, Reverse, assert_same_bits, custom, row, state
from torch import nn as tnn
from torch.nn import functional as F

from fusedmlp.convert import fuse, report


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


def test_script_modules_are_no_obstacle() -> None:
    model = tnn.Sequential(tnn.Linear(5, 5), tnn.ReLU(), torch.jit.script(tnn.Linear(5, 5)))
    assert report(model).pairs == 1
    fuse(model)


def test_blocks_named_linear_are_read_and_odd_features_do_no_harm() -> None:
    block = type("LinearBlock", (Custom,), {"in_features": 5, "out_features": 5})
    assert report(block(code=lambda m, x: F.relu(m.fc(x)))).pairs == 1
    for odd in (None, [5], property(lambda m: 1 / 0)):
        assert report(type("OddLinear", (tnn.Module,), {"in_features": odd, "out_features": 5})()).rows == ()


def test_nested_containers_and_flags_stay_and_exit_is_caught() -> None:
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
