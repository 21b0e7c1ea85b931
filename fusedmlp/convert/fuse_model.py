"""``fuse`` for models that are there already: Linear and Sequential change their class, and nothing else.

    fusedmlp.fuse(model)  # and model, its optimizer and its checkpoints go on as before

A Sequential runs its own pairs of Linear and ReLU. Where a module's forward calls ReLU itself, as in
``F.relu(self.fc1(x))``, that forward is only read, with torch.fx, never replaced: the Linear learns that ReLU
comes next, and should it not come once, for all that the code may do, the result is still right.
"""

import collections
import copy
import itertools
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Generic, NamedTuple

import torch
from torch.nn.utils import parametrize

from fusedmlp import nn
from fusedmlp.convert.pending_relu import (
    LazyLinearBeforeClamp,
    LazyLinearBeforeReLU,
    LinearBeforeClamp,
    LinearBeforeReLU,
    observed,
)
from fusedmlp.convert.trace_forward import Call, calls_in_forward, quietly

__all__ = ["Report", "Row", "fuse", "report", "unfuse"]

_FROM = "_fused_from"  # where a module remembers its class: in its __dict__, so that copies do too
_BEFORE = {"relu": LinearBeforeReLU, "clamp": LinearBeforeClamp}
# What each kind of Linear is before its first call, if it is lazy.
_LAZY: dict[Any, type[torch.nn.Module]] = {
    torch.nn.Linear: torch.nn.LazyLinear,
    nn.Linear: nn.LazyLinear,
    LinearBeforeReLU: LazyLinearBeforeReLU,
    LinearBeforeClamp: LazyLinearBeforeClamp,
}
_LINEARS = (*_LAZY, *_LAZY.values())
# What torch.nn has in place of ours.
_TORCHS: dict[Any, type[torch.nn.Module]] = {
    nn.Sequential: torch.nn.Sequential,
    nn.MLP: torch.nn.Sequential,
    **dict.fromkeys(_LAZY, torch.nn.Linear),
    **dict.fromkeys(_LAZY.values(), torch.nn.LazyLinear),
}
_OF_ABC = ("_abc_impl", "__abstractmethods__")  # what abc.ABCMeta gives to each class, and torch's have not
_WIDTH = 80
_SEQUENTIAL = "a Sequential"


class Row(NamedTuple):
    """One Linear: its names in the model (more than one if it is shared), its shape and what becomes of it.

    status is "pair in a Sequential", "pair in forward of X", "Linear only" or "left alone"; reason says in a
    few words why it is no pair, and is empty if it is one.
    """

    names: tuple[str, ...]
    in_features: int
    out_features: int
    status: str
    reason: str


class Report(NamedTuple):
    """What fuse does to a model, as data; ``str()`` of it is a table for a terminal.

    One row for each Linear, and how many Sequentials run their pairs as one.

    >>> fusedmlp.convert.report(model).pairs
    2
    """

    rows: tuple[Row, ...]
    sequentials: int

    @property
    def pairs(self) -> int:
        return sum(row.status.startswith("pair") for row in self.rows)

    @property
    def linears(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        head = f"{self.pairs} of {_count(self.linears, 'Linear')} fused with ReLU"
        lines = [f"{head}, {_count(self.sequentials, 'Sequential')} fused"]
        sections: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: not row.status.startswith("pair")):
            title = f"{row.status}: {row.reason}" if row.reason else row.status
            sections.setdefault(title, []).append(row)
        for title, rows in sections.items():
            lines += ["", *textwrap.wrap(f"{title} ({len(rows)})", _WIDTH)]
            # Layers whose names differ in numbers only, and that have one shape, are one line.
            alike: dict[Any, list[Row]] = {}
            for row in rows:
                key = (*re.split(r"\d+", row.names[0]), len(row.names), row.in_features, row.out_features)
                alike.setdefault(key, []).append(row)
            table = [
                (_names(same), f"{key[-2]} -> {key[-1]}" + (f"  x {len(same)}" if len(same) > 1 else ""))
                for key, same in alike.items()
            ]
            room = _WIDTH - len("    ") - max(len(shape) for _, shape in table)
            wide = min(room, max(len(name) for name, _ in table))
            for name, shape in table:
                shortened = name if len(name) <= wide else "..." + name[3 - wide :]
                lines.append(f"  {shortened:{wide}}  {shape}")
        return "\n".join(lines)


