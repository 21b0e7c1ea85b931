"""TrainStep takes every optimizer of torch.optim, and raises a clear error for wrong arguments."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from training import CROSS_ENTROPY, MSE, Twins, assert_close, batches, mlp

import fusedmlp


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.1)


# --- optimizers ---

CLASSES = [
    name
    for name in torch.optim.__all__
    if isinstance(getattr(torch.optim, name), type) and name != "Optimizer"
]
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"lr": 0.1}, "LBFGS": {"lr": 0.1, "max_iter": 3}}


class Words(nn.Module):
    """A model with only sparse gradients, which SparseAdam needs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 5, sparse=True, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> Any:
        return self.table(x).sum(1)


def documented(twins: Twins, x: torch.Tensor, y: torch.Tensor, clip: float | None) -> torch.Tensor:
    """One step as torch.optim's documentation shows it, with a closure for optimizers that need one."""
    first: list[torch.Tensor] = []

    def closure() -> torch.Tensor:
        twins.twins.zero_grad()
        loss: torch.Tensor = twins.loss_fn(twins.twin(x), y)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(twins.twin.parameters(), clip)
        first.append(loss.detach())
        return loss

    if isinstance(twins.twins, (torch.optim.LBFGS, Twice)):
        twins.twins.step(closure)  # type: ignore[arg-type]
    else:
        closure()
        twins.twins.step()
    return first[0]


class Twice(torch.optim.SGD):
    """A user's optimizer that steps twice on each batch."""

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        super().step()
        with torch.enable_grad():
            loss = closure()
        super().step()
        return loss


@pytest.mark.filterwarnings("ignore:.*SparseAdam")
@pytest.mark.parametrize(
    ("name", "clip"),
    # PyTorch cannot clip sparse gradients.
    [(c, clip) for c in [*CLASSES, "Twice"] for clip in (None, 0.3) if (c, clip) != ("SparseAdam", 0.3)],
)
def test_every_optimizer_is_as_in_the_loop(name: str, clip: float | None) -> None:
    kind: Any = Twice if name == "Twice" else getattr(torch.optim, name)
    options = OPTIONS.get(name, {"lr": 0.1} if name == "Twice" else {})
    sparse = name == "SparseAdam"
    model: nn.Module = Words() if sparse else mlp(bias=name != "Muon")  # Muon takes only matrices
    twins = Twins(model, lambda p: kind(p, **options), CROSS_ENTROPY, clip_grad_norm=clip)
    for x, y in batches(4):
        x = torch.randint(0, 9, (6, 3)) if sparse else x
        assert twins.step.explain(x, y)
        loss = twins.step(x, y)
        assert_close(loss, documented(twins, x, y, clip))
        assert not loss.requires_grad
        twins.assert_same()


def test_all_classes_are_there() -> None:
    assert {"SGD", "Adam", "AdamW", "LBFGS", "SparseAdam", "Rprop", "ASGD", "Adafactor", "Muon"} <= {*CLASSES}


