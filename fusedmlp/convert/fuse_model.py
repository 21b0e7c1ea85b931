"""``fuse``, ``unfuse`` and ``report``: give Linears and Sequentials fused classes, and undo it.

A fused Sequential runs its own pairs of Linear and ReLU. Where a forward calls ReLU itself, as in
``F.relu(self.fc1(x))``, torch.fx finds the pair (trace_forward.py), and the Linear gets a class whose output
waits for its ReLU (pending_relu.py). If ReLU does not come in some later call, the result is still accurate.
"""

import collections
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.utils import parametrize

from fusedmlp import nn
from fusedmlp.convert import module_classes
from fusedmlp.convert.fuse_report import Report, Row
from fusedmlp.convert.pending_relu import LinearBeforeReLU, more_than_forward
from fusedmlp.convert.trace_forward import Call, calls_in_forward, quietly
from fusedmlp.torch_tools.text import count

_SEQUENTIAL = "a Sequential"


def fuse(model: torch.nn.Module, *, inplace: bool = True, verbose: bool = False) -> torch.nn.Module:
    """Make every Linear and Sequential of a model a fused one, and return the model.

    It also fuses ``F.relu(self.fc1(x))`` inside your ``forward``, without changing your code. Only classes
    change: parameters, buffers, keys, hooks and ``repr`` stay the same, an optimizer made before keeps
    working, and :func:`unfuse` undoes it. What cannot be fused, such as a subclass of Linear, is left alone,
    and :func:`report` says why. Call fuse again after you change the model, and after the first call of its
    lazy layers. ``inplace=False`` changes a deep copy; ``verbose=True`` prints the report.

    To find the pairs, fuse traces each forward with torch.fx, several times if it branches, on a copy of its
    module. Changes that a forward makes outside the model remain: a cache in a Python module, or values
    written through a NumPy view. torch.fx patches PyTorch meanwhile, so no other thread should run models.

    Raises TypeError if model is not a ``torch.nn.Module``.

    >>> fusedmlp.fuse(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()))[0].__class__
    <class 'fusedmlp.nn.Linear'>
    """
    model = _checked(model, "fuse", inplace)
    kinds, found = _plan(model)
    module_classes.change_classes(kinds, keep_former=True)
    if verbose:
        print(found)
    return model


def unfuse(
    model: torch.nn.Module, *, built: bool = False, inplace: bool = True, verbose: bool = False
) -> torch.nn.Module:
    """Give every module that :func:`fuse` changed its former class back, and return the model.

    ``built=True`` also makes layers that you built with ``fusedmlp.nn`` torch.nn's own Linear and Sequential:
    for tools that test for the exact class, such as dynamic quantization, and for pickles that load without
    ``fusedmlp``. Subclasses of your own stay. ``inplace=False`` changes a deep copy instead; ``verbose=True``
    prints how many modules changed.

    Raises TypeError if model is not a ``torch.nn.Module``, and with ``built=True`` if the model has a
    LinearReLU, for which torch.nn has no class; then nothing changes.

    >>> unfuse(fuse(torch.nn.Linear(4, 3))).__class__
    <class 'torch.nn.modules.linear.Linear'>
    """
    model = _checked(model, "unfuse", inplace)
    kinds = module_classes.classes_of_torch(model) if built else module_classes.former_classes(model)
    module_classes.change_classes(kinds, keep_former=False)
    if verbose:
        linears = sum(issubclass(kind, torch.nn.Linear) for kind in kinds.values())
        became = "made torch.nn's own" if built else "given back their former class"
        print(f"{count(linears, 'Linear')} and {count(len(kinds) - linears, 'Sequential')} {became}")
    return model


def report(model: torch.nn.Module) -> Report:
    """Report what :func:`fuse` would do to the model, or has done, and change nothing. Each Linear has a row.

    Raises TypeError if model is not a ``torch.nn.Module``.

    >>> print(fusedmlp.convert.report(model))
    2 of 3 Linears fused with ReLU, 1 Sequential fused
    """
    return _plan(_checked(model, "report", inplace=True))[1]


def _checked(model: Any, name: str, inplace: bool) -> torch.nn.Module:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{name} takes a torch.nn.Module, not {type(model).__name__}")
    return model if inplace else copy.deepcopy(model)


