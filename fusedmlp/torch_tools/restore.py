"""Run somebody's model and leave no trace in it."""

import collections
import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


@contextlib.contextmanager
def left_as_it_was(model: torch.nn.Module, inputs: Any) -> Iterator[None]:
    """Undo what a forward does to the model's attributes and the containers among them, one level deep, to
    its buffers and gradients, and to the global random states."""
    # Buffers and hooks lie in dicts: of containers the content counts too.
    before = [
        (module, type(module), [(c, *_content_of(c)) for c in (vars(module), *vars(module).values())])
        for module in model.modules()
    ]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not torch.nn.parameter.is_lazy(b)]
    # Put aside, a gradient cannot be written into, and needs no copy.
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    tensors = [*model.parameters(), *model.buffers(), *tree_leaves(inputs)]
    devices = {t.device.index for t in tensors if isinstance(t, torch.Tensor) and t.is_cuda}
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy and numpy.random.get_state()
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
        for module, kind, containers in before:
            if type(module) is not kind:  # it was lazy, and is so no more
                continue
            for container, *content in containers:
                _put_back(container, *content)
        for buffer, values in buffers:
            if buffer.shape != values.shape:
                buffer.data = values
            elif not buffer.is_meta and not torch.equal(buffer, values):
                buffer.data.copy_(values)  # .data: an earlier forward may have saved it for its backward
        for parameter, gradient in gradients:
            parameter.grad = gradient


_CONTAINERS: tuple[Any, ...] = (collections.OrderedDict, dict, list, set, collections.deque)


def _content_of(value: Any) -> tuple[Any, list[Any], list[Any]]:
    """The builtin class of a container, its members or keys, and a dict's values; None for anything else."""
    for kind in _CONTAINERS:
        if isinstance(value, kind):
            values = list(kind.values(value)) if issubclass(kind, dict) else []
            return kind, list(kind.__iter__(value)), values
    return None, [], []


def _put_back(container: Any, kind: Any, members: list[Any], values: list[Any]) -> None:
    """Give a container the content it had, if it has another one, past the methods of a subclass."""
    _, *now = _content_of(container)
    if kind is None or [list(map(id, part)) for part in now] == [list(map(id, p)) for p in (members, values)]:
        return
    kind.clear(container)
    if issubclass(kind, dict):
        for key, value in zip(members, values, strict=True):
            kind.__setitem__(container, key, value)
    else:
        (kind.update if kind is set else kind.extend)(container, members)
