"""explain changes nothing and keeps no tensor."""

import contextlib
import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn as tnn
from torch.nn.utils import parametrizations

import fusedmlp
from fusedmlp import nn
from fusedmlp.inspection.explain import explain


class Restless(tnn.Module):
    """Its forward changes everything that it can."""

    def __init__(self, device: torch.device, fails: bool) -> None:
        super().__init__()
        self.fails, self.calls, self.log = fails, 0, ["made"]
        self.chain = nn.Sequential(
            nn.Linear(5, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 4), nn.BatchNorm1d(4)
        )
        self.spectral = parametrizations.spectral_norm(nn.Linear(4, 3))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros(0))
        self.to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.spectral(self.chain(x))
        self.calls += 1
        self.log.append("called")
        self.count = self.count + 1
        self.seen.resize_(2).fill_(7)
        random.random(), np.random.rand()
        (y.sum() * 3).backward()
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(2)
        self.eval()
        if self.fails:
            raise LookupError("as planned")
        return y


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("path", ["auto", pytest.param("triton", marks=pytest.mark.kernels)])
def test_everything_is_left_as_it_was(path: Any, fails: bool, device: torch.device) -> None:
    model = Restless(device, fails)
    model.chain[0].eval()
    x = torch.randn(9, 5, device=device)
    for parameter in model.chain.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradients = {name: (p.grad, copy.deepcopy(p.grad)) for name, p in model.named_parameters()}
    buffers = {name: (b, b.clone(), b._version) for name, b in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    numbers = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    on_device = torch.cuda.get_rng_state() if device.type == "cuda" else None
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with fusedmlp.backend(path), pytest.raises(LookupError) if fails else contextlib.nullcontext():
        explain(model, x)
    for name, p in model.named_parameters():
        gradient, values = gradients[name]
        assert p.grad is gradient, name
        assert gradient is None or torch.equal(gradient, values), name
    assert list(buffers) == [name for name, _ in model.named_buffers()]
    for name, b in model.named_buffers():
        assert b is buffers[name][0], name
        assert torch.equal(b, buffers[name][1]), name
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert (model.calls, model.log) == (0, ["made"])
    assert random.getstate() == numbers[0]
    assert (np.random.get_state()[1] == numbers[1]).all()
    assert torch.equal(torch.get_rng_state(), numbers[2])
    assert on_device is None or torch.equal(torch.cuda.get_rng_state(), on_device)
    assert fusedmlp.dispatch.backend_choice.quiet()  # nothing is recorded any more


def test_backward_still_works_for_an_earlier_forward() -> None:
    """BatchNorm in eval mode saves its statistics for backward, so their version must not change."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    y = model.eval()(torch.randn(8, 5))
    explain(model.train(), torch.randn(8, 5))
    y.sum().backward()


def test_keeps_no_tensor() -> None:
    import gc
    import weakref

    model, x = nn.MLP(5, [4], 3), torch.randn(8, 5)
    alive = weakref.ref(x)
    explanation = explain(model, x)
    del x
    gc.collect()
    assert alive() is None
    assert explanation.rows