def _plan(model: torch.nn.Module) -> tuple[dict[torch.nn.Module, type[torch.nn.Module]], Report]:
    """The class for each module that fuse changes, and the report."""
    kinds: dict[torch.nn.Module, type[torch.nn.Module]] = {}
    # For each Linear its calls: where, and why the output does not go to ReLU ("" if it does).
    calls: dict[torch.nn.Module, list[tuple[str, str]]] = collections.defaultdict(list)
    for module in model.modules():
        kind = module_classes.fused_sequential(module)
        if kind is not None:
            kinds[module] = kind
            for call in _calls_in_sequential(module):
                calls[call.linear].append((_SEQUENTIAL, call.reason))
    sequentials, in_sequentials = len(kinds), set(calls)
    with quietly():
        for module in model.modules():
            scripted = isinstance(module, torch.jit.ScriptModule)
            if not (module in kinds or scripted or _is_container(module) or _is_linear(module)):
                for call in _calls_in_forward(module, in_sequentials):
                    calls[call.linear].append((f"forward of {type(module).__name__}", call.reason))
    names: dict[torch.nn.Module, list[str]] = collections.defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    rows = []
    for module in filter(_is_linear, model.modules()):
        status, reason = "left alone", _why_left_alone(module)
        if reason is None:
            kinds[module], status, reason = _decide(module, calls[module])
        rows.append(Row(tuple(names[module]), *(_features(module) or (0, 0)), status, reason))
    return kinds, Report(tuple(rows), sequentials)


def _decide(linear: torch.nn.Module, calls: list[tuple[str, str]]) -> tuple[type[torch.nn.Module], str, str]:
    """Class, status and reason of a Linear. It waits for ReLU only if every call's output goes to ReLU."""
    lazy = isinstance(linear, torch.nn.LazyLinear)
    kind: type[torch.nn.Module] = nn.LazyLinear if lazy else nn.Linear
    paired = {where for where, reason in calls if not reason}
    forwards = " and ".join(sorted(paired - {_SEQUENTIAL}))
    reasons = list(dict.fromkeys(reason for _, reason in calls if reason))
    if forwards and not reasons and not lazy:
        return LinearBeforeReLU, f"pair in {forwards}", ""
    if _SEQUENTIAL in paired:  # a fused Sequential fuses the pair, even if other code calls the Linear too
        return kind, f"pair in {_SEQUENTIAL}", ""
    if forwards and reasons:
        reasons.insert(0, f"ReLU takes its output in {forwards}, but not everywhere")
    elif forwards:
        reasons = ["it is lazy: call fuse again after the first call"]
    return kind, "Linear only", "; ".join(reasons) or "no forward that could be read calls it"


def _calls_in_forward(module: torch.nn.Module, in_sequentials: set[torch.nn.Module]) -> list[Call]:
    """The calls of Linears in the module's own forward, or why it cannot be traced, for each Linear."""
    linears = list(dict.fromkeys(_own_linears(module)))
    if not linears:
        return []
    calls, problem = calls_in_forward(module, linears)
    if problem is None:
        return calls
    # The call of a Linear in a Sequential is known already, and most likely there is no other.
    reason = f"{type(module).__name__}.forward {problem}"
    return [Call(linear, reason) for linear in linears if linear not in in_sequentials]


def _calls_in_sequential(module: torch.nn.Module) -> Iterator[Call]:
    members = list(module._modules.values())
    for member, follower in itertools.zip_longest(members, members[1:]):
        if member is None or not _is_linear(member):
            continue
        reason = ""
        if more := more_than_forward(member):
            reason = f"it {more}"
        elif follower is None:
            reason = "nothing follows it in its Sequential"
        elif type(follower) is not torch.nn.ReLU:
            reason = f"{type(follower).__name__} follows it in its Sequential"
        elif more := more_than_forward(follower):
            reason = f"its ReLU {more}"
        yield Call(member, reason)


def _own_linears(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The Linears that a forward can call: attributes of its module, or in a list, dict or Sequential."""
    for child in module.children():
        if _is_linear(child):
            if _why_left_alone(child) is None:
                yield child
        elif _is_container(child) or isinstance(child, torch.nn.Sequential):
            yield from _own_linears(child)


def _is_container(module: torch.nn.Module) -> bool:
    """True if the class has no forward of its own, as ModuleList has none."""
    # The class of a ScriptModule has no forward at all.
    return getattr(type(module), "forward", None) is torch.nn.Module.forward


def _is_linear(module: torch.nn.Module) -> bool:
    """True for a Linear of any kind: quantized ones and those of other libraries are rows of the report too.

    A block named Linear that has a torch.nn.Linear inside does not count.
    """
    return isinstance(module, torch.nn.Linear) or (
        "Linear" in type(module).__name__
        and _features(module) is not None
        and not any(isinstance(one, torch.nn.Linear) for one in module.modules())
    )


def _features(module: torch.nn.Module) -> tuple[int, int] | None:
    """in_features and out_features, or None if they are not numbers, as they may be in other libraries."""
    try:
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    except Exception:
        return None


def _why_left_alone(linear: torch.nn.Module) -> str | None:
    name = type(linear).__name__
    if type(linear) in module_classes.LINEARS:
        return None
    if type(linear) is nn.LinearReLU:
        return "LinearReLU is a pair by itself"
    if not isinstance(linear, torch.nn.Linear):
        return f"{name} is no torch.nn.Linear"
    if parametrize.is_parametrized(linear):
        return "its weight or bias is parametrized"
    return f"a subclass of Linear: {name}"
