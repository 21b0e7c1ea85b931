"""TrainStep in two launches: model, optimizer and losses are those of the ordinary loop."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_right
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fusedmlp
from fusedmlp.train import recipe, two_launches

pytestmark = pytest.mark.kernels
CROSS_ENTROPY = torch.nn.CrossEntropyLoss()

OPTIMIZERS: dict[str, Any] = {
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.fixture(autouse=True)
def forced() -> Any:
    with fusedmlp.backend("triton"):
        yield


def network(device: torch.device, *, flatten: bool = False) -> torch.nn.Sequential:
    layers = [
        torch.nn.Linear(20, 17),
        torch.nn.ReLU(),
        torch.nn.Linear(17, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 5),
    ]
    return torch.nn.Sequential(*([torch.nn.Flatten()] if flatten else []), *layers).to(device)


def batch(device: torch.device, rows: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 20, device=device), torch.randint(0, 5, (rows,), device=device)


def twins(model: torch.nn.Module, make: Any) -> list[tuple[torch.nn.Module, torch.optim.Optimizer]]:
    """Our model, PyTorch's in float32 and PyTorch's in float64, each with its optimizer."""
    models = [model, copy.deepcopy(model), copy.deepcopy(model).double()]
    return [(one, make(one.parameters())) for one in models]


def loop(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Any, x: Any, y: Any
) -> torch.Tensor:
    optimizer.zero_grad()
    dtype = next(model.parameters()).dtype
    loss = loss_fn(model(x.to(dtype)), y.to(dtype) if y.is_floating_point() else y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def assert_same(three: list[tuple[torch.nn.Module, torch.optim.Optimizer]]) -> None:
    """Our parameters and optimizer state are as near to float64 as PyTorch's."""
    floor = 32 * torch.finfo(torch.float32).eps
    for parts in zip(*(model.parameters() for model, _ in three), strict=True):
        assert_right(*(p.detach() for p in parts), floor=floor)
        states = [optimizer.state[p] for p, (_, optimizer) in zip(parts, three, strict=True)]
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            if name == "step":
                assert value == states[1][name]
            elif value is not None:
                assert_right(value, states[1][name], states[2][name], name, floor=floor)


def taken(step: fusedmlp.TrainStep, x: torch.Tensor, y: torch.Tensor) -> bool:
    return step.explain(x, y).startswith("Two launches")


