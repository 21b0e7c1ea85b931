"""All of ``torch.nn``, with ``Linear`` and ``Sequential`` replaced by fused ones, and two layers more.

    from fusedmlp import nn  # instead of: from torch import nn

The same parameters, initial values, ``state_dict`` keys and ``repr``: checkpoints go both ways.
"""

import abc
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
import torch.nn
from torch.nn import *  # noqa: F403  all of torch.nn, whatever its version has
from torch.nn.modules.module import _has_any_global_hook

from fusedmlp import functional as _functional
from fusedmlp.dispatch.predicate import left_to_compiler
from fusedmlp.nn import _same_modules
from fusedmlp.torch_tools.patched import CALL_IMPL, LINEAR_FORWARD, SEQUENTIAL_FORWARD

_same_modules.install()
__path__ = []  # the files below this folder are for type checkers: no module lies in them

# By name: small calls count.
_MODULE, _TORCHS_LINEAR, _TORCHS_SEQUENTIAL = torch.nn.Module, torch.nn.Linear, torch.nn.Sequential
_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def _scripted_as(plain: Callable[..., Any]) -> Callable[[_Forward], _Forward]:
    """Have ``torch.jit.script`` compile another function in place of this forward.

    It compiles the source that ``inspect`` finds, which looks behind ``__wrapped__``. To give it another
    module, as ``__prepare_scriptable__`` does, would replace the members of the model that it is called with.
    """

    def mark(forward: _Forward) -> _Forward:
        forward.__wrapped__ = plain  # type: ignore[attr-defined]
        return forward

    return mark


