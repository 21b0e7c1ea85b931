"""A Linear whose ReLU is called by somebody else's code: its output waits to hear whether ReLU is next."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_map_only

from fusedmlp import functional, nn
from fusedmlp.dispatch.backend_choice import forced, quiet
from fusedmlp.dispatch.predicate import autocast_dtype, record, surely_too_little, surely_unfused
from fusedmlp.torch_tools.patched import LINEAR_FORWARD

_MODULE_CALL = torch.nn.Module.__call__
_RELU = (torch.relu, torch.Tensor.relu)
_CLAMP = (torch.clamp_min, torch.Tensor.clamp_min, torch.clamp, torch.Tensor.clamp)
_TENSOR: Any = torch.Tensor
_WATCHES_GRADIENT = (
    _TENSOR.register_hook,
    _TENSOR.retain_grad,
    _TENSOR.grad_fn.__get__,
    # What backward(inputs=[z]) leaves there, which before torch 2.15 asks nothing of z that could be seen.
    _TENSOR.grad.__get__,
)
# Functions that give the gradient of their inputs, and from which argument on those come.
_TAKES_INPUTS: dict[Any, int] = {torch.autograd.grad: 1, torch.autograd.backward: 4, _TENSOR.backward: 4}


def which_relu(function: Any, rest: Sequence[Any], keywords: Mapping[str, Any]) -> str | None:
    """``"relu"``, ``"clamp"`` or None: what ``function(z, *rest, **keywords)`` is, and not in place.

    The gradients of the two differ where z is NaN, and before torch 2.15 where z is 0: relu's is 0 there,
    that of clamp_min(0) was 1.
    """
    if function in _RELU:
        return None if rest or keywords else "relu"
    if function is F.relu:
        inplace = rest[0] if rest else keywords.get("inplace", False)
        return None if inplace or len(rest) > 1 or keywords.keys() - {"inplace"} else "relu"
    if function in _CLAMP and len(rest) <= 2 and not keywords.keys() - {"min", "max"}:
        low = rest[0] if rest else keywords.get("min")
        high = rest[1] if len(rest) == 2 else keywords.get("max")
        # Not -0.0, which clamp_min passes on.
        zero = type(low) in (int, float) and low == 0 and math.copysign(1, low) > 0
        return "clamp" if zero and high is None else None
    return None


def observed(module: torch.nn.Module) -> str | None:
    """Why a call of this module is not just its class's own forward, or None if it is."""
    # A lazy module that has not been called yet has one of its own.
    if module._forward_hooks or len(module._forward_pre_hooks) > ("_initialize_hook" in module.__dict__):
        return "it has hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "it has backward hooks"
    if "forward" in module.__dict__:
        return "its forward is patched"
    if module._compiled_call_impl is not None:
        return "it is compiled"
    return None


def _who_watches(linear: torch.nn.Module) -> str | None:
    # A function of its own: somebody may have kept the forward, and called unfuse since.
    if reason := observed(linear):
        return f"of the Linear, {reason}"
    if _has_any_global_hook() or torch.nn.Module.__call__ is not _MODULE_CALL:
        return "a hook on every module sees the output of the Linear"
    return None


class LinearBeforeReLU(nn.Linear):
    """A Linear whose caller puts ReLU on its output, as fuse found out: for fuse to assign, not to build.

    Where the kernels run and nobody is looking, its forward computes ReLU too and returns a tensor that gives
    the result to ReLU, and turns into the ordinary output when anything else is asked of it.
    """

    @nn._scripted_as(nn._plain_linear)
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if torch.nn.Linear.forward is not LINEAR_FORWARD:
            return super().forward(input)
        if surely_unfused(input) or surely_too_little(input, (weight,)):
            return functional.linear(input, weight, bias)
        if torch.compiler.is_compiling():
            # A compiler sees the ReLU too, and could not look into a tensor that waits for it.
            return (functional.linear if forced() else F.linear)(input, weight, bias)
        reason = (
            functional.why_not_fused(input, weight, bias)
            or _who_watches(self)
            or self._why_not_wait(input, weight, bias)
        )
        if reason is None:
            return _Deferred.of(input, weight, bias)
        if quiet() or forced():
            return functional.linear(input, weight, bias)
        # Who records is told of the pair: functional.linear would say that there is no ReLU.
        record(input, [weight], [bias], True, reason)
        try:
            return F.linear(input, weight, bias)
        except RuntimeError as error:
            functional._raise_clearer(error, input, weight, bias)
            raise

    def _why_not_wait(self, *tensors: torch.Tensor | None) -> str | None:
        if torch.is_inference_mode_enabled() or any(t.is_inference() for t in tensors if t is not None):
            # A later change in place of an inference tensor cannot be noticed: they have no version.
            return "in inference mode the output of the Linear cannot wait for its ReLU"
        return None


class LinearBeforeClamp(LinearBeforeReLU):
    """The same before ``clamp_min(0)``, whose gradient is not quite ReLU's: it waits only without one."""

    def _why_not_wait(self, *tensors: torch.Tensor | None) -> str | None:
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None):
            return "the gradient of clamp_min(0) is not quite ReLU's"
        return super()._why_not_wait(*tensors)