def fuse(model: torch.nn.Module, *, inplace: bool = True, verbose: bool = False) -> torch.nn.Module:
    """Make every Linear and Sequential of a model the fused kind; returns the model.

    In place, or with ``inplace=False`` on a deep copy. Only classes change: parameters, buffers, names, keys,
    hooks, ``repr`` and outputs are the very same, an optimizer made before goes on, and :func:`unfuse` takes
    it back. What cannot be fused, a subclass of Linear for one, is left alone, and :func:`report` says why;
    ``verbose=True`` prints that. Call it again after changing the model.

    To find their pairs, the forwards of a copy that shares the memory are run on stand-ins, a few times where
    they branch. What they do to the copy leaves no trace; a cache in a Python module does, and so does what
    is written through a NumPy view. torch.fx changes torch for so long, so no other thread should run models
    meanwhile. Raises TypeError for what is no ``torch.nn.Module``.

    >>> fusedmlp.fuse(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()))[0].__class__
    <class 'fusedmlp.nn.Linear'>
    """
    _check(model, "fuse")
    if not inplace:
        model = copy.deepcopy(model)
    kinds, found = _plan(model)
    changes = []
    for module, kind in kinds.items():
        if type(module) is not kind:
            former = module.__dict__.get(_FROM, type(module))
            changes.append((module, kind, None if former is kind else former))
    _change(changes)
    if verbose:
        print(found)
    return model


def unfuse(
    model: torch.nn.Module, *, built: bool = False, inplace: bool = True, verbose: bool = False
) -> torch.nn.Module:
    """Give every module that :func:`fuse` changed the class it had; returns the model.

    In place, or with ``inplace=False`` on a deep copy. Layers that were built with ``fusedmlp.nn`` stay, but
    with ``built=True`` they become ``torch.nn``'s own Linear and Sequential too: for tools that go by a
    module's exact class, as dynamic quantization does, and for pickles to be read without ``fusedmlp``.
    Classes of your own that are derived from ours stay. ``verbose=True`` prints how many have changed.

    Raises TypeError as fuse does, and with ``built=True`` if the model has a LinearReLU, for which torch.nn
    has no class; nothing is changed then.

    >>> unfuse(fuse(model))
    """
    _check(model, "unfuse")
    if not inplace:
        model = copy.deepcopy(model)
    if built:
        changes = [(module, kind, None) for module, kind in _torchs_own(model)]
    else:
        changes = [
            (module, kind, None) for module in model.modules() if (kind := _former(module)) is not None
        ]
    _change(changes)
    if verbose:
        linears = sum(issubclass(kind, torch.nn.Linear) for _, kind, _ in changes)
        words = _count(linears, "Linear"), _count(len(changes) - linears, "Sequential")
        became = "made torch.nn's own" if built else "given back the class they had"
        print(f"{' and '.join(words)} {became}")
    return model


def report(model: torch.nn.Module) -> Report:
    """What :func:`fuse` would do to the model, or has done: a row for each Linear. Changes nothing.

    >>> print(fusedmlp.convert.report(model))
    2 of 3 Linears fused with ReLU, 1 Sequential fused
    """
    _check(model, "report")
    return _plan(model)[1]


def _plan(model: torch.nn.Module) -> tuple[dict[torch.nn.Module, type[torch.nn.Module]], Report]:
    """The class that each module to change shall have, and the report."""
    kinds: dict[torch.nn.Module, type[torch.nn.Module]] = {}
    calls: dict[torch.nn.Module, list[tuple[str, Call]]] = collections.defaultdict(list)
    for module in model.modules():
        kind = _fused_sequential(module)
        if kind is not None:
            kinds[module] = kind
            for call in _calls_in_sequential(module):
                calls[call.linear].append((_SEQUENTIAL, call))
    in_sequentials = set(calls)
    with quietly():
        for module in model.modules():
            if module in kinds or isinstance(module, torch.jit.ScriptModule):
                continue
            if not _is_container(module) and not _is_linear(module):
                for call in _calls_in_forward(module, in_sequentials):
                    calls[call.linear].append((f"forward of {type(module).__name__}", call))
    names: dict[torch.nn.Module, list[str]] = collections.defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    rows = []
    for module in model.modules():
        if not _is_linear(module):
            continue
        reason = _why_left_alone(module)
        if reason is None:
            kind, status, reason = _decide(calls[module])
            kinds[module] = _LAZY[kind] if isinstance(module, torch.nn.LazyLinear) else kind
        else:
            status = "left alone"
        rows.append(Row(tuple(names[module]), *(_features(module) or (0, 0)), status, reason))
    sequentials = sum(isinstance(module, torch.nn.Sequential) for module in kinds)
    return kinds, Report(tuple(rows), sequentials)


