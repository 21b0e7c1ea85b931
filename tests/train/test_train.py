"""TrainStep gives the plain loop's losses, parameters and optimizer state, whatever changes."""

import copy
import gc
import io
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training import CROSS_ENTROPY, MSE, OPTIMIZERS, Twins, assert_close, batches, mlp, plain

import fusedmlp


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_direct_step_matches_the_plain_loop(name: str, bias: bool) -> None:
    twins = Twins(mlp(bias=bias), OPTIMIZERS[name])
    twins.train(batches(12), "Direct")
    twins.assert_same()


@pytest.mark.parametrize("loss_fn", [CROSS_ENTROPY, F.cross_entropy, MSE, F.mse_loss])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_losses(name: str, loss_fn: Any) -> None:
    twins = Twins(mlp(), OPTIMIZERS[name], loss_fn)
    data = batches(5)
    if loss_fn in (MSE, F.mse_loss):
        data = [(x, torch.randn(len(x), 5, dtype=x.dtype)) for x, _ in data]
    twins.train(data, "Direct")
    twins.assert_same()


@pytest.mark.parametrize(
    "build",
    [
        lambda: fusedmlp.MLP(7, [9], 5, dtype=torch.float64),
        lambda: fusedmlp.nn.Sequential(fusedmlp.LinearReLU(7, 9), fusedmlp.Linear(9, 5)).double(),
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(7, 9), nn.ReLU(inplace=True)), nn.Linear(9, 5)
        ).double(),
        lambda: nn.Sequential(nn.Identity(), nn.Linear(7, 5)).double(),
        lambda: nn.Linear(7, 5).double(),
    ],
)
def test_models(build: Any) -> None:
    twins = Twins(build(), OPTIMIZERS["SGD"])
    twins.train(batches(3), "Direct")
    twins.assert_same()


def test_flatten() -> None:
    twins = Twins(nn.Sequential(nn.Flatten(), *mlp(widths=(12, 9, 5))), OPTIMIZERS["SGD"])
    data = [(torch.randn(6, 1, 3, 4, dtype=torch.float64), torch.randint(0, 5, (6,))) for _ in range(3)]
    twins.train(data, "Direct")
    twins.assert_same()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_over_200_steps(name: str) -> None:
    """The bound is the package's for float32, 1e-4. A ReLU that rounding switches takes up part of it."""
    twins = Twins(mlp(dtype=torch.float32, widths=(20, 16, 10)), OPTIMIZERS[name])
    x = torch.randn(64, 20)
    y = (x @ torch.randn(20, 10)).argmax(1)
    for _ in range(200):
        rows = torch.randperm(64)[:32]
        ours, theirs = twins.step(x[rows], y[rows]), twins.plain(x[rows], y[rows])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_switch_to_the_plain_loop_and_back(name: str) -> None:
    twins = Twins(mlp(), OPTIMIZERS[name])
    twins.train(batches(4), "Direct")
    for x, y in batches(4):
        assert_close(plain(twins.model, CROSS_ENTROPY, twins.optimizer, x, y), twins.plain(x, y))
    twins.train(batches(4), "Direct")
    twins.assert_same()


@pytest.mark.parametrize("name", ["SGD", "SGD, momentum", "Adam"])
def test_checkpoint_continues_in_the_plain_loop(name: str) -> None:
    twins = Twins(mlp(), OPTIMIZERS[name])
    twins.train(batches(4))
    file = io.BytesIO()
    torch.save((twins.model.state_dict(), twins.optimizer.state_dict()), file)
    file.seek(0)
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    state, optimizer_state = torch.load(file)
    model.load_state_dict(state)
    optimizer.load_state_dict(optimizer_state)
    for x, y in batches(4):
        assert_close(plain(model, CROSS_ENTROPY, optimizer, x, y), twins.plain(x, y))


@pytest.mark.parametrize("name", ["SGD", "SGD, momentum", "Adam"])
def test_load_state_dict_is_noticed(name: str) -> None:
    twins = Twins(mlp(), OPTIMIZERS[name])
    states = copy.deepcopy((twins.model.state_dict(), twins.optimizer.state_dict()))
    twins.train(batches(4))
    later = copy.deepcopy(twins.optimizer.state_dict())
    for model, optimizer in ((twins.model, twins.optimizer), (twins.twin, twins.twins)):
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
    twins.train(batches(3), "Direct")
    for optimizer in (twins.optimizer, twins.twins):
        optimizer.load_state_dict(copy.deepcopy(later))
    twins.train(batches(3), "Direct")
    twins.assert_same()