def _plain_linear(self: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(input, self.weight, self.bias)


def _plain_linear_relu(self: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return torch.relu(torch.nn.functional.linear(input, self.weight, self.bias))


class Linear(torch.nn.Linear, metaclass=abc.ABCMeta):  # type: ignore[no-redef]  # for torch's, by the *
    """``torch.nn.Linear``, alike in everything that can be seen.

    input ``(..., in_features)``, output ``(..., out_features)``. ``isinstance(layer, Linear)`` is true of
    torch's own Linears too, such as those in ``nn.Transformer``: code that initialises or counts by it finds
    all. ``type(layer)`` tells the two apart.

    >>> Linear(4, 2)(torch.randn(8, 4)).shape
    torch.Size([8, 2])
    """

    @classmethod
    def __subclasshook__(cls, kind: type) -> Any:
        return issubclass(kind, torch.nn.Linear) if cls is Linear else NotImplemented

    @_scripted_as(_plain_linear)
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if _TORCHS_LINEAR.forward is not LINEAR_FORWARD:  # somebody has replaced it for all Linears
            _functional.say_patched(input, self.weight, self.bias, False)
            return super().forward(input)
        if type(self) is Linear and _own_parameters(
            self
        ):  # each attribute would cost a tenth of a small call
            own = self._parameters
            return _functional.linear(input, own["weight"], own["bias"])  # type: ignore[arg-type]
        return _functional.linear(input, self.weight, self.bias)


class LinearReLU(Linear):
    """A Linear whose output goes through ReLU, in one kernel where there is one.

    Arguments, parameters, initial values and keys of ``torch.nn.Linear``. Tools that replace a module
    because it is a ``torch.nn.Linear`` may forget its ReLU: for those, write Linear and ReLU.

    >>> bool((LinearReLU(4, 2)(torch.randn(8, 4)) >= 0).all())
    True
    """

    @_scripted_as(_plain_linear_relu)
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if _TORCHS_LINEAR.forward is not LINEAR_FORWARD:
            _functional.say_patched(input, self.weight, self.bias, True)
            return torch.nn.functional.relu(_TORCHS_LINEAR.forward(self, input))
        return _functional.linear_relu(input, self.weight, self.bias)


class LazyLinear(torch.nn.LazyLinear, Linear):  # type: ignore[no-redef]
    """``torch.nn.LazyLinear``: its first input says in_features, and from then on it is a :class:`Linear`.

    >>> LazyLinear(2)(torch.randn(8, 4)).shape
    torch.Size([8, 2])
    """

    cls_to_become = Linear

    @classmethod
    def __subclasshook__(cls, kind: type) -> Any:
        return issubclass(kind, torch.nn.LazyLinear) if cls is LazyLinear else NotImplemented


class Sequential(torch.nn.Sequential, metaclass=abc.ABCMeta):  # type: ignore[no-redef]
    """``torch.nn.Sequential`` that runs each stretch Linear, ReLU, Linear, ReLU, ... as one operation.

    A stretch is as long as can be, and ends where somebody could notice: at a module of any other kind, at a
    hook, a subclass, a parametrization or a patched forward, and where a layer comes a second time. To
    ``isinstance``, torch's own Sequentials are such too, as its Linears are to :class:`Linear`.

    >>> Sequential(Linear(4, 3), ReLU(), Linear(3, 1))(torch.randn(8, 4)).shape
    torch.Size([8, 1])
    """

    @classmethod
    def __subclasshook__(cls, kind: type) -> Any:
        return issubclass(kind, torch.nn.Sequential) if cls is Sequential else NotImplemented

    @_scripted_as(torch.nn.Sequential.forward)
    def forward(self, input: Any) -> Any:
        # Somebody may be looking at the modules one by one: a tracer or compiler, by a wrapped input, by a
        # hook or by a patched call. Or somebody has replaced a forward for all.
        if (
            type(input) is not torch.Tensor
            or _TORCHS_SEQUENTIAL.forward is not SEQUENTIAL_FORWARD
            or _TORCHS_LINEAR.forward is not LINEAR_FORWARD
            or left_to_compiler(input)
            or _has_any_global_hook()
            or _MODULE.__call__ is not _MODULE_CALL
            or _MODULE._call_impl is not CALL_IMPL
        ):
            return super().forward(input)  # type: ignore[no-untyped-call]
        layers: list[torch.nn.Module] = []  # the stretch that is being collected,
        weights: list[torch.Tensor] = []
        biases: list[torch.Tensor | None] = []
        relu = False  # and whether it has a ReLU at its end
        for module in self:
            kind = type(module)
            if kind is torch.nn.ReLU and layers and not relu and _unobserved(module):
                relu = True
                continue
            linear = kind in _LINEARS and _unobserved(module) and _own_parameters(module)
            if layers and not (linear and relu and module not in layers):
                input = _run(input, weights, biases, relu)
                layers, weights, biases, relu = [], [], [], False
            if linear:
                layers.append(module)
                weights.append(module._parameters["weight"])  # type: ignore[arg-type]  # a Linear's is not None
                biases.append(module._parameters["bias"])
                relu = kind is LinearReLU
            else:
                input = module(input)
        return _run(input, weights, biases, relu) if layers else input

    def __add__(self, other: torch.nn.Sequential) -> "Sequential":
        return Sequential(*super().__add__(other))

    def __mul__(self, other: int) -> "Sequential":
        return Sequential(*super().__mul__(other))


class MLP(Sequential):
    """Linear, ReLU, Linear, ReLU, ..., Linear: a Sequential, with its keys ``0.weight``, ``2.weight``, ...

    in_features, the widths of the hidden layers (maybe none), out_features; bias, device and dtype as in
    ``torch.nn.Linear``. Input ``(..., in_features)``, output ``(..., out_features)``.

    >>> MLP(784, [256, 128], 10)(torch.randn(8, 784)).shape
    torch.Size([8, 10])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Sequence[int],
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        try:
            widths = [operator.index(width) for width in hidden_features]
        except TypeError:
            hint = f"hidden_features is a list of widths, such as [256, 128], got {hidden_features!r}"
            raise TypeError(hint) from None
        if callable(bias):  # an activation or a norm, as other libraries' MLPs take
            raise TypeError(f"bias is True or False, got {bias!r}; between the layers is always ReLU")
        layers: list[torch.nn.Module] = []
        for width in widths:
            layers += [Linear(in_features, width, bias, device, dtype), torch.nn.ReLU()]
            in_features = width
        super().__init__(*layers, Linear(in_features, out_features, bias, device, dtype))

    @overload
    def __getitem__(self, idx: slice) -> "Sequential": ...
    @overload
    def __getitem__(self, idx: int) -> torch.nn.Module: ...
    def __getitem__(self, idx: slice | int) -> torch.nn.Module:
        if isinstance(idx, slice):  # not an MLP, whose __init__ wants widths
            return Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)


_MODULE_CALL = torch.nn.Module.__call__
_LINEARS = (torch.nn.Linear, Linear, LinearReLU)
_FORWARDS: dict[type[torch.nn.Module], Callable[..., torch.Tensor]] = {
    kind: kind.forward for kind in (torch.nn.Linear, Linear, LinearReLU, torch.nn.ReLU)
}


def _run(
    input: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None], relu: bool
) -> torch.Tensor:
    if len(weights) > 1:
        return _functional.mlp(input, weights, biases, final_relu=relu)
    return (_functional.linear_relu if relu else _functional.linear)(input, weights[0], biases[0])


def _unobserved(module: torch.nn.Module) -> bool:
    """Whether a call of this module is its class's own forward and nothing else."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or module._compiled_call_impl is not None
        or "forward" in own
        or type(module).forward is not _FORWARDS[type(module)]
    )


def _own_parameters(module: torch.nn.Module) -> bool:
    """Whether weight and bias are the registered ones: no plain attribute of that name is in the way."""
    own, attributes = module._parameters, module.__dict__
    return "weight" in own and "bias" in own and "weight" not in attributes and "bias" not in attributes


def __getattr__(name: str) -> Any:
    if name.startswith("__"):  # torch.nn's __path__ or __file__, for one, are not ours
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})


__all__ = [name for name in dir(torch.nn) if not name.startswith("_")] + ["LinearReLU", "MLP"]