class LazyLinearBeforeReLU(nn.LazyLinear):
    """A lazy one: what it is before its first call, which runs as ``nn.Linear``'s does."""

    cls_to_become = LinearBeforeReLU


class LazyLinearBeforeClamp(LazyLinearBeforeReLU):
    cls_to_become = LinearBeforeClamp


# Tools go by a layer's class name, and repr shows it. Pickles find a class by its __qualname__, which stays.
LinearBeforeReLU.__name__ = LinearBeforeClamp.__name__ = "Linear"
LazyLinearBeforeReLU.__name__ = LazyLinearBeforeClamp.__name__ = "LazyLinear"


class _Deferred(torch.Tensor):
    """Stands for ``z = linear(x, weight, bias)`` and holds ``y = relu(z)``, which is most likely asked next.

    A tensor without memory, so that C++ code meets an error and never wrong values. ReLU of it is y. Whatever
    else is asked of it, in Python or below, computes z first and turns this very object into it.
    """

    _arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    _versions: list[int]
    _grad_mode: bool
    _needs_grad: bool
    _autocast: torch.dtype | None
    _y: torch.Tensor | None
    _z: torch.Tensor | None

    @staticmethod
    def of(*arguments: Any) -> torch.Tensor:
        # y is computed here, not when it is asked for: under these settings and from these values.
        y = functional.linear_relu(*arguments)
        # requires_grad, so that whoever links this object into autograd's graph can be found out.
        self: _Deferred = _TENSOR._make_wrapper_subclass(
            _Deferred, y.shape, dtype=y.dtype, device=y.device, requires_grad=y.requires_grad
        )
        self._arguments, self._versions = arguments, _versions(arguments)
        self._grad_mode, self._needs_grad = torch.is_grad_enabled(), y.requires_grad
        self._autocast = autocast_dtype(y.device.type)
        self._y, self._z = y, None
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and type(args[0]) is cls:
            y = args[0]._relu(which_relu(func, args[1:], kwargs))
            if y is not None:
                return y
            if func in _WATCHES_GRADIENT:
                args[0]._refuse_after_relu()
        if func in _TAKES_INPUTS:
            tree_map_only(cls, cls._refuse_after_relu, (args[_TAKES_INPUTS[func] :], kwargs.get("inputs")))
        args, kwargs = tree_map_only(cls, cls._settle, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls._unlinked, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _refuse_after_relu(self) -> None:
        if self._y is None and self._grad_mode:
            raise RuntimeError(
                "the gradient of a Linear's output is asked for after ReLU was fused into the Linear; "
                "call fusedmlp.unfuse(model), or ask before the ReLU"
            )

    def _relu(self, kind: str | None) -> torch.Tensor | None:
        y = self._y
        if (
            kind is None
            or y is None
            or torch.is_grad_enabled() != self._grad_mode
            or (y.requires_grad and (kind == "clamp" or self._known_to_autograd()))
        ):
            return None
        self._y = None  # only once: a second ReLU gives a second tensor
        return y

    def _settle(self) -> torch.Tensor:
        """z, which this object then is, if it can be."""
        if self._known_to_autograd():
            return self._unlinked()
        z = self._value()
        if self._y is not None:  # once y is given away, the gradient of z is not y's: keep watch
            self._y = None
            try:
                torch.utils.swap_tensors(self, z)
            except RuntimeError:  # somebody has a weak reference
                return z
            return self
        return z

    def _unlinked(self) -> torch.Tensor:
        """z for who has linked this object, and not z, into autograd's graph: only without gradients."""
        z = self._value()
        with torch._C.DisableTorchFunctionSubclass():
            linked = self.requires_grad
        if z.requires_grad or linked:
            raise RuntimeError(
                "the output of a Linear that fuse paired with a ReLU went to an autograd.Function or to C++ "
                "code, where its gradient would be lost; call fusedmlp.fuse(model) again, or unfuse(model)"
            )
        return z

    def _value(self) -> torch.Tensor:
        if self._z is None:
            x = self._arguments[0]
            if _versions(self._arguments) != self._versions:
                raise RuntimeError(
                    "the output of a Linear that fuse paired with a ReLU is used after its input, weight or "
                    "bias was changed in place; call fusedmlp.fuse(model) again, or fusedmlp.unfuse(model)"
                )
            with (
                torch.inference_mode(False),
                torch.set_grad_enabled(self._grad_mode),
                torch.autocast(x.device.type, dtype=self._autocast, enabled=self._autocast is not None),
            ):
                self._z = F.linear(*self._arguments)
        return self._z

    def _known_to_autograd(self) -> bool:
        """Whether an autograd.Function has taken this object, and holds a reference, or returned it."""
        with torch._C.DisableTorchFunctionSubclass():
            uses = self._use_count()  # type: ignore[attr-defined, unused-ignore]  # not in every version's types
            return uses > 1 or self.requires_grad is not self._needs_grad or not self.is_leaf


def _versions(tensors: Sequence[torch.Tensor | None]) -> list[int]:
    return [t._version for t in tensors if t is not None]