@pytest.mark.parametrize("name", ["SGD", "SGD, momentum", "Adam"])
def test_scheduler(name: str) -> None:
    """Each step uses the current learning rate, and the scheduler sees that the optimizer has stepped."""
    twins = Twins(mlp(), OPTIMIZERS[name])
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)
        for optimizer in (twins.optimizer, twins.twins)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(8):
            twins.train([batch])
            for scheduler in schedulers:
                scheduler.step()
    assert twins.step.explain(*batch).startswith("Direct")
    twins.assert_same()


def test_scheduler_knows_of_a_direct_first_step() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = fusedmlp.TrainStep(model, CROSS_ENTROPY, optimizer)
    (batch,) = batches(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(*batch)
        scheduler.step()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("SGD", {"lr": 0.01}),
        ("SGD", {"lr": 0.0}),
        ("SGD", {"lr": torch.tensor(0.02, dtype=torch.float64)}),
        ("SGD", {"weight_decay": 0.5}),
        ("SGD", {"lr": 0.5, "weight_decay": 2.0}),
        ("SGD", {"momentum": 0.5}),
        ("SGD, momentum", {"momentum": 0.0}),
        ("SGD, momentum", {"nesterov": True}),
        ("Adam", {"lr": 0.5, "weight_decay": 0.1}),
        ("Adam", {"lr": torch.tensor(0.02, dtype=torch.float64)}),
        ("Adam", {"betas": (0.5, 0.6)}),
        ("Adam", {"eps": 0.1}),
        ("AdamW", {"weight_decay": 0.0}),
        ("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ],
)
def test_edit_of_a_group_is_noticed(name: str, change: dict[str, Any]) -> None:
    twins = Twins(mlp(), OPTIMIZERS[name])
    twins.train(batches(2))
    for optimizer in (twins.optimizer, twins.twins):
        optimizer.param_groups[0].update(change)
    twins.train(batches(3), "Direct")
    twins.assert_same()


@pytest.mark.parametrize("name", ["SGD, weight decay", "SGD, momentum", "Adam", "AdamW"])
def test_parameter_groups(name: str) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        groups = [
            {"params": [p for p in parameters if p.dim() == 2]},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0, "lr": 0.003},
        ]
        return OPTIMIZERS[name](groups)

    twins = Twins(mlp(), make)
    twins.train(batches(5), "Direct")
    twins.assert_same()


def test_changed_batches_and_modes() -> None:
    twins = Twins(mlp(), OPTIMIZERS["Adam"])
    for rows in (6, 1, 13, 6):
        twins.train(batches(1, rows))
    for model in (twins.model, twins.twin):
        model.eval()
    twins.train(batches(2), "Direct")
    twins.assert_same()


def test_changed_dtype() -> None:
    twins = Twins(mlp(dtype=torch.float32), OPTIMIZERS["SGD"])
    for x, y in batches(2, dtype=torch.float32):
        twins.step(x, y)
    twins.model.double()
    twins.twin.load_state_dict(twins.model.state_dict())
    twins.twin.double().load_state_dict(twins.model.state_dict())
    twins.train(batches(3), "Direct")
    twins.assert_same()


@pytest.mark.parametrize("name", ["SGD", "SGD, momentum", "Adam"])
def test_freezing_and_unfreezing(name: str) -> None:
    twins = Twins(mlp(), OPTIMIZERS[name])
    twins.train(batches(2), "Direct")
    for model in (twins.model, twins.twin):
        model[0].requires_grad_(False)
    twins.train(batches(2), "Ordinary")
    twins.assert_same()
    for model in (twins.model, twins.twin):
        model[0].requires_grad_(True)
    twins.train(batches(2), "Direct")
    twins.assert_same()


def test_values_written_past_the_version_counter() -> None:
    """Writes by .data, through numpy and by a fused optimizer do not raise a tensor's version."""
    twins = Twins(mlp(), OPTIMIZERS["SGD, fused"])
    twins.train(batches(2))
    for model in (twins.model, twins.twin):
        model[0].weight.data.mul_(0.5)
        model[2].weight.detach().numpy()[:] *= 0.5
        model[4].weight.data = model[4].weight.data * 0.5
        assert model[2].weight.grad is None or model is twins.twin
    twins.train(batches(3), "Direct")
    twins.assert_same()


