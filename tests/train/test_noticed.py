"""Autograd's version checks notice what a step writes, and hooks on graph nodes are called."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from card import Card
from torch import nn
from training import (
    CROSS_ENTROPY,
    MSE,
    OPTIMIZERS,
    Twins,
    assert_close,
    assert_counted,
    batches,
    mlp,
    versions,
    written,
)

import fusedmlp

OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "clipped": {"clip_grad_norm": 0.1},
    "accumulated": {"accumulate": 2},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", [*OPTIMIZERS, "Adam, foreach", "AdamW, foreach"])
@pytest.mark.parametrize("route", ["Direct", "Ordinary"])
def test_every_written_tensor_gets_a_new_version(route: str, name: str, options: str) -> None:
    """This includes optimizers whose fused form in PyTorch raises no versions."""
    kinds = {
        "Adam, foreach": lambda p: torch.optim.Adam(p, foreach=True),
        "AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    }
    model = mlp() if route == "Direct" else mlp().append(nn.Tanh())
    twins = Twins(model, (OPTIMIZERS | kinds)[name], CROSS_ENTROPY, **OPTIONS[options])
    for x, y in batches(4):
        twins.step(x, y)
    tensors = written(twins.model, twins.optimizer)
    before = versions(tensors)
    for x, y in batches(2):
        assert twins.step.explain(x, y).startswith(route)
        twins.step(x, y)
    assert_counted(before, tensors)


@pytest.mark.parametrize("name", ["SGD", "SGD, momentum", "Adam", "AdamW", "Adam, fused"])
def test_an_older_graph_is_not_run_backward_on_newer_values(name: str) -> None:
    """The graph needs the weights but not their gradients, as a GAN's does through a frozen discriminator."""
    twins = Twins(mlp(), OPTIMIZERS[name])
    twins.train(batches(2), "Direct")
    twins.model.requires_grad_(False)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    loss = twins.model(x).square().sum()
    twins.model.requires_grad_(True)
    twins.train(batches(1), "Direct")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["SGD, momentum", "AdamW"])
@pytest.mark.parametrize("epoch", [False, True])
def test_two_launches_raise_versions(name: str, epoch: bool, device: torch.device) -> None:
    model = mlp(widths=(12, 16, 5), dtype=torch.float32).to(device)
    optimizer = OPTIMIZERS[name](model.parameters())
    step = fusedmlp.TrainStep(model, CROSS_ENTROPY, optimizer)
    x, y = torch.randn(6, 12, device=device), torch.randint(0, 5, (6,), device=device)
    with fusedmlp.backend("triton"):
        step(x, y)
        tensors = written(model, optimizer)
        before = versions(tensors)
        assert step.explain(x, y).startswith("Two launches")
        _ = step.epoch(x, y, 4) if epoch else step(x, y)
    assert_counted(before, tensors)


# --- hooks on AccumulateGrad nodes ---


@pytest.fixture(params=["register_hook", "register_prehook", "view_as"])
def hooked(request: pytest.FixtureRequest) -> Callable[[nn.Parameter, list[int]], Any]:
    """Adds a hook to a parameter's node, and returns the node, which the caller must hold."""

    def add(parameter: nn.Parameter, calls: list[int]) -> Any:
        if request.param == "view_as":
            node: Any = parameter.view_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        else:
            node = torch.autograd.graph.get_gradient_edge(parameter).node
        method = "register_prehook" if request.param == "register_prehook" else "register_hook"
        getattr(node, method)(lambda *gradients: calls.append(1))
        return node

    return add


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("which", [0, 3])
def test_a_hook_on_a_node_that_is_held_is_called(name: str, which: int, hooked: Any) -> None:
    twins = Twins(mlp(), OPTIMIZERS[name])
    twins.train(batches(2), "Direct")
    calls: list[list[int]] = [[], []]
    nodes = [
        hooked(list(model.parameters())[which], called)
        for model, called in zip((twins.model, twins.twin), calls, strict=True)
    ]
    twins.train(batches(3), "Ordinary")
    assert len(calls[0]) == len(calls[1]) == 3
    assert "AccumulateGrad" in twins.step.explain(*batches(1)[0])
    nodes.clear()  # the hooks go with the nodes, in PyTorch too
    twins.train(batches(2), "Direct")
    assert len(calls[0]) == len(calls[1]) == 3
    twins.assert_same()


def test_a_graph_that_is_held_holds_the_nodes() -> None:
    """Detached tensors, and views made under no_grad, do not hold them."""
    twins = Twins(mlp(), OPTIMIZERS["SGD"])
    twins.train(batches(2), "Direct")
    weight = twins.model[0].weight
    with torch.no_grad():
        others = [weight.detach(), weight.data, weight.view(-1), weight.t(), weight[1]]
    twins.train(batches(2), "Direct")
    held = twins.model(batches(1)[0][0])
    twins.train(batches(1), "Ordinary")
    del held
    twins.train(batches(1), "Direct")
    assert len(others) == 5


@pytest.mark.kernels
def test_neither_two_launches_nor_a_graph_pass_over_a_node(
    hooked: Any, card: Card, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedmlp.torch_tools import cuda_graph
    from fusedmlp.train import graph_step

    model = mlp(dtype=torch.float32).to(device)
    step = fusedmlp.TrainStep(model, MSE, OPTIMIZERS["SGD"](model.parameters()))
    x, y = torch.randn(6, 7, device=device), torch.randn(6, 5, device=device)
    monkeypatch.setattr(cuda_graph, "why_not_capture", lambda: None)

    def reasons() -> list[str | None]:
        with fusedmlp.backend("triton"):
            route, _, refused = step._route(x, y)
        two = refused.get("in two launches")
        assert (two is None) == (route == "in two launches")
        return [two, graph_step.why_not(model, MSE, step._optimizer, x, y)]

    assert reasons() == [None, None]
    node = hooked(model[2].bias, [])
    assert all(reason is not None and "AccumulateGrad" in reason for reason in reasons())
    del node
    assert reasons() == [None, None]


def test_two_networks_that_train_in_turn_as_a_gan() -> None:
    """Each network has its optimizer, and one graph goes through both. The results match the loop's."""

    def gan(fused: bool) -> list[Any]:
        torch.manual_seed(7)
        maker, judge = mlp(widths=(3, 8, 4)), mlp(widths=(4, 8, 1))
        of_maker = torch.optim.Adam(maker.parameters(), lr=1e-2)
        of_judge = torch.optim.Adam(judge.parameters(), lr=1e-2)
        step = fusedmlp.TrainStep(judge, MSE, of_judge)
        for _ in range(3):
            noise, real = torch.randn(5, 3).double(), torch.randn(5, 4).double()
            fake = maker(noise)
            x, y = torch.cat([fake.detach(), real]), torch.cat([torch.zeros(5, 1), torch.ones(5, 1)]).double()
            if fused:
                step(x, y)
            else:
                of_judge.zero_grad()
                MSE(judge(x), y).backward()
                of_judge.step()
            of_maker.zero_grad()
            judge.requires_grad_(False)
            MSE(judge(fake), torch.ones(5, 1).double()).backward()
            judge.requires_grad_(True)
            of_maker.step()
        return [copy.deepcopy(m.state_dict()) for m in (maker, judge)]

    assert_close(gan(True), gan(False))
