"""A step in a CUDA graph: what makes the graph stale, what rules it out and, on a GPU, its results."""

import copy
import multiprocessing
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from training import CROSS_ENTROPY, MSE, batches, plain

import fusedmlp
from fusedmlp.train import graph_step


class Net(nn.Module):
    """A model with parts that a graph bakes in: a dropout, a batch norm, a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Dropout(0.3)
        self.last = nn.Linear(9, 5)
        self.factor, self.sizes, self.activation = 2.0, [1, 2], torch.tanh

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.drop(self.activation(self.norm(self.first(x))) * self.factor))


def fused_adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01, fused=True)


def replaced(module: nn.Module) -> None:
    module.weight = nn.Parameter(module.weight.detach().clone())


def given_memory(parameter: torch.Tensor) -> None:
    parameter.data = parameter.data.clone()


Change = Callable[[Net, torch.optim.Optimizer], Any]
CHANGES: dict[str, Change] = {
    "training": lambda model, optimizer: model.eval(),
    "dropout": lambda model, optimizer: setattr(model.drop, "p", 0.5),
    "a number": lambda model, optimizer: setattr(model, "factor", 3.0),
    "a list, in place": lambda model, optimizer: model.sizes.append(3),
    "a function": lambda model, optimizer: setattr(model, "activation", torch.relu),
    "momentum of a norm": lambda model, optimizer: setattr(model.norm, "momentum", 0.5),
    "frozen": lambda model, optimizer: model.first.weight.requires_grad_(False),
    "a new parameter": lambda model, optimizer: replaced(model.first),
    "new memory": lambda model, optimizer: given_memory(model.first.weight),
    "new memory of a buffer": lambda model, optimizer: given_memory(model.norm.running_mean),
    "a new module": lambda model, optimizer: setattr(model, "last", nn.Linear(9, 5)),
    "dtype": lambda model, optimizer: model.double(),
    "a patched forward": lambda model, optimizer: setattr(model.last, "forward", lambda x: x),
    "weight decay": lambda model, optimizer: optimizer.param_groups[0].update(weight_decay=0.1),
    "betas": lambda model, optimizer: optimizer.param_groups[0].update(betas=(0.5, 0.9)),
    "a tensor for lr": lambda model, optimizer: optimizer.param_groups[0].update(lr=torch.tensor(0.1)),
    "a group": lambda model, optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
    "the optimizer's state": lambda model, optimizer: optimizer.load_state_dict(
        copy.deepcopy(optimizer.state_dict())
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_makes_a_graph_stale(name: str) -> None:
    model = Net()
    optimizer = fused_adam(model)
    for x, y in batches(2, dtype=torch.float32):
        plain(model, CROSS_ENTROPY, optimizer, x, y)

    def now() -> Any:
        return graph_step.fingerprint(model, CROSS_ENTROPY, optimizer, True)

    before = now()
    for x, y in batches(2, dtype=torch.float32):  # training does not change the fingerprint
        plain(model, CROSS_ENTROPY, optimizer, x, y)
    model.load_state_dict(model.state_dict())
    assert now() == before
    kept = [vars(module).copy() for module in model.modules()], list(model.parameters())
    CHANGES[name](model, optimizer)
    assert now() != before
    del kept


@pytest.mark.parametrize(
    ("owner", "attribute", "value"),
    [
        (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
        (torch.backends.cudnn, "benchmark", True),
        (torch.backends.cudnn, "deterministic", True),
    ],
)
def test_setting_makes_a_graph_stale(
    owner: Any, attribute: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    before = graph_step.fingerprint(model, CROSS_ENTROPY, fused_adam(model), False)
    was = getattr(owner, attribute)
    # torch.testing._internal, which other tests import, forbids setting these flags outside of such a block.
    with torch.backends.__allow_nonbracketed_mutation():
        try:
            setattr(owner, attribute, value)
            assert graph_step.fingerprint(model, CROSS_ENTROPY, fused_adam(model), False) != before
        finally:
            setattr(owner, attribute, was)
    assert graph_step.fingerprint(model, CROSS_ENTROPY, fused_adam(model), False) == before


def test_settings_of_the_loss_make_a_graph_stale() -> None:
    model = Net()
    optimizer = fused_adam(model)
    loss_fn = nn.CrossEntropyLoss()
    before = graph_step.fingerprint(model, loss_fn, optimizer, False)
    loss_fn.label_smoothing = 0.1
    assert graph_step.fingerprint(model, loss_fn, optimizer, False) != before


@pytest.mark.parametrize("groups", [1, 2])
def test_scheduler_reaches_the_tensors_that_a_graph_reads(groups: int) -> None:
    """New learning rates are written to the graph's tensors, so they do not make the graph stale."""
    model = Net()
    parts = [{"params": model.first.parameters()}, {"params": model.last.parameters(), "lr": 0.5}][:groups]
    optimizer = torch.optim.SGD(parts, lr=0.1, momentum=0.9, fused=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    values = [group["lr"] for group in optimizer.param_groups]
    rates = [torch.tensor(value) for value in values]
    before = graph_step.fingerprint(model, CROSS_ENTROPY, optimizer, True)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
        graph_step.renew(rates, values, optimizer)
        wanted = [group["lr"] for group in optimizer.param_groups]
        assert [rate.item() for rate in rates] == pytest.approx(wanted)
    assert graph_step.fingerprint(model, CROSS_ENTROPY, optimizer, True) == before


def test_groups_are_given_back_after_a_capture() -> None:
    optimizer = fused_adam(Net())
    before = dict(optimizer.param_groups[0])
    rate = torch.tensor(0.3)
    with graph_step._by_tensors(optimizer.param_groups, [rate], capturable=True):
        assert optimizer.param_groups[0]["lr"] is rate
        assert optimizer.param_groups[0]["capturable"]
    assert optimizer.param_groups[0] == before


@pytest.mark.parametrize(
    ("make", "taken"),
    [
        (lambda p: torch.optim.SGD(p, fused=True), True),
        (lambda p: torch.optim.AdamW(p, fused=True), True),
        (lambda p: torch.optim.Adam(p, capturable=True), True),
        (lambda p: torch.optim.Adam(p), False),
        (lambda p: torch.optim.SGD(p), False),
        (lambda p: torch.optim.RMSprop(p, capturable=True), False),
    ],
)
def test_optimizers_whose_step_is_captured(make: Any, taken: bool) -> None:
    optimizer = make(Net().parameters())
    assert graph_step.takes_update(optimizer) == taken
    handle = optimizer.register_step_post_hook(lambda *_: None)
    assert not graph_step.takes_update(optimizer)
    handle.remove()
    assert graph_step.takes_update(optimizer) == taken


def test_what_rules_a_graph_out_is_named() -> None:
    model = Net()
    ((x, y),) = batches(1, dtype=torch.float32)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = fused_adam(model)

    def reason() -> str | None:
        return graph_step.why_not(model, loss_fn, optimizer, x, y)

    assert reason() is None
    registrations: list[Callable[[], Any]] = [
        lambda: model.drop.register_forward_hook(print),
        lambda: model.last.register_full_backward_hook(print),
        lambda: loss_fn.register_forward_pre_hook(print),
        lambda: model.last.bias.register_hook(print),
        lambda: model.last.bias.register_post_accumulate_grad_hook(print),
        lambda: nn.modules.module.register_module_forward_hook(print),
    ]
    for register in registrations:
        handle = register()
        assert "hook" in (reason() or "")
        handle.remove()
        assert reason() is None
    model.more = nn.Parameter(torch.ones(1))
    assert "not in the optimizer" in (reason() or "")
    del model.more
    assert "requires grad" in (graph_step.why_not(model, loss_fn, optimizer, x.requires_grad_(), y) or "")


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW, capturable": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


@pytest.mark.gpu
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_graph_matches_the_plain_loop(name: str, clip: float | None, cuda: torch.device) -> None:
    """Dropout draws the same numbers as the plain loop. A scheduler steps every time, every fifth batch is
    short, and eval(), freezing and load_state_dict come in between."""
    model = Net().to(cuda)
    twin = copy.deepcopy(model)
    optimizer, twins = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    step = fusedmlp.TrainStep(model, CROSS_ENTROPY, optimizer, clip_grad_norm=clip)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, twins)]
    data = [(x.to(cuda), y.to(cuda)) for x, y in batches(30, 16, dtype=torch.float32)]
    state = copy.deepcopy(model.state_dict())
    for i, (x, y) in enumerate(data):
        if i % 5 == 4:
            x, y = x[:3], y[:3]
        if i == 10:
            model.eval()
            twin.eval()
        if i == 15:
            model.train()
            twin.train()
            model.first.requires_grad_(False)
            twin.first.requires_grad_(False)
        if i == 20:
            model.load_state_dict(state)
            twin.load_state_dict(state)
        torch.manual_seed(i)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = step(x, y)
        after = torch.cuda.get_rng_state()
        torch.manual_seed(i)
        twins.zero_grad()
        theirs = CROSS_ENTROPY(twin(x), y)
        theirs.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(twin.parameters(), clip)
        twins.step()
        for scheduler in schedulers:
            scheduler.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(after, torch.cuda.get_rng_state())
    assert step._graphs.graphs
    assert "Graph" in step.explain(x, y)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(optimizer.state.values(), twins.state.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


class Looking(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = super().forward(input)
        return output * 2 if output.sum().item() > 0 else output


def what_cannot_be_captured_runs_with_one_warning() -> None:
    cuda = torch.device("cuda")
    model = Looking(7, 5, device=cuda)
    twin = copy.deepcopy(model)
    optimizer, twins = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    step = fusedmlp.TrainStep(model, MSE, optimizer)
    x, y = torch.randn(6, 7, device=cuda), torch.randn(6, 5, device=cuda)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):
            torch.testing.assert_close(step(x, y), plain(twin, MSE, twins, x, y))
    assert len([w for w in caught if "runs without a CUDA graph" in str(w.message)]) == 1
    assert "Capturing it raised" in step.explain(x, y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    torch.randn(3, device=cuda)  # raises if the failed capture has left the generator in capture mode


@pytest.mark.gpu
def test_what_cannot_be_captured_runs_with_one_warning() -> None:
    """This runs in a process of its own, so that a capture that breaks something breaks no other test."""
    process = multiprocessing.get_context("spawn").Process(
        target=what_cannot_be_captured_runs_with_one_warning
    )
    process.start()
    process.join(300)
    assert process.exitcode == 0