def _decide(calls: list[tuple[str, Call]]) -> tuple[type[torch.nn.Module], str, str]:
    """Class, status and reason of a Linear from all calls of it: before ReLU only if it is so every time."""
    forwards = sorted({where for where, call in calls if call.kind and where != _SEQUENTIAL})
    in_sequential = any(call.kind and where == _SEQUENTIAL for where, call in calls)
    reasons = list(dict.fromkeys(call.reason for _, call in calls if not call.kind))
    kind: type[torch.nn.Module] = nn.Linear
    if forwards and not reasons:
        kind = _BEFORE["clamp" if any(call.kind == "clamp" for _, call in calls) else "relu"]
        return kind, f"pair in {' and '.join(forwards)}", ""
    if in_sequential:  # which fuses its own, whatever others do with the Linear
        return kind, f"pair in {_SEQUENTIAL}", ""
    if forwards:
        reasons.insert(0, f"ReLU takes its output in {' and '.join(forwards)}, but not everywhere")
    return kind, "Linear only", "; ".join(reasons) or "no forward that could be read calls it"


def _calls_in_forward(module: torch.nn.Module, in_sequentials: set[torch.nn.Module]) -> list[Call]:
    """What is known of the Linears that the module's forward may call, from its trace."""
    linears = list(dict.fromkeys(_own_linears(module)))
    if not linears:
        return []
    name = f"{type(module).__name__}.forward"
    if "forward" in module.__dict__:
        calls: list[Call] = []
        problem = f"{name} is patched"
    else:
        calls, error = calls_in_forward(module, linears)
        problem = f"{name} cannot be traced: {error}" if error else ""
    if problem:
        # A Linear in a Sequential is most likely called by that alone.
        return [Call(linear, None, problem) for linear in linears if linear not in in_sequentials]
    hooked = {linear: reason for linear in linears if (reason := observed(linear))}
    return [call for call in calls if call.linear not in hooked] + [
        Call(linear, None, reason) for linear, reason in hooked.items()
    ]


def _calls_in_sequential(module: torch.nn.Module) -> Iterator[Call]:
    members = list(module._modules.values())
    for member, follower in itertools.zip_longest(members, members[1:]):
        if member is None or not _is_linear(member):
            continue
        kind = None
        if reason := observed(member):
            pass
        elif follower is None:
            reason = "nothing follows it in its Sequential"
        elif type(follower) is not torch.nn.ReLU:
            reason = f"{type(follower).__name__} follows it in its Sequential"
        elif hooked := observed(follower):
            reason = f"of its ReLU, {hooked}"
        else:
            kind = "relu"
        yield Call(member, kind, reason or "")


