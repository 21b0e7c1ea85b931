"""Clear errors for arguments of TrainStep that cannot be what the caller meant."""

import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch


def check_step(model: Any, loss_fn: Any, optimizer: Any) -> None:
    """Raise TypeError or ValueError unless the optimizer trains parameters of this model or this loss."""
    for name, given, example in (
        ("model", model, "Net()"),
        ("loss_fn", loss_fn, "CrossEntropyLoss()"),
        ("optimizer", optimizer, "SGD(model.parameters(), lr=0.1)"),
    ):
        if inspect.isclass(given) and issubclass(given, (torch.nn.Module, torch.optim.Optimizer)):
            raise TypeError(f"{name} is the class {given.__name__}; give an instance, such as {example}")
    problem = None
    if not isinstance(model, torch.nn.Module):
        problem = f"model must be a torch.nn.Module, got {_kind(model)}"
    elif isinstance(model, torch.nn.modules.loss._Loss):
        problem = f"model must be a network, got a loss, {_kind(model)}"
    elif isinstance(loss_fn, torch.optim.Optimizer) or not callable(loss_fn):
        problem = f"loss_fn is called as loss_fn(model(x), y), got {_kind(loss_fn)}"
    elif not all(hasattr(optimizer, name) for name in ("param_groups", "step", "zero_grad")):
        problem = f"optimizer must be one of torch.optim's or like it, got {_kind(optimizer)}"
    if problem is not None:
        raise TypeError(f"{problem}; the order is TrainStep(model, loss_fn, optimizer)")
    if not list(_parameters(model, loss_fn)):
        raise ValueError(f"the model, a {_kind(model)}, has no parameters to train")
    if not has_some_of(optimizer, model, loss_fn):
        raise ValueError(NOTHING_TRAINED)


NOTHING_TRAINED = (
    "the optimizer has none of the model's parameters, so that a step would train nothing; "
    "was it made for another model, or before the parameters were replaced?"
)


def has_some_of(optimizer: Any, model: torch.nn.Module, loss_fn: Any) -> bool:
    """True if the optimizer has a parameter of the model, or of a loss that is a module."""
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(id(parameter) in known for parameter in _parameters(model, loss_fn))


def _parameters(model: torch.nn.Module, loss_fn: Any) -> Iterator[torch.nn.Parameter]:
    yield from model.parameters()
    if isinstance(loss_fn, torch.nn.Module):
        yield from loss_fn.parameters()


def needs_closure(optimizer: Any) -> bool:
    """True if the optimizer's step requires a closure that computes the loss, as that of LBFGS does."""
    try:
        parameter = inspect.signature(type(optimizer).step).parameters.get("closure")
    except (TypeError, ValueError):  # a step in C may have no signature
        return False
    return parameter is not None and parameter.default is parameter.empty


def count(name: str, given: Any) -> int:
    """Return ``given`` as an int of 1 or more. Raise TypeError for 32.0, as torch.empty(32.0) does."""
    try:
        number = operator.index(given)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {given!r}, a {_kind(given)}") from None
    if number < 1:
        raise ValueError(f"{name} must be 1 or more, got {given!r}")
    return number


def check_epoch(images: Any, labels: Any, batch_size: int, drop_last: bool) -> None:
    """Raise TypeError or ValueError unless these are tensors with equally many rows, enough for a batch."""
    if isinstance(images, torch.utils.data.DataLoader):
        raise TypeError("epoch takes tensors; with a DataLoader, loop: for x, y in loader: step(x, y)")
    for name, given in (("images", images), ("labels", labels)):
        if not isinstance(given, torch.Tensor):
            hint = "; torch.from_numpy converts it" if hasattr(given, "__array_interface__") else ""
            raise TypeError(f"{name} must be a torch.Tensor, got {_kind(given)}{hint}")
        if given.dim() == 0:
            raise ValueError(f"{name} has no rows: it is a single number")
    rows = len(images)
    if len(labels) != rows:
        raise ValueError(f"{rows} images, but {len(labels)} labels")
    if drop_last and 0 < rows < batch_size:
        raise ValueError(
            f"drop_last leaves nothing of {rows} rows in batches of {batch_size}; "
            f"choose a batch_size of {rows} or less"
        )


def _kind(given: Any) -> str:
    kind = type(given)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
