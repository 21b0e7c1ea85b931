"""What TrainStep was given: a clear error where it cannot be what was meant."""

import inspect
import operator
from typing import Any

import torch

_ORDER = "TrainStep(model, loss_fn, optimizer)"


def check_step(model: Any, loss_fn: Any, optimizer: Any) -> None:
    """TypeError or ValueError unless these are a model, a loss and an optimizer that trains one of them."""
    wrong_order = isinstance(loss_fn, torch.optim.Optimizer) or not callable(loss_fn)
    hint = f"; the order is {_ORDER}" if wrong_order else ""
    for name, given, example in (
        ("model", model, "Net()"),
        ("loss_fn", loss_fn, "CrossEntropyLoss()"),
        ("optimizer", optimizer, "SGD(model.parameters(), lr=0.1)"),
    ):
        if inspect.isclass(given) and issubclass(given, (torch.nn.Module, torch.optim.Optimizer)):
            raise TypeError(f"{name} is the class {given.__name__}; give an instance, such as {example}")
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a torch.nn.Module, got {_kind(model)}; the order is {_ORDER}")
    if isinstance(model, torch.nn.modules.loss._Loss):
        raise TypeError(f"model is a loss, {_kind(model)}; the order is {_ORDER}")
    if wrong_order:
        raise TypeError(f"loss_fn is called as loss_fn(model(x), y), got {_kind(loss_fn)}{hint}")
    if not all(hasattr(optimizer, name) for name in ("param_groups", "step", "zero_grad")):
        raise TypeError(
            f"optimizer is one of torch.optim's or like it, got {_kind(optimizer)}; the order is {_ORDER}"
        )
    trained = list(model.parameters())
    if isinstance(loss_fn, torch.nn.Module):
        trained += loss_fn.parameters()
    if not trained:
        raise ValueError(f"the model, a {_kind(model)}, has no parameters to train")
    if not has_some_of(optimizer, model, loss_fn):
        raise ValueError(NOTHING_TRAINED)


NOTHING_TRAINED = (
    "the optimizer has none of the model's parameters, so that a step would train nothing; "
    "was it made for another model, or before the parameters were replaced?"
)


def has_some_of(optimizer: Any, model: torch.nn.Module, loss_fn: Any) -> bool:
    """Whether a parameter of the model, or of a loss that is a module, is in the optimizer."""
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    modules = [model, loss_fn] if isinstance(loss_fn, torch.nn.Module) else [model]
    return any(id(parameter) in known for module in modules for parameter in module.parameters())


def needs_closure(optimizer: Any) -> bool:
    """Whether its step cannot do without a function that computes the loss anew, as LBFGS's."""
    try:
        parameter = inspect.signature(type(optimizer).step).parameters.get("closure")
    except (TypeError, ValueError):  # made in C, for one
        return False
    return parameter is not None and parameter.default is parameter.empty


def count(name: str, given: Any) -> int:
    """An integer of 1 or more; TypeError for 32.0, as for the size of a tensor."""
    try:
        number = operator.index(given)
    except TypeError:
        raise TypeError(f"{name} is an integer, got {given!r}, a {_kind(given)}") from None
    if number < 1:
        raise ValueError(f"{name} is 1 or more, got {given!r}")
    return number


def check_epoch(images: Any, labels: Any, batch_size: int, drop_last: bool) -> None:
    """TypeError or ValueError unless there is a batch in them."""
    if isinstance(images, torch.utils.data.DataLoader):
        raise TypeError("epoch takes tensors; with a DataLoader, loop: for x, y in loader: step(x, y)")
    for name, given in (("images", images), ("labels", labels)):
        if not isinstance(given, torch.Tensor):
            hint = "; torch.from_numpy makes one of it" if hasattr(given, "__array_interface__") else ""
            raise TypeError(f"{name} is a torch.Tensor, got {_kind(given)}{hint}")
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
    name: str = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return name