def test_lbfgs_in_an_epoch_and_under_a_scheduler() -> None:
    twins = Twins(mlp(), lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4))
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (twins.optimizer, twins.twins)]
    (x, y), order = batches(1, rows=12)[0], torch.randperm(12, generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        ours = twins.step.epoch(x, y, 6, torch.Generator().manual_seed(2))
        assert_close(ours, torch.stack([documented(twins, x[r], y[r], None) for r in order.split(6)]))
        for scheduler in schedulers:
            scheduler.step()
    twins.assert_same()


@pytest.mark.parametrize(
    "options", [{"accumulate": 2}, {"scaler": torch.amp.GradScaler("cpu")}], ids=["accumulate", "scaler"]
)
def test_lbfgs_with_accumulation_or_a_scaler_raises(options: dict[str, Any]) -> None:
    model = mlp()
    with pytest.raises(ValueError, match="LBFGS computes the loss several times a step"):
        fusedmlp.TrainStep(model, CROSS_ENTROPY, torch.optim.LBFGS(model.parameters()), **options)


def test_an_optimizer_that_computes_no_loss() -> None:
    class Idle(torch.optim.SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            return None

    model = mlp()
    step = fusedmlp.TrainStep(model, CROSS_ENTROPY, Idle(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="the step of Idle did not compute the loss"):
        step(*batches(1)[0])


# --- wrong arguments ---

MODEL = mlp()
OPTIMIZER = sgd(MODEL.parameters())
ARGUMENTS: dict[str, tuple[tuple[Any, Any, Any], type[Exception], str]] = {
    "optimizer before loss": (
        (MODEL, OPTIMIZER, CROSS_ENTROPY),
        TypeError,
        r"loss_fn is called .*got torch.optim.sgd.SGD; the order is TrainStep\(model, loss_fn, optimizer\)",
    ),
    "loss first": (
        (CROSS_ENTROPY, MODEL, OPTIMIZER),
        TypeError,
        "model must be a network, got a loss, .*the order is",
    ),
    "optimizer first": (
        (OPTIMIZER, MODEL, CROSS_ENTROPY),
        TypeError,
        "model must be a torch.nn.Module, got .*SGD",
    ),
    "a loss class": (
        (MODEL, nn.CrossEntropyLoss, OPTIMIZER),
        TypeError,
        r"loss_fn is the class CrossEntropyLoss; give an instance, such as CrossEntropyLoss\(\)",
    ),
    "an optimizer class": (
        (MODEL, CROSS_ENTROPY, torch.optim.Adam),
        TypeError,
        "optimizer is the class Adam; give an instance, such as SGD",
    ),
    "a model class": ((nn.Linear, CROSS_ENTROPY, OPTIMIZER), TypeError, "model is the class Linear"),
    "a function for a model": (
        (torch.relu, CROSS_ENTROPY, OPTIMIZER),
        TypeError,
        "model must be a torch.nn.Module",
    ),
    "a loss by name": ((MODEL, "mse", OPTIMIZER), TypeError, "got str; the order is"),
    "a loss that is None": ((MODEL, None, OPTIMIZER), TypeError, "got NoneType"),
    "parameters for an optimizer": (
        (MODEL, MSE, list(MODEL.parameters())),
        TypeError,
        "optimizer must be one of torch.optim's or like it, got list; the order is",
    ),
    "a scheduler for an optimizer": (
        (MODEL, MSE, torch.optim.lr_scheduler.StepLR(sgd(MODEL.parameters()), 1)),
        TypeError,
        "got torch.optim.lr_scheduler.StepLR",
    ),
    "a model without parameters": (
        (nn.Sequential(nn.ReLU()), MSE, OPTIMIZER),
        ValueError,
        "no parameters to train",
    ),
    "another model's optimizer": (
        (MODEL, MSE, sgd(mlp().parameters())),
        ValueError,
        "none of the model's parameters",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments_raise_a_clear_error(name: str) -> None:
    arguments, error, text = ARGUMENTS[name]
    with pytest.raises(error, match=text):
        fusedmlp.TrainStep(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"accumulate": 2.0}, TypeError, "accumulate must be an integer, got 2.0, a float"),
        ({"accumulate": 0}, ValueError, "accumulate must be 1 or more, got 0"),
        ({"accumulate": "4"}, TypeError, "accumulate must be an integer, got '4', a str"),
    ],
)
def test_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fusedmlp.TrainStep(MODEL, MSE, OPTIMIZER, **options)


class Centers(nn.Module):
    """A loss with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(5, 5, dtype=torch.float64))

    def forward(self, output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (output - self.centers[y]).square().sum()


def test_a_loss_with_parameters_is_trained() -> None:
    """The model may then have no parameters, or only frozen ones."""
    loss_fn = Centers()
    for model in (nn.Flatten(), mlp().requires_grad_(False)):
        step = fusedmlp.TrainStep(model, loss_fn, sgd(loss_fn.parameters()))
        before = loss_fn.centers.detach().clone()
        step(torch.randn(6, 5 if isinstance(model, nn.Flatten) else 7).double(), torch.randint(0, 5, (6,)))
        assert not torch.equal(before, loss_fn.centers)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict(
            {k: v.clone() for k, v in model.state_dict().items()}, assign=True
        ),
        lambda model: [
            setattr(m, n, nn.Parameter(p.detach().clone()))
            for m in model.modules()
            for n, p in list(m._parameters.items())
        ],
    ],
    ids=["load_state_dict(assign=True)", "new parameters"],
)
def test_parameters_that_are_replaced_later(change: Callable[[nn.Module], Any]) -> None:
    """The optimizer still has the old parameters, so PyTorch's loop would silently train nothing."""
    model = mlp()
    step = fusedmlp.TrainStep(model, CROSS_ENTROPY, sgd(model.parameters()))
    step(*batches(1)[0])
    change(model)
    with pytest.raises(
        RuntimeError, match=r"none of the model's parameters.*before the parameters were replaced"
    ):
        step(*batches(1)[0])


# --- epoch ---

X, Y = torch.randn(20, 7, dtype=torch.float64), torch.randint(0, 5, (20,))
LOADER = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4)
EPOCHS: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "arrays": (
        X.numpy(),
        Y.numpy(),
        {},
        TypeError,
        "images must be a torch.Tensor, got numpy.ndarray; torch.from_numpy",
    ),
    "labels in an array": (X, Y.numpy(), {}, TypeError, "labels must be a torch.Tensor, got numpy.ndarray"),
    "a list": (X.tolist(), Y, {}, TypeError, "images must be a torch.Tensor, got list$"),
    "a loader": (LOADER, None, {}, TypeError, "with a DataLoader, loop: for x, y in loader: step"),
    "a size that is no integer": (
        X,
        Y,
        {"batch_size": 32.0},
        TypeError,
        "batch_size must be an integer, got 32.0",
    ),
    "no size": (X, Y, {"batch_size": None}, TypeError, "batch_size must be an integer, got None"),
    "size 0": (X, Y, {"batch_size": 0}, ValueError, "batch_size must be 1 or more, got 0"),
    "nothing left": (
        X,
        Y,
        {"batch_size": 21, "drop_last": True},
        ValueError,
        "drop_last leaves nothing of 20 rows",
    ),
    "too few labels": (X, Y[:19], {}, ValueError, "20 images, but 19 labels"),
    "one number": (torch.ones(()), Y, {}, ValueError, "images has no rows"),
}


@pytest.mark.parametrize("name", EPOCHS)
def test_a_clear_error_of_an_epoch(name: str) -> None:
    """The error comes before any training and before any random number is drawn."""
    images, labels, options, error, text = EPOCHS[name]
    model = mlp()
    step = fusedmlp.TrainStep(model, CROSS_ENTROPY, sgd(model.parameters()))
    before, state = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    with pytest.raises(error, match=text):
        step.epoch(images, labels, **{"batch_size": 4} | options)
    assert all(itertools.starmap(torch.equal, zip(before, model.parameters(), strict=True)))
    assert torch.equal(state, torch.get_rng_state())


def test_sizes_that_are_integers_of_another_kind() -> None:
    numpy = pytest.importorskip("numpy")
    model = mlp()
    step = fusedmlp.TrainStep(model, CROSS_ENTROPY, sgd(model.parameters()), accumulate=numpy.int64(1))
    assert len(step.epoch(X, Y, numpy.int64(5))) == len(step.epoch(X, Y, torch.tensor(5))) == 4
    assert len(step.epoch(X[:0], Y[:0], 5, drop_last=True)) == 0
