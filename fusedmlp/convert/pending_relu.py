"""A Linear whose ReLU is called in your own forward: its output is computed when its first use is known."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_map_only

from fusedmlp import functional, nn
from fusedmlp.dispatch.autocast import autocast_dtype
from fusedmlp.dispatch.backend_choice import forced, quiet, recorded
from fusedmlp.dispatch.predicate import record, surely_unfused
from fusedmlp.torch_tools.patched import LINEAR_FORWARD

_MODULE_CALL = torch.nn.Module.__call__
_RELU = (torch.relu, torch.Tensor.relu)
_TENSOR: Any = torch.Tensor
_ASKS_FOR_GRADIENT = (
    _TENSOR.register_hook,
    _TENSOR.retain_grad,
    _TENSOR.grad_fn.__get__,
    # backward(inputs=[z]) leaves its result in z.grad. Before torch 2.15 __torch_function__ does not see that
    # backward, only this access.
    _TENSOR.grad.__get__,
)
# Functions that return or store the gradient of their inputs, and the position of their argument ``inputs``.
_TAKES_INPUTS: dict[Any, int] = {torch.autograd.grad: 1, torch.autograd.backward: 4, _TENSOR.backward: 4}


def is_relu(function: Any, rest: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """True if ``function(z, *rest, **keywords)`` is ReLU and does not work in place.

    ``clamp(min=0)`` does not count: its gradient differs where z is NaN and, before torch 2.15, where z is 0.
    """
    if function is F.relu:
        inplace = rest[0] if rest else keywords.get("inplace", False)
        return not (inplace or len(rest) > 1 or keywords.keys() - {"inplace"})
    return function in _RELU and not rest and not keywords


def more_than_forward(module: torch.nn.Module) -> str | None:
    """The code besides its class's forward that a call of this module runs ("has hooks"), or None.

    A Linear is not fused with its ReLU if either has a hook. Both then run one after the other, and every
    hook fires at every call, with the tensors that it gets in an unfused model. ``fuse`` checks each pair
    that it finds. ``LinearBeforeReLU`` checks again at each call, for hooks that are registered later, as
    ``nn.Sequential`` does for its members.
    """
    # A lazy module has a pre-hook of its own until its first call.
    if module._forward_hooks or len(module._forward_pre_hooks) > ("_initialize_hook" in module.__dict__):
        return "has hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has backward hooks"
    if "forward" in module.__dict__:
        return "has a patched forward"
    if module._compiled_call_impl is not None:
        return "is compiled"
    return None


class LinearBeforeReLU(nn.Linear):
    """The class that ``fuse`` gives to a Linear whose output always goes to ReLU; do not build it yourself.

    Where the kernels run, its forward computes ReLU too. It returns a tensor that passes this result to ReLU,
    and that becomes the output of the Linear at any other use.
    """

    @nn._scripted_as(nn._plain_linear)
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if torch.nn.Linear.forward is not LINEAR_FORWARD:
            return super().forward(input)
        if surely_unfused(input, (weight,)):
            return functional.linear(input, weight, bias)
        if torch.compiler.is_compiling():
            # A compiler sees the ReLU itself, and cannot trace a tensor that waits for it.
            return (functional.linear if forced() else F.linear)(input, weight, bias)
        reason = functional.why_not_fused(input, weight, bias) or _why_not_deferred(self, input, weight, bias)
        if reason is None:
            return _DeferredOutput.of(input, weight, bias)
        if quiet() or forced():
            return functional.linear(input, weight, bias)
        # Report the pair to explain() here: functional.linear would report a Linear without a ReLU.
        record(input, [weight], [bias], True, reason)
        with recorded(None):
            return functional.linear(input, weight, bias)


# Tools go by the name of a layer's class, and repr shows it. Pickles use __qualname__, which stays.
LinearBeforeReLU.__name__ = "Linear"


# Not a method: a caller may have kept the bound forward, and unfuse has given the Linear another class since.
def _why_not_deferred(linear: torch.nn.Module, *tensors: torch.Tensor | None) -> str | None:
    """Why the output of the Linear must be computed at once, or None if it can wait for its ReLU."""
    if reason := more_than_forward(linear):
        return f"The Linear {reason}."
    if _has_any_global_hook() or torch.nn.Module.__call__ is not _MODULE_CALL:
        return "A hook on every module sees the output of the Linear."
    if torch.is_inference_mode_enabled() or any(t.is_inference() for t in tensors if t is not None):
        # Inference tensors have no version, so a later change in place could not be noticed.
        return "In inference mode the output of the Linear cannot wait for its ReLU."
    return None


class _DeferredOutput(torch.Tensor):
    """Stands for ``z = linear(x, weight, bias)`` and holds ``y = relu(z)`` until the first use of either.

        waiting ──ReLU──────────> ReLU taken     ReLU got y; other uses get z, but not its gradient
           │
           ├──anything else─────> (z itself)     this very object is now the ordinary tensor z
           │
           └──the same, but the
              object cannot
              become z──────────> linear only    every use gets z

    z is computed when it is first needed. This object has no memory, so that C++ code that reads it raises an
    error instead of computing with wrong values.
    """

    _state: Literal["waiting", "ReLU taken", "linear only"]
    _y: torch.Tensor  # only while waiting
    _arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    _versions: list[int]
    _grad_mode: bool
    _needs_grad: bool
    _autocast: torch.dtype | None

    @staticmethod
    def of(*arguments: Any) -> torch.Tensor:
        # Compute y now, from these values and under these settings: both may change before ReLU is called.
        y = functional.linear_relu(*arguments)
        # With y's requires_grad, _known_to_autograd can tell whether this object got into autograd's graph.
        self: _DeferredOutput = _TENSOR._make_wrapper_subclass(
            _DeferredOutput, y.shape, dtype=y.dtype, device=y.device, requires_grad=y.requires_grad
        )
        self._state, self._y = "waiting", y
        self._arguments, self._versions = arguments, _versions(arguments)
        self._grad_mode, self._needs_grad = torch.is_grad_enabled(), y.requires_grad
        self._autocast = autocast_dtype(y.device.type)
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and type(args[0]) is cls:
            if is_relu(func, args[1:], kwargs) and (y := args[0]._give_y()) is not None:
                return y
            if func in _ASKS_FOR_GRADIENT:
                args[0]._refuse_after_relu()
        if func in _TAKES_INPUTS:
            tree_map_only(cls, cls._refuse_after_relu, (args[_TAKES_INPUTS[func] :], kwargs.get("inputs")))
        args, kwargs = tree_map_only(cls, cls._become_z, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls._z_without_gradient, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _refuse_after_relu(self) -> None:
        if self._state == "ReLU taken" and self._grad_mode:
            raise RuntimeError(
                "the gradient of a Linear's output is asked for after ReLU was fused into the Linear; "
                "call fusedmlp.unfuse(model), or ask before the ReLU"
            )

    def _give_y(self) -> torch.Tensor | None:
        """y for the first ReLU, or None if ReLU has to be computed from z."""
        if (
            self._state != "waiting"
            or torch.is_grad_enabled() != self._grad_mode
            or (self._needs_grad and self._known_to_autograd())
        ):
            return None
        y, self._state = self._y, "ReLU taken"
        del self._y  # a second ReLU must return a second tensor
        return y

    def _become_z(self) -> torch.Tensor:
        """Turn this object into z and return it; if that cannot be, return z."""
        if self._known_to_autograd():
            return self._z_without_gradient()
        z = self._z
        if self._state != "waiting":  # once ReLU took y, this object stays: it refuses to give z's gradient
            return z
        self._state = "linear only"
        del self._y
        try:
            torch.utils.swap_tensors(self, z)
        except RuntimeError:  # the object has a weak reference
            return z
        z.__dict__.clear()  # the two have swapped: this is the deferred object, which would keep x alive
        return self

    def _z_without_gradient(self) -> torch.Tensor:
        """z for code that put this object into autograd's graph in place of z: only if z has no gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            linked = self.requires_grad
        if self._z.requires_grad or linked:
            raise RuntimeError(
                "the output of a Linear that fuse paired with a ReLU went to an autograd.Function or to C++ "
                "code, where its gradient would be lost; call fusedmlp.fuse(model) again, or unfuse(model)"
            )
        return self._z

    @functools.cached_property
    def _z(self) -> torch.Tensor:
        """The output of the Linear under the settings of its call."""
        if _versions(self._arguments) != self._versions:
            raise RuntimeError(
                "the output of a Linear that fuse paired with a ReLU is used after its input, weight or "
                "bias was changed in place; call fusedmlp.fuse(model) again, or fusedmlp.unfuse(model)"
            )
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(self._grad_mode),
            torch.autocast(
                self._arguments[0].device.type, dtype=self._autocast, enabled=self._autocast is not None
            ),
        ):
            return F.linear(*self._arguments)

    def _known_to_autograd(self) -> bool:
        """True if an autograd.Function has taken this object and holds a reference to it, or returned it."""
        with torch._C.DisableTorchFunctionSubclass():
            uses = self._use_count()  # type: ignore[attr-defined, unused-ignore]  # not in every version's types
            return uses > 1 or self.requires_grad is not self._needs_grad or not self.is_leaf


def _versions(tensors: Sequence[torch.Tensor | None]) -> list[int]:
    return [t._version for t in tensors if t is not None]