@pytest.mark.parametrize(
    "loss_fn", [torch.nn.CrossEntropyLoss(), torch.nn.functional.mse_loss], ids=["ce", "mse"]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_then_the_ordinary_loop(optimizer: str, loss_fn: Any, device: torch.device) -> None:
    """The first step is PyTorch's if it makes the optimizer's state. The last one is the ordinary loop's."""
    three = twins(network(device), OPTIMIZERS[optimizer])
    step = fusedmlp.TrainStep(three[0][0], loss_fn, three[0][1])
    for i in range(5):
        x, y = batch(device, 12 - i)
        y = y if isinstance(loss_fn, torch.nn.Module) else torch.randn(len(x), 5, device=device)
        assert taken(step, x, y) == (i > 0 or optimizer == "plain SGD")
        losses = [loop(*pair, loss_fn, x, y) for pair in three[1:]]
        ours = step(x, y) if i < 4 else loop(*three[0], loss_fn, x, y)
        assert ours.shape == ()
        assert not ours.requires_grad
        assert_right(ours, *losses, floor=1e-5)
    assert_same(three)


@pytest.mark.parametrize("optimizer", ["plain SGD", "SGD"])
def test_the_learning_rate_is_read_at_every_step(optimizer: str, device: torch.device) -> None:
    three = twins(network(device), OPTIMIZERS[optimizer])
    step = fusedmlp.TrainStep(three[0][0], torch.nn.functional.cross_entropy, three[0][1])
    schedulers = [torch.optim.lr_scheduler.StepLR(made, 1, gamma=0.3) for _, made in three]
    with warnings.catch_warnings():
        # A scheduler warns if it believes that the optimizer has not stepped.
        warnings.filterwarnings("error", message="Detected call of")
        for _ in range(4):
            x, y = batch(device)
            for pair in three[1:]:
                loop(*pair, torch.nn.functional.cross_entropy, x, y)
            step(x, y)
            for scheduler in schedulers:
                scheduler.step()
    assert taken(step, x, y)
    assert_same(three)


def test_groups_of_parameters(device: torch.device) -> None:
    """Biases have no weight decay, except the last one, which has another learning rate."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        p = list(parameters)
        groups = [{"params": p[::2]}, {"params": p[1:5:2], "weight_decay": 0.0}, {"params": p[5:], "lr": 0.3}]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.2)

    three = twins(network(device), make)
    step = fusedmlp.TrainStep(three[0][0], torch.nn.functional.cross_entropy, three[0][1])
    for _ in range(3):
        x, y = batch(device)
        for pair in three[1:]:
            loop(*pair, torch.nn.functional.cross_entropy, x, y)
        step(x, y)
    assert taken(step, x, y)
    assert_same(three)


def test_weights_that_somebody_else_changes(device: torch.device) -> None:
    """A step keeps no copy of the weights, not even the one rounded to half precision."""
    model = network(device)
    step = fusedmlp.TrainStep(
        model,
        torch.nn.functional.cross_entropy,
        OPTIMIZERS["plain SGD"](model.parameters()),
        compute_dtype=torch.bfloat16,
    )
    x, y = batch(device)
    step(x, y)
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(step(x, y), torch.tensor(5.0, device=device).log())


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("pixels", [True, False], ids=["uint8", "float"])
def test_epochs(pixels: bool, optimizer: str, device: torch.device) -> None:
    """Three epochs, each with a short last batch and another learning rate."""
    three = twins(network(device, flatten=True), OPTIMIZERS[optimizer])
    images = torch.randn(40, 4, 5, device=device)
    if pixels:
        images = torch.randint(0, 256, images.shape, dtype=torch.uint8, device=device)
    labels = torch.randint(0, 5, (40,), device=device)
    step = fusedmlp.TrainStep(three[0][0], torch.nn.functional.cross_entropy, three[0][1])
    for epoch in range(3):
        for _, optimizer_ in three:
            optimizer_.param_groups[0]["lr"] = 0.01 / (1 + epoch)
        order = torch.randperm(40, generator=torch.Generator(device).manual_seed(epoch), device=device)
        losses = []
        for model, optimizer_ in three[1:]:
            batches = []
            for rows in order.split(18):
                x = images[rows].double() / 255 if pixels else images[rows]
                batches.append(loop(model, optimizer_, torch.nn.functional.cross_entropy, x, labels[rows]))
            losses.append(torch.stack(batches))
        ours = step.epoch(images, labels, 18, generator=torch.Generator(device).manual_seed(epoch))
        assert ours.shape == (3,)
        assert_right(ours, *losses, floor=1e-5)
    assert_same(three)


def test_an_epoch_goes_in_two_launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes two launches, except the one that makes the optimizer's state."""
    from fusedmlp.kernels.train_step import step as kernels

    launched: list[tuple[int, int]] = []
    train_step = kernels.train_step

    def noted(job: Any, first: int, rows: int, *rest: Any, **options: Any) -> None:
        launched.append((first, rows))
        train_step(job, first, rows, *rest, **options)

    monkeypatch.setattr(kernels, "train_step", noted)
    model = network(device)
    step = fusedmlp.TrainStep(
        model, torch.nn.functional.cross_entropy, OPTIMIZERS["Adam"](model.parameters())
    )
    x, y = batch(device, 40)
    for _ in range(2):
        step.epoch(x, y, 18)
    step.epoch(x, y, 18, drop_last=True)
    expected = [(0, 18), (18, 4), (0, 18), (18, 18), (36, 4), (0, 18), (18, 18)]
    assert launched == expected if device.type == "cpu" else launched[:5] == expected[:5]


def test_other_batch_sizes(device: torch.device) -> None:
    """Epochs of smaller and larger batches, with single steps in between, match the loop."""
    three = twins(network(device), OPTIMIZERS["SGD"])
    x, y = batch(device, 40)
    step = fusedmlp.TrainStep(three[0][0], torch.nn.functional.cross_entropy, three[0][1])
    for size in (18, 7, 40, 100, 12):
        order = torch.randperm(40, generator=torch.Generator(device).manual_seed(size), device=device)
        for pair in three[1:]:
            for rows in [*order.split(size), order[:9]]:
                loop(*pair, torch.nn.functional.cross_entropy, x[rows], y[rows])
        losses = step.epoch(x, y, size, generator=torch.Generator(device).manual_seed(size))
        assert losses.shape == (-(-40 // size),)
        step(x[order[:9]], y[order[:9]])
    assert_same(three)


def test_what_a_step_leaves_behind(device: torch.device) -> None:
    """A step leaves no gradients, and autograd knows that the parameters have changed."""
    model = network(device)
    step = fusedmlp.TrainStep(
        model, torch.nn.functional.cross_entropy, OPTIMIZERS["plain SGD"](model.parameters())
    )
    x, y = batch(device)
    # This graph needs the weights but not their gradients, else the step would take another route.
    model.requires_grad_(False)
    later = model(x.clone().requires_grad_()).sum()
    model.requires_grad_(True)
    given = x.clone(), y.clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert taken(step, x, y)
    step(x, y)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(x, given[0])
    assert torch.equal(y, given[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


def test_why_not(device: torch.device) -> None:
    x, y = batch(device)
    model = network(device)
    sgd = OPTIMIZERS["plain SGD"](model.parameters())
    cross_entropy = torch.nn.functional.cross_entropy

    def reason(
        x: torch.Tensor = x, y: torch.Tensor = y, model: Any = model, optimizer: Any = sgd, **how: Any
    ) -> str:
        step = fusedmlp.TrainStep(model, cross_entropy, optimizer, **how)
        text = step.explain(x, y)
        assert text.startswith("Ordinary")
        return text.split("Not in two launches: ")[1]

    assert "Gradients are clipped" in reason(clip_grad_norm=1.0)
    assert "accumulated" in reason(accumulate=2)
    assert "GradScaler" in reason(scaler=torch.amp.GradScaler(device.type, enabled=False))
    assert "20 columns" in reason(x=x[:, :7])
    assert "float64" in reason(x=x.double())
    double = network(device).double()
    assert "float64" in reason(model=double, optimizer=OPTIMIZERS["plain SGD"](double.parameters()))
    assert "uint8" in reason(x=x.to(torch.uint8))
    assert "y is" in reason(y=y[:3])
    assert "empty" in reason(x=x[:0], y=y[:0])
    wide = torch.nn.Sequential(torch.nn.Linear(20, 300), torch.nn.ReLU(), torch.nn.Linear(300, 5)).to(device)
    assert "300 outputs" in reason(model=wide, optimizer=OPTIMIZERS["plain SGD"](wide.parameters()))
    bare = torch.nn.Sequential(torch.nn.Linear(20, 5, bias=False)).to(device)
    assert "no bias" in reason(model=bare, optimizer=OPTIMIZERS["plain SGD"](bare.parameters()))
    tensor = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    assert "is a tensor" in reason(optimizer=tensor)
    p = list(model.parameters())
    mixed = torch.optim.SGD([{"params": p[:3]}, {"params": p[3:], "momentum": 0.9}], lr=0.1)
    mixed.step()
    for parameter in p:
        mixed.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    assert "momentum" in reason(optimizer=mixed)
    assert "no state yet" in reason(optimizer=OPTIMIZERS["Adam"](p))
    with fusedmlp.backend("torch"):
        found = recipe.recipe_of(model, cross_entropy, sgd)
        assert "backend('torch')" in (two_launches.why_not(found, x, y, None) or "")


class Labels(torch.Tensor):
    pass


def numbers(device: torch.device, **how: Any) -> torch.Tensor:
    return torch.randn(12, 5, device=device, **how)


UNUSUAL: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "x with a gradient": (lambda to: {"x": batch(to)[0].requires_grad_()}, "requires grad"),
    "y with a gradient": (lambda to: {"y": numbers(to).requires_grad_()}, "requires grad"),
    "x of three dimensions": (lambda to: {"x": batch(to)[0].view(12, 4, 5)}, "is not a batch of rows"),
    "y elsewhere": (lambda to: {"y": batch(to)[1].to("meta")}, "on one device"),
    "the model elsewhere": (lambda to: {"model": network(torch.device("meta"))}, "is on meta"),
    "y a subclass": (lambda to: {"y": batch(to)[1].as_subclass(Labels)}, "on one device"),
    "y int32": (lambda to: {"y": batch(to)[1].int()}, "torch.int32"),
    "y probabilities": (lambda to: {"y": numbers(to).softmax(1), "loss_fn": CROSS_ENTROPY}, "class numbers"),
    "y float64": (lambda to: {"y": numbers(to, dtype=torch.float64)}, "torch.float64"),
    "y of one column": (lambda to: {"y": numbers(to)[:, :1]}, "not like the output"),
    "y sparse": (lambda to: {"y": numbers(to).to_sparse()}, "sparse"),
    "y a lazy negative": (lambda to: {"y": numbers(to, dtype=torch.cfloat).conj().imag}, "lazy negative"),
    "a parameter at an odd place": (lambda to: {"model": at_an_odd_place(network(to))}, "16 bytes"),
}


def at_an_odd_place(model: torch.nn.Sequential) -> torch.nn.Sequential:
    memory = torch.empty(18, device=model[0].bias.device)
    model[0].bias.data = memory[1:].copy_(model[0].bias.data)
    return model


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_arguments_take_the_ordinary_step(name: str, device: torch.device) -> None:
    """The result or the error is the same as in the loop."""
    make, reason = UNUSUAL[name]
    given = dict(zip(("x", "y"), batch(device), strict=True)) | {"model": network(device)} | make(device)
    x, y, model = given["x"], given["y"], given["model"]
    loss_fn = given.get("loss_fn") or (torch.nn.functional.mse_loss if y.dim() > 1 else CROSS_ENTROPY)
    twin = copy.deepcopy(model)
    if name == "a parameter at an odd place":
        twin = at_an_odd_place(twin)
    optimizer, twins = (OPTIMIZERS["plain SGD"](m.parameters()) for m in (model, twin))
    step = fusedmlp.TrainStep(model, loss_fn, optimizer)
    said = step.explain(x, y)
    assert said.startswith("Ordinary"), said
    assert reason in said.split("Not in two launches: ")[1], said
    try:
        twins.zero_grad()
        loss = loss_fn(twin(x), y)
        loss.backward()
        twins.step()
    except Exception as error:
        with pytest.raises(type(error)):
            step(x, y)
    else:
        assert_close(step(x, y), loss.detach())
    if not model[0].weight.is_meta:
        assert_close(model.state_dict(), twin.state_dict())


LISTENING: dict[str, tuple[Callable[[str], Any], str]] = {
    "autocast": (lambda kind: torch.autocast(kind, torch.bfloat16), "Autocast"),
    "anomaly detection": (lambda kind: torch.autograd.set_detect_anomaly(True, check_nan=False), "Anomaly"),
    "a mode": (lambda kind: TorchDispatchMode(), "TorchDispatchMode"),
    "hooks on what is saved": (lambda kind: torch.autograd.graph.save_on_cpu(), "saved tensors"),
    "no_grad": (lambda kind: torch.no_grad(), "Grad mode is off"),
    "inference mode": (lambda kind: torch.inference_mode(), "Grad mode is off"),
}


@pytest.mark.parametrize("name", LISTENING)
def test_hooks_and_modes_take_the_ordinary_step(name: str, device: torch.device) -> None:
    model, (x, y) = network(device), batch(device)
    step = fusedmlp.TrainStep(model, CROSS_ENTROPY, OPTIMIZERS["plain SGD"](model.parameters()))
    make, reason = LISTENING[name]
    with make(device.type):
        said = step.explain(x, y)
    assert said.startswith("Ordinary"), said
    assert reason in said.split("Not in two launches: ")[1], said
    assert taken(step, x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_replayed_epochs_follow_what_changes(optimizer: str, device: torch.device) -> None:
    """From the third epoch on a graph is replayed. It follows new learning rates, new data in the same memory
    and loaded parameters."""
    three = twins(network(device), OPTIMIZERS[optimizer])
    x, y = batch(device, 100)
    step = fusedmlp.TrainStep(three[0][0], torch.nn.functional.cross_entropy, three[0][1])
    for epoch in range(6):
        if epoch == 3:
            x.normal_()
        if epoch == 4:
            state = {k: v / 2 for k, v in three[0][0].state_dict().items()}
            for model, _ in three:
                model.load_state_dict(state)
        for _, optimizer_ in three:
            optimizer_.param_groups[0]["lr"] = 0.01 / (1 + epoch)
        order = torch.randperm(100, generator=torch.Generator(device).manual_seed(epoch), device=device)
        for pair in three[1:]:
            for rows in order.split(18):
                loop(*pair, torch.nn.functional.cross_entropy, x[rows], y[rows])
        step.epoch(x, y, 18, generator=torch.Generator(device).manual_seed(epoch))
    assert step._two_launches._captured is not None
    assert_same(three)
