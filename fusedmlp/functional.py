"""Linear and Linear+ReLU as functions: what ``torch.nn.functional`` has, with the pair fused."""

import torch
from torch.nn import functional as F

from fusedmlp import _reference
from fusedmlp._autograd import fused_linear
from fusedmlp._dispatch import forced, surely_unfused, why_not_fused

__all__ = ["linear", "linear_relu", "why_not_fused"]


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``input @ weight.T + bias``, as ``torch.nn.functional.linear``.

    input ``(..., in_features)``, weight ``(out_features, in_features)``, bias ``(out_features,)`` or None, of
    one dtype on one device; returns ``(..., out_features)``. Raises what torch raises, naming the shapes.

    >>> linear(torch.randn(8, 4), torch.randn(2, 4)).shape
    torch.Size([8, 2])
    """
    try:
        # Without a ReLU there is nothing to fuse: why_not_fused says so of every call that is not forced.
        if not forced():
            return F.linear(input, weight, bias)
        return _fused_or_reason(input, weight, bias, False)
    except RuntimeError as error:
        _raise_clearer(error, input, weight, bias)
        raise


def linear_relu(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``relu(input @ weight.T + bias)``; arguments, result and errors as in :func:`linear`.

    NaN stays NaN, and the gradient is 0 where the output is 0, as with ``torch.relu``.

    >>> linear_relu(torch.randn(8, 4), torch.randn(2, 4)).min() >= 0
    tensor(True)
    """
    try:
        if surely_unfused(input):
            return _reference.linear_forward(input, weight, bias, True)
        return _fused_or_reason(input, weight, bias, True)
    except RuntimeError as error:
        _raise_clearer(error, input, weight, bias)
        raise


def _fused_or_reason(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool
) -> torch.Tensor:
    reason = why_not_fused(input, weight, bias, relu=relu)
    if reason is None:
        return fused_linear(input, weight, bias, relu)
    if (
        forced()
        and not torch.compiler.is_compiling()
        and isinstance(input, torch.Tensor)
        and isinstance(weight, torch.Tensor)
    ):
        raise RuntimeError(_mistake(input, weight, bias) or f"backend('triton') is in force, but {reason}")
    return _reference.linear_forward(input, weight, bias, relu)


def _raise_clearer(
    error: RuntimeError, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Raise the same type of error with the caller's mistake in words, if there is one and it is not said."""
    if type(error) is not RuntimeError:  # out of memory, for one
        return
    problem = _mistake(input, weight, bias)
    if problem is not None and problem != str(error):
        raise RuntimeError(problem) from error


def _mistake(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """The caller's mistake in words, if there is one; only asked once torch has refused."""
    tensors = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    if any(type(t) not in (torch.Tensor, torch.nn.Parameter) or t.is_nested for t in tensors.values()):
        return None
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    if weight.dim() == 2 and (input.dim() == 0 or input.shape[-1] != weight.shape[1]):
        K = weight.shape[1]
        return f"linear with in_features={K} needs an input of shape (..., {K}), got {shapes}"
    if bias is not None and weight.dim() == 2 and bias.shape != weight.shape[:1]:
        N = weight.shape[0]
        return f"linear with out_features={N} needs a bias of shape ({N},), got {shapes}"
    if len({tensor.device for tensor in tensors.values()}) > 1:
        where = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        return f"linear needs its tensors on one device, got {where} ({shapes})"
    kind = input.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # it mixes dtypes
    if not autocast and len({tensor.dtype for tensor in tensors.values()}) > 1:
        what = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        return f"linear needs its tensors in one dtype, got {what} ({shapes})"
    return None
