"""Run a user's model without leaving a trace: on a copy, or by undoing what the run changed."""

import collections
import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def copy_with(
    module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.nn.Module, dict[int, Any]]:
    """Deep-copy a module with ``change(tensor.data)`` in place of each tensor; its result may share memory.

    The second result maps the ``id`` of each original to its copy, as the memo of ``copy.deepcopy`` does.
    """
    memo: dict[int, Any] = {}
    tensors: list[Any] = [*module.parameters(), *module.buffers()]
    for one in module.modules():
        if isinstance(one, torch.jit.ScriptModule):
            memo[id(one)] = one  # stays uncopied, because its copy would not use the changed tensors
        else:
            tensors += tree_leaves(list(one.__dict__.values()))
    for tensor in tensors:
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and id(tensor) not in memo:
            data = change(tensor.data)
            if type(tensor) is torch.nn.Parameter:
                data = torch.nn.Parameter(data, tensor.requires_grad)
            else:
                data.requires_grad_(tensor.requires_grad)
            data.__dict__.update(tensor.__dict__)
            memo[id(tensor)] = data
    return copy.deepcopy(module, memo), memo


@contextlib.contextmanager
def random_state_kept(cuda_devices: Sequence[int]) -> Iterator[None]:
    """Put back the global random states of Python, NumPy and PyTorch, on the CPU and on these devices."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(cuda_devices):
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])


@contextlib.contextmanager
def left_as_it_was(model: torch.nn.Module, inputs: Any) -> Iterator[None]:
    """Undo what a forward changes in the model, and in the global random states.

    It restores the attributes of each module, the content of attributes that are containers (one level deep),
    the buffers and the gradients. A lazy module that became an ordinary one keeps its new attributes.
    """
    # Parameters, buffers and hooks are in dicts among the attributes.
    before = [
        (module, type(module), [(c, _content_of(c)) for c in (vars(module), *vars(module).values())])
        for module in model.modules()
    ]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not torch.nn.parameter.is_lazy(b)]
    # A gradient that is taken off its parameter cannot be written to, and needs no copy.
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    tensors = [*model.parameters(), *model.buffers(), *tree_leaves(inputs)]
    devices = {t.device.index for t in tensors if isinstance(t, torch.Tensor) and t.is_cuda}
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with random_state_kept(sorted(devices)):
            yield
    finally:
        for module, kind, containers in before:
            if type(module) is kind:
                for container, content in containers:
                    _put_back(container, content)
        for buffer, values in buffers:
            if buffer.shape != values.shape:
                buffer.data = values
            elif not buffer.is_meta and not torch.equal(buffer, values):
                # .data keeps the version as it is, because an earlier forward may have saved this buffer.
                buffer.data.copy_(values)
        for parameter, gradient in gradients:
            parameter.grad = gradient


_CONTAINERS: tuple[Any, ...] = (collections.OrderedDict, dict, list, set, collections.deque)


def _content_of(value: Any) -> tuple[Any, list[Any]]:
    """A container's builtin class and members, a dict's keys before its values; for any other value None."""
    for kind in _CONTAINERS:
        if isinstance(value, kind):
            return kind, [*kind.__iter__(value), *(kind.values(value) if issubclass(kind, dict) else ())]
    return None, []


def _put_back(container: Any, content: tuple[Any, list[Any]]) -> None:
    """Give a container its former content if that changed. Methods of a subclass are not called."""
    kind, members = content
    if list(map(id, members)) == list(map(id, _content_of(container)[1])):
        return
    kind.clear(container)
    if issubclass(kind, dict):
        half = len(members) // 2
        for key, value in zip(members[:half], members[half:], strict=True):
            kind.__setitem__(container, key, value)
    else:
        (kind.update if kind is set else kind.extend)(container, members)
