"""Find the classes of a model's modules before and after ``fuse``, and change one into the other."""

import functools
import types
from typing import Any, Generic

import torch
from torch.nn.utils import parametrize

from fusedmlp import nn
from fusedmlp.convert.pending_relu import LinearBeforeReLU

_FORMER = "_fused_from"  # fuse stores a module's class here, in its __dict__, which copies and pickles keep
LINEARS = (torch.nn.Linear, torch.nn.LazyLinear, nn.Linear, nn.LazyLinear, LinearBeforeReLU)
# For each of our classes the one of torch.nn.
TORCHS: dict[Any, type[torch.nn.Module]] = {
    nn.Linear: torch.nn.Linear,
    LinearBeforeReLU: torch.nn.Linear,
    nn.LazyLinear: torch.nn.LazyLinear,
    nn.Sequential: torch.nn.Sequential,
    nn.MLP: torch.nn.Sequential,
}


def fused_sequential(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The fused class for a Sequential, or None if it does more than run its members one by one."""
    kind = type(module)
    if kind is torch.nn.Sequential or kind is nn.Sequential:
        return nn.Sequential
    if not issubclass(kind, torch.nn.Sequential) or parametrize.is_parametrized(module):
        return None
    if kind.forward is nn.Sequential.forward:  # nn.MLP, a class made by fuse, or a subclass of nn.Sequential
        return kind
    same = ("forward", "__call__", "__iter__", "__reduce_ex__", "__reduce__")
    if any(getattr(kind, name) is not getattr(torch.nn.Sequential, name) for name in same):
        return None
    # __init_subclass__ would see our generated class, and could put it into a registry.
    usual = (*torch.nn.Sequential.__mro__, Generic)
    if any("__init_subclass__" in vars(base) for base in kind.__mro__ if base not in usual):
        return None
    try:
        return _subclass(kind)  # type: ignore[arg-type]  # mypy finds that modules' classes have no hash
    except Exception:  # a class that does not allow subclasses
        return None


class _Generated(nn.Sequential):
    """Base of the fused classes that are generated for subclasses of Sequential.

    Copies and pickles name the original class and generate the fused one again.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = object.__reduce_ex__(self, max(int(protocol), 2))
        _, (kind, *arguments), *state = made
        return _new, (kind._came_from, *arguments), *state


@functools.cache
def _subclass(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_came_from": kind}
    return types.new_class(kind.__name__, (kind, _Generated), exec_body=lambda space: space.update(names))


def _new(kind: Any, *arguments: Any) -> Any:
    return _subclass(kind).__new__(_subclass(kind), *arguments)


def former_classes(model: torch.nn.Module) -> dict[torch.nn.Module, type[torch.nn.Module]]:
    """For each module that fuse changed, the class that unfuse gives back."""
    return {module: kind for module in model.modules() if (kind := _former_class(module)) is not None}


def _former_class(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class that unfuse gives back, or None if fuse was not the last to change the class."""
    kind = type(module)
    former: type[torch.nn.Module] | None = kind.__dict__.get("_came_from")
    if kind in LINEARS or kind is nn.Sequential:
        former = module.__dict__.get(_FORMER)
        if former in (torch.nn.LazyLinear, nn.LazyLinear) and not isinstance(module, torch.nn.LazyLinear):
            former = former.cls_to_become  # it has had its first call since
    return former


def classes_of_torch(model: torch.nn.Module) -> dict[torch.nn.Module, type[torch.nn.Module]]:
    """For each module that has one of our classes, the class of ``torch.nn``."""
    kinds, without = {}, []
    for name, module in model.named_modules():
        kind = _former_class(module) or type(module)
        parametrized = parametrize.is_parametrized(module)
        base = kind.__bases__[0] if parametrized else kind
        if base is nn.LinearReLU:
            without.append(name or "the model itself")
        torchs = TORCHS.get(base, base)
        if not parametrized:
            kind = torchs
        elif torchs is not base:
            # The parametrization generated this class, and copies of the module may share it: generate
            # another one, without what abc.ABCMeta added, which is not the metaclass of torch.nn's classes.
            abc = ("_abc_impl", "__abstractmethods__")
            own = {name: value for name, value in vars(kind).items() if name not in abc}
            kind = type(kind.__name__, (torchs,), own)
        if kind is not type(module):
            kinds[module] = kind
    if without:
        raise TypeError(f"torch.nn has no LinearReLU; use Linear and ReLU in place of: {', '.join(without)}")
    return kinds


def change_classes(kinds: dict[torch.nn.Module, type[torch.nn.Module]], *, keep_former: bool) -> None:
    """Give each module its class, and store or remove the former one. If one change fails, undo them all."""
    before = [(module, type(module), module.__dict__.get(_FORMER)) for module in kinds]
    try:
        for module, now, former in before:
            keep = (now if former is None else former) if keep_former else None
            _set(module, kinds[module], None if keep is kinds[module] else keep)
    except BaseException:
        for change in before:
            _set(*change)
        raise


def _set(module: torch.nn.Module, kind: type[torch.nn.Module], former: Any) -> None:
    object.__setattr__(module, "__class__", kind)
    if former is None:
        module.__dict__.pop(_FORMER, None)
    else:
        module.__dict__[_FORMER] = former