def test_replaced_parameter_is_noticed() -> None:
    twins = Twins(mlp(), OPTIMIZERS["SGD"])
    twins.train(batches(2))
    new = torch.randn(9, 7, dtype=torch.float64)
    for model in (twins.model, twins.twin):
        model[0].weight = nn.Parameter(new.clone())
    twins.train(batches(2), "Ordinary")
    for optimizer, model in ((twins.optimizer, twins.model), (twins.twins, twins.twin)):
        optimizer.param_groups[0]["params"][0] = model[0].weight
    twins.train(batches(2), "Direct")
    twins.assert_same()


def test_gradients_and_arguments_afterwards() -> None:
    twins = Twins(mlp(), OPTIMIZERS["SGD"])
    ((x, y),) = batches(1)
    F.cross_entropy(twins.model(x), y).backward()  # old gradients, which zero_grad drops
    before = x.clone(), y.clone()
    loss = twins.step(x, y)
    assert all(p.grad is None for p in twins.model.parameters())
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert not loss.requires_grad
    assert loss.dim() == 0
    twins.plain(x, y)
    twins.assert_same()


def test_result_used_twice_in_a_model() -> None:
    """Masking a gradient in place would go wrong here."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = fusedmlp.LinearReLU(7, 7).double(), nn.Linear(7, 5).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.inner(x)
            return self.outer(hidden + self.inner(hidden) * hidden)

    twins = Twins(Residual(), OPTIMIZERS["SGD"])
    twins.train(batches(4), "Ordinary")
    twins.assert_same()


@pytest.mark.parametrize("name", ["SGD", "SGD, weight decay", "SGD, momentum", "Adam"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_nan_and_infinity_go_where_they_go_in_pytorch(name: str, value: float) -> None:
    twins = Twins(mlp(), OPTIMIZERS[name])
    twins.train(batches(2))
    data = batches(3)
    data[1][0][2, 3] = value
    twins.train(data, "Direct")
    for ours, theirs in zip(twins.model.parameters(), twins.twin.parameters(), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
    twins.assert_same()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_relu_at_0_stops_a_gradient_of_nan(value: float) -> None:
    """The gradient is 0 where a ReLU's output is 0. `grad * (y > 0)` would be NaN, as NaN times 0 is."""
    twins = Twins(mlp(widths=(7, 9, 5)), OPTIMIZERS["SGD"])
    for model in (twins.model, twins.twin):
        with torch.no_grad():
            model[0].bias[:4] = -100.0  # these units output 0 for every input
            model[2].weight[0, 5] = value
    twins.train(batches(1), "Direct")
    assert twins.twin[0].weight[:4].isfinite().all()
    assert twins.twin[0].weight[4:].isnan().any()
    twins.assert_same()


def test_learning_rate_0_lets_nan_through() -> None:
    twins = Twins(mlp(), lambda p: torch.optim.SGD(p, lr=0.0))
    ((x, y),) = batches(1)
    twins.train([(x.fill_(float("nan")), y)], "Direct")
    assert twins.twin[0].weight.isnan().all()
    twins.assert_same()


@pytest.mark.parametrize("ignored", [1, 6])
def test_ignore_index(ignored: int) -> None:
    twins = Twins(mlp(), OPTIMIZERS["SGD"])
    data = batches(2)
    data[0][1][:ignored] = -100
    twins.train(data, "Direct")
    twins.assert_same()


def test_invalid_class_raises_and_changes_nothing() -> None:
    twins = Twins(mlp(), OPTIMIZERS["Adam"])
    twins.train(batches(2), "Direct")
    ((x, y),) = batches(1)
    y[3] = 5
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        twins.step(x, y)
    twins.assert_same()
    twins.train(batches(2), "Direct")


