"""All of ``torch.nn``, with fused ``Linear`` and ``Sequential``, and the new ``LinearReLU`` and ``MLP``.

    from fusedmlp import nn  # instead of: from torch import nn

Parameters, initial values, ``state_dict`` keys and ``repr`` are the same: checkpoints go both ways.
"""

import abc
import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
import torch.nn
from torch.nn import *  # noqa: F403  all of torch.nn, whatever its version has
from torch.nn.modules.module import _has_any_global_hook

from fusedmlp import functional as _functional
from fusedmlp.dispatch.predicate import left_to_compiler, record
from fusedmlp.nn import _same_modules
from fusedmlp.torch_tools.patched import CALL_IMPL, LINEAR_FORWARD, SEQUENTIAL_FORWARD, why_patched

_same_modules.install()
__path__ = []  # the .pyi files in this folder are for type checkers; there is no module to import

# Global names, which small calls read faster than attributes.
_MODULE, _TORCHS_LINEAR, _TORCHS_SEQUENTIAL = torch.nn.Module, torch.nn.Linear, torch.nn.Sequential
_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def _scripted_as(plain: Callable[..., Any]) -> Callable[[_Forward], _Forward]:
    """Have ``torch.jit.script`` compile another function in place of this forward.

    It compiles the source that ``inspect`` finds, which follows ``__wrapped__``. ``__prepare_scriptable__``,
    made for this, would replace the members of the model on which ``torch.jit.script`` is called.
    """
    wraps: Any = functools.wraps(plain, assigned=(), updated=())  # sets __wrapped__ alone
    return wraps  # type: ignore[no-any-return]


def _plain_linear(self: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(input, self.weight, self.bias)


def _plain_linear_relu(self: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return torch.relu(torch.nn.functional.linear(input, self.weight, self.bias))


class Linear(torch.nn.Linear, metaclass=abc.ABCMeta):  # type: ignore[no-redef]  # for torch's, by the *
    """``torch.nn.Linear`` with the same parameters, arguments and results.

    input ``(..., in_features)``, output ``(..., out_features)``. ``isinstance(layer, Linear)`` is true for
    torch's own Linears too, such as those in ``nn.Transformer``, so that code which initialises or counts
    layers by it finds all of them. ``type(layer)`` tells the two apart.

    >>> Linear(4, 2)(torch.randn(8, 4)).shape
    torch.Size([8, 2])
    """

    @classmethod
    def __subclasshook__(cls, kind: type) -> Any:
        return issubclass(kind, torch.nn.Linear) if cls is Linear else NotImplemented

    @_scripted_as(_plain_linear)
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if _TORCHS_LINEAR.forward is not LINEAR_FORWARD:  # replaced for all Linears
            record(input, [self.weight], [self.bias], False, why_patched())
            return super().forward(input)
        if type(self) is Linear and _own_parameters(self):
            own = self._parameters  # self.weight and self.bias would each cost a tenth of a small call
            return _functional.linear(input, own["weight"], own["bias"])  # type: ignore[arg-type]
        return _functional.linear(input, self.weight, self.bias)


class LinearReLU(Linear):
    """A Linear with a ReLU on its output, computed by one kernel where the kernels run.

    Arguments, parameters, initial values and keys are those of ``torch.nn.Linear``. Tools that replace a
    module because it is a ``torch.nn.Linear`` may lose its ReLU: with those, write Linear and ReLU.

    >>> bool((LinearReLU(4, 2)(torch.randn(8, 4)) >= 0).all())
    True
    """

    @_scripted_as(_plain_linear_relu)
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if _TORCHS_LINEAR.forward is not LINEAR_FORWARD:
            record(input, [self.weight], [self.bias], True, why_patched())
            return torch.nn.functional.relu(_TORCHS_LINEAR.forward(self, input))
        return _functional.linear_relu(input, self.weight, self.bias)


class LazyLinear(torch.nn.LazyLinear, Linear):  # type: ignore[no-redef]
    """``torch.nn.LazyLinear``: takes in_features from its first input, and becomes a :class:`Linear` then.

    >>> LazyLinear(2)(torch.randn(8, 4)).shape
    torch.Size([8, 2])
    """

    cls_to_become = Linear

    @classmethod
    def __subclasshook__(cls, kind: type) -> Any:
        return issubclass(kind, torch.nn.LazyLinear) if cls is LazyLinear else NotImplemented


class Sequential(torch.nn.Sequential, metaclass=abc.ABCMeta):  # type: ignore[no-redef]
    """``torch.nn.Sequential`` that runs each chain Linear, ReLU, Linear, ReLU, ... as one operation.

    A chain is as long as possible. It ends at a module of any other kind, at a hook, a subclass, a
    parametrization or a patched forward, and where a layer comes a second time. ``isinstance(model,
    Sequential)`` is true for torch's own Sequentials too, as it is for :class:`Linear`.

    >>> Sequential(Linear(4, 3), ReLU(), Linear(3, 1))(torch.randn(8, 4)).shape
    torch.Size([8, 1])
    """

    @classmethod
    def __subclasshook__(cls, kind: type) -> Any:
        return issubclass(kind, torch.nn.Sequential) if cls is Sequential else NotImplemented

    @_scripted_as(torch.nn.Sequential.forward)
    def forward(self, input: Any) -> Any:
        # The modules must run one by one if the input is wrapped, a compiler traces them, a global hook sees
        # them, or a function that calls them was replaced.
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
        # Example: Linear a, ReLU, Linear b, Tanh, Linear c, ReLU. a starts a chain, its ReLU is noted, and b
        # joins. Tanh ends the chain: _run computes relu(a) and b at once, and Tanh runs. c starts the next
        # chain, its ReLU is noted, and the last line runs both.
        layers: list[torch.nn.Module] = []  # of the chain that is being collected
        weights: list[torch.Tensor] = []
        biases: list[torch.Tensor | None] = []
        relu = False  # True if the chain so far ends in a ReLU
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
        if callable(bias):  # an activation or a norm, which other libraries' MLPs take there
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
        if isinstance(idx, slice):  # torch's would call type(self), and MLP's __init__ takes widths
            return Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)


_MODULE_CALL = torch.nn.Module.__call__
_LINEARS = (torch.nn.Linear, Linear, LinearReLU)
_FORWARDS: dict[type[torch.nn.Module], Callable[..., torch.Tensor]] = {
    kind: kind.forward for kind in (*_LINEARS, torch.nn.ReLU)
}


def _run(
    input: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None], relu: bool
) -> torch.Tensor:
    if len(weights) > 1:
        return _functional.mlp(input, weights, biases, final_relu=relu)
    return (_functional.linear_relu if relu else _functional.linear)(input, weights[0], biases[0])


def _unobserved(module: torch.nn.Module, forwards: dict[Any, Any] = _FORWARDS) -> bool:
    """True if a call of this module runs its class's own forward, as in ``forwards``, and nothing else."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or module._compiled_call_impl is not None
        or "forward" in own
        or type(module).forward is not forwards[type(module)]
    )


def _own_parameters(module: torch.nn.Module) -> bool:
    """True if weight and bias are the registered parameters, not hidden by plain attributes of that name."""
    own, attributes = module._parameters, module.__dict__
    return "weight" in own and "bias" in own and "weight" not in attributes and "bias" not in attributes


def __getattr__(name: str) -> Any:
    if name.startswith("__"):  # not torch.nn's __path__ or __file__, for example
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})


__all__ = [name for name in dir(torch.nn) if not name.startswith("_")] + ["LinearReLU", "MLP"]