def _own_linears(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The Linears that a forward can call by an attribute, a list, a dict or a Sequential of its module."""
    for child in module._modules.values():
        if child is None:
            continue
        if _is_linear(child):
            if _why_left_alone(child) is None:
                yield child
        elif _is_container(child) or isinstance(child, torch.nn.Sequential):
            yield from _own_linears(child)


def _is_container(module: torch.nn.Module) -> bool:
    # A ScriptModule's class has no forward.
    return getattr(type(module), "forward", None) is torch.nn.Module.forward


def _is_linear(module: torch.nn.Module) -> bool:
    """Including quantized ones and others' that are no torch.nn.Linear: the report names them.

    A block that is named so and has a Linear inside is none.
    """
    return isinstance(module, torch.nn.Linear) or (
        "Linear" in type(module).__name__
        and _features(module) is not None
        and not any(isinstance(one, torch.nn.Linear) for one in module.modules())
    )


def _features(module: torch.nn.Module) -> tuple[int, int] | None:
    """in_features and out_features, if they are numbers: of others' classes they may be anything."""
    try:
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    except Exception:
        return None


def _why_left_alone(linear: torch.nn.Module) -> str | None:
    name = type(linear).__name__
    if type(linear) in _LINEARS:
        return None
    if type(linear) is nn.LinearReLU:
        return "LinearReLU is a pair by itself"
    if not isinstance(linear, torch.nn.Linear):
        return f"{name} is no torch.nn.Linear"
    if parametrize.is_parametrized(linear):
        return "its weight or bias is parametrized"
    return f"a subclass of Linear: {name}"


def _fused_sequential(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The fused class for a Sequential, maybe the one it has, or None for what runs its members otherwise."""
    kind = type(module)
    if kind is torch.nn.Sequential or kind is nn.Sequential:
        return nn.Sequential
    if not issubclass(kind, torch.nn.Sequential) or parametrize.is_parametrized(module):
        return None
    if kind.forward is nn.Sequential.forward:  # nn.MLP, and what fuse or the user made
        return kind
    same = ("forward", "__call__", "__iter__", "__reduce_ex__", "__reduce__")
    if any(getattr(kind, name) is not getattr(torch.nn.Sequential, name) for name in same):
        return None
    # It would be told of a subclass that nobody wrote, and may put it into a registry.
    usual = (*torch.nn.Sequential.__mro__, Generic)
    if any("__init_subclass__" in vars(base) for base in kind.__mro__ if base not in usual):
        return None
    try:
        return _subclass(kind)
    except Exception:  # a class that does not want subclasses
        return None


class _Disguised(nn.Sequential):
    """Of fused classes made at run time: copies and pickles find them again by the class they came from."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = object.__reduce_ex__(self, max(int(protocol), 2))
        _, (kind, *arguments), *state = made
        return _new, (kind._came_from, *arguments), *state


def _subclass(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    if kind not in _SUBCLASSES:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_came_from": kind}
        made = types.new_class(kind.__name__, (kind, _Disguised), exec_body=lambda space: space.update(names))
        _SUBCLASSES[kind] = made
    return _SUBCLASSES[kind]


_SUBCLASSES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}


def _new(kind: Any, *arguments: Any) -> Any:
    return _subclass(kind).__new__(_subclass(kind), *arguments)


def _former(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class to give back, unless somebody has changed it since, as a parametrization does."""
    kind = type(module)
    former: type[torch.nn.Module] | None = kind.__dict__.get("_came_from")
    if kind in _LINEARS or kind is nn.Sequential:
        former = module.__dict__.get(_FROM)
        if former in _LAZY.values() and not isinstance(module, torch.nn.LazyLinear):
            former = former.cls_to_become  # type: ignore[union-attr]  # it has been called since
    return former


def _torchs_own(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, type[torch.nn.Module]]]:
    """The modules that are ours, and the class that each would have on ``torch.nn``."""
    without = []
    for name, module in model.named_modules():
        kind = _former(module) or type(module)
        parametrized = parametrize.is_parametrized(module)
        base = kind.__bases__[0] if parametrized else kind
        if base is nn.LinearReLU:
            without.append(name or "the model itself")
        base = _TORCHS.get(base, base)
        if parametrized and base is not kind.__bases__[0]:  # a class that was made, maybe for its copies too
            own = {name: it for name, it in vars(kind).items() if name not in _OF_ABC}
            kind = type(kind.__name__, (base,), own)
        elif not parametrized:
            kind = base
        if kind is not type(module):
            yield module, kind
    if without:
        raise TypeError(
            f"torch.nn has no LinearReLU, for which there should be Linear and ReLU: {', '.join(without)}"
        )


def _change(changes: list[tuple[torch.nn.Module, type[torch.nn.Module], Any]]) -> None:
    """Give each module its class and the memory of a former one, or None: all or none of them."""
    before = [(module, type(module), module.__dict__.get(_FROM)) for module, _, _ in changes]
    try:
        for change in changes:
            _set(*change)
    except BaseException:
        for change in before:
            _set(*change)
        raise


def _set(module: torch.nn.Module, kind: type[torch.nn.Module], former: Any) -> None:
    object.__setattr__(module, "__class__", kind)
    if former is None:
        module.__dict__.pop(_FROM, None)
    else:
        module.__dict__[_FROM] = former


def _check(model: Any, name: str) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{name} takes a torch.nn.Module, not {type(model).__name__}")


def _names(rows: list[Row]) -> str:
    """Their name, with * for each number in which they differ."""
    split = [re.split(r"(\d+)", row.names[0]) for row in rows]
    name = "".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*split, strict=True))
    more = len(rows[0].names) - 1
    return (name or "(the model)") + (f" (and {_count(more, 'other name')})" if more else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