def test_wrong_arguments_raise_what_the_model_raises() -> None:
    twins = Twins(mlp(), OPTIMIZERS["SGD"])
    ((x, y),) = batches(1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        twins.step(x[:, :5], y)
    with pytest.raises(ValueError, match="batch_size"):
        twins.step(x, y[:4])
    with pytest.raises(RuntimeError, match="dtype"):
        twins.step(x.float(), y)
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        twins.step(x, y)
    twins.assert_same()


def accumulated(twins: Twins, data: Any, every: int, clip: float | None) -> list[torch.Tensor]:
    """The plain loop with gradient accumulation and clipping."""
    losses = []
    for i, (x, y) in enumerate(data):
        if i % every == 0:
            twins.twins.zero_grad()
        loss = twins.loss_fn(twins.twin(x), y)
        (loss / every).backward()
        if i % every == every - 1:
            if clip is not None:
                nn.utils.clip_grad_norm_(twins.twin.parameters(), clip)
            twins.twins.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("route", ["Direct", "Ordinary"])
@pytest.mark.parametrize(("every", "clip"), [(1, 0.05), (3, None), (3, 0.05), (1, 100.0)])
@pytest.mark.parametrize("name", ["SGD", "SGD, momentum", "Adam"])
def test_accumulation_and_clipping(name: str, every: int, clip: float | None, route: str) -> None:
    model = mlp()
    if route == "Ordinary":
        model.append(nn.Tanh())
    twins = Twins(model, OPTIMIZERS[name], clip_grad_norm=clip, accumulate=every)
    data = batches(9)
    ours = [twins.step(x, y) for x, y in data]
    assert twins.step.explain(*data[0]).startswith(route)
    assert_close(ours, accumulated(twins, data, every, clip))
    twins.assert_same()


def test_accumulation_over_a_change_of_route() -> None:
    twins = Twins(mlp(), OPTIMIZERS["Adam"], accumulate=4)
    data = batches(8)
    ours = []
    for i, (x, y) in enumerate(data):
        with torch.autograd.set_detect_anomaly(i % 2 == 0, check_nan=False):
            ours.append(twins.step(x, y))
    assert_close(ours, accumulated(twins, data, 4, None))
    twins.assert_same()


def test_scaler() -> None:
    scaler, twin_scaler = (torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) for _ in range(2))
    twins = Twins(mlp(dtype=torch.float32), OPTIMIZERS["SGD"], scaler=scaler, clip_grad_norm=0.1)
    data = batches(6, dtype=torch.float32)
    data[3][0].fill_(float("inf"))  # the scaler skips the step of this batch
    for x, y in data:
        assert "GradScaler" in twins.step.explain(x, y)
        ours = twins.step(x, y)
        twins.twins.zero_grad()
        loss = CROSS_ENTROPY(twins.twin(x), y)
        twin_scaler.scale(loss).backward()
        twin_scaler.unscale_(twins.twins)
        nn.utils.clip_grad_norm_(twins.twin.parameters(), 0.1)
        twin_scaler.step(twins.twins)
        twin_scaler.update()
        torch.testing.assert_close(ours, loss.detach(), equal_nan=True)
    assert scaler.get_scale() == twin_scaler.get_scale() != 8
    twins.assert_same()


def test_invalid_options() -> None:
    model = mlp()
    arguments = model, CROSS_ENTROPY, torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="accumulate"):
        fusedmlp.TrainStep(*arguments, accumulate=0)
    with pytest.raises(ValueError, match="clip_grad_norm"):
        fusedmlp.TrainStep(*arguments, clip_grad_norm=-1.0)
    with pytest.raises(ValueError, match="compute_dtype"):
        fusedmlp.TrainStep(*arguments, compute_dtype=torch.float16)


def test_explain_runs_nothing() -> None:
    twins = Twins(mlp(), OPTIMIZERS["Adam"])
    ((x, y),) = batches(1)
    text = twins.step.explain(x, y)
    assert text.startswith("Ordinary")
    assert "from the next step on" in text
    twins.assert_same()
    twins.train([(x, y)] * 2, "Direct")


def test_number_of_threads_is_left_alone() -> None:
    before = torch.get_num_threads()
    twins = Twins(mlp(), OPTIMIZERS["SGD"])
    twins.train(batches(2))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("loss_fn", [CROSS_ENTROPY, lambda y, target: CROSS_ENTROPY(y, target)])
def test_nothing_waits_for_the_collector_of_garbage(loss_fn: Any) -> None:
    """A step, its model and its buffers are freed once nothing refers to them."""
    gc.collect()
    gc.disable()
    try:
        model = mlp()
        step = fusedmlp.TrainStep(model, loss_fn, torch.optim.Adam(model.parameters()))
        for x, y in batches(3):
            step(x, y)
            step.explain(x, y)
        step.epoch(x, y, 4)
        parts = [weakref.ref(it) for it in (step, model, step._graphs)]
        del step, model
        assert [part() for part in parts] == [None] * 3
    finally:
        gc.enable()
