"""Linear, Linear+ReLU and whole chains of them as functions: ``torch.nn.functional``'s, fused."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fusedmlp.dispatch import onednn, reference
from fusedmlp.dispatch.autograd_function import fused_mlp
from fusedmlp.dispatch.backend_choice import forced, quiet
from fusedmlp.dispatch.predicate import (
    autocast_dtype,
    cast,
    dtype_after_cast,
    record,
    surely_too_little,
    surely_unfused,
    why_not_fused,
    why_not_fused_mlp,
)
from fusedmlp.torch_tools.patched import why_patched

__all__ = ["linear", "linear_relu", "mlp", "why_not_fused", "why_not_fused_mlp"]


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``input @ weight.T + bias``, as ``torch.nn.functional.linear``.

    input ``(..., in_features)``, weight ``(out_features, in_features)``, bias ``(out_features,)`` or None, of
    one dtype on one device; returns ``(..., out_features)``. Raises what torch raises, naming the shapes.

    >>> linear(torch.randn(8, 4), torch.randn(2, 4)).shape
    torch.Size([8, 2])
    """
    try:
        # Without a ReLU there is nothing to fuse: why_not_fused says so of every call that is not forced.
        if quiet():
            if onednn.off() or not surely_unfused(input) or onednn.too_small(input):
                return F.linear(input, weight, bias)
            return onednn.linear_forward(input, weight, bias, False)
        return _fused_or_reason(input, [weight], [bias], False)
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
        if surely_unfused(input) or surely_too_little(input, (weight,)):
            return onednn.linear_forward(input, weight, bias, True)
        return _fused_or_reason(input, [weight], [bias], True)
    except RuntimeError as error:
        _raise_clearer(error, input, weight, bias)
        raise


def mlp(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *,
    final_relu: bool = False,
) -> torch.Tensor:
    """Linear, ReLU, Linear, ReLU, ..., Linear, and with ``final_relu`` a last ReLU, as one operation.

    x ``(..., K)``; weights ``(N, K)`` each, the K of one the N of the one before; biases ``(N,)`` or None for
    each weight; of one dtype on one device. Returns ``(..., N)`` of the last. Raises ValueError unless there
    is one bias or None for each of at least one weight, TypeError for what is no list, and else what
    :func:`linear` raises.

    In the backward the ReLU's mask and the bias gradient of a hidden layer are computed in the product that
    makes its gradient, so that no pass over the activations is left.

    >>> mlp(torch.randn(8, 4), [torch.randn(3, 4), torch.randn(2, 3)], [torch.randn(3), None]).shape
    torch.Size([8, 2])
    """
    try:
        wrong_number = len(weights) != len(biases) or not weights
    except (TypeError, RuntimeError):  # None, a generator, a tensor
        kinds = f"{type(weights).__name__} and {type(biases).__name__}"
        raise TypeError(f"mlp takes a list of weights and a list of biases, got {kinds}") from None
    if wrong_number:
        raise ValueError(
            f"mlp needs at least one weight, and for each a bias or None, "
            f"got {len(weights)} weights and {len(biases)} biases"
        )
    try:
        if surely_unfused(x) or surely_too_little(x, weights):
            return _plain(x, weights, biases, final_relu)
        return _fused_or_reason(x, weights, biases, final_relu)
    except RuntimeError as error:
        shape = tuple(x.shape)
        for weight, bias in zip(weights, biases, strict=True):
            _raise_clearer(error, x, weight, bias, shape)
            shape = (
                *shape[:-1],
                *weight.shape[:1],
            )  # this layer was right: the shape of the next one's input
        raise


def _fused_or_reason(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    final_relu: bool,
) -> torch.Tensor:
    reason = why_not_fused_mlp(x, weights, biases, final_relu=final_relu)
    if not torch.compiler.is_compiling():
        record(x, weights, biases, final_relu, reason)
    if reason is not None and forced():
        _refuse(reason, x, weights, biases)
    if reason is None:
        dtype = autocast_dtype(x.device.type)
        if dtype is not None:  # as autocast itself, operator by operator: outside of what is differentiated
            x, weights = cast(x, dtype), [cast(weight, dtype) for weight in weights]
            biases = [None if bias is None else cast(bias, dtype) for bias in biases]
        return fused_mlp(x, weights, biases, final_relu)
    return _plain(x, weights, biases, final_relu)


def _plain(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    final_relu: bool,
) -> torch.Tensor:
    """By PyTorch's operators."""
    last = len(weights) - 1
    if onednn.off():
        return reference.mlp_forward(x, weights, biases, final_relu, last)[0]
    for i, weight in enumerate(weights):
        x = onednn.linear_forward(x, weight, biases[i], final_relu or i < last)
    return x


def say_patched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool) -> None:
    """Tell who records, or insists on the kernels, that a layer runs a function which replaced torch's."""
    if not quiet():
        reason = why_patched() or "a function of torch was replaced"
        record(x, [weight], [bias], relu, reason)
        if forced():
            _refuse(reason, x, [weight], [bias])


def _refuse(
    reason: str, x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> None:
    tensors = (x, *weights, *(bias for bias in biases if bias is not None))
    if all(isinstance(tensor, torch.Tensor) for tensor in tensors):  # else torch has a TypeError to raise
        auto = "backend('auto') leaves it to PyTorch's operators"
        raise RuntimeError(f"backend('triton') is in force, but {reason}; {auto}")


def _raise_clearer(
    error: RuntimeError,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Raise the same type of error with the caller's mistake in words, if there is one and it is not said.

    torch's own sentence stays in the message: code and tests that match on it go on working.
    """
    if type(error) is not RuntimeError or torch.compiler.is_compiling():  # out of memory, for one
        return
    problem = _mistake(input, weight, bias, shape)
    sentence: str | None = str(error)
    if forced():  # which refused before torch was asked
        sentence = _torchs_sentence(input, weight, bias, shape)
        if problem is None and sentence is not None:
            problem = str(error)
    if problem is None or (sentence == str(error) and problem in sentence):
        return
    raise RuntimeError(problem if sentence is None else f"{problem} (torch: {sentence})") from error


def _torchs_sentence(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: tuple[int, ...] | None
) -> str | None:
    """What torch raises for this layer, or None if it takes it."""
    try:
        with torch.no_grad():
            F.linear(input if shape is None else input.new_empty(shape), weight, bias)
    except Exception as error:
        return str(error) if type(error) is RuntimeError else None
    return None


def _mistake(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: tuple[int, ...] | None
) -> str | None:
    """The caller's mistake in words, if there is one; only asked once torch has refused.

    shape: what goes into this layer has this shape, and device and dtype of ``input``.
    """
    tensors = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    if any(type(t) not in (torch.Tensor, torch.nn.Parameter) or t.is_nested for t in tensors.values()):
        return None
    shape = tuple(input.shape) if shape is None else shape
    shapes = f"input {shape}, weight {tuple(weight.shape)}"
    shapes += "" if bias is None else f", bias {tuple(bias.shape)}"
    strict = forced()  # then it may be that torch has not refused
    if weight.dim() != 2:
        needed = "linear needs a weight of shape (out_features, in_features)"
        return None if strict else f"{needed}, got {shapes}"
    if shape[-1:] != weight.shape[1:]:
        K = weight.shape[1]
        return f"linear with in_features={K} needs an input of shape (..., {K}), got {shapes}"
    N = weight.shape[0]
    wrong_bias = f"linear with out_features={N} needs a bias of shape ({N},), got {shapes}"
    # torch takes a bias of one number as well, and one of more dimensions if they fit the input's.
    if bias is not None and bias.numel() != 1 and bias.shape[-1:] != (N,):
        return wrong_bias
    if len({tensor.device for tensor in tensors.values()}) > 1:
        where = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        return f"linear needs its tensors on one device, got {where} ({shapes})"
    kind = input.device.type
    autocast = autocast_dtype(kind) if torch.amp.is_autocast_available(kind) else None
    if len({dtype_after_cast(tensor.dtype, autocast) for tensor in tensors.values()}) > 1:
        what = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        return f"linear needs its tensors in one dtype, got {what} ({shapes})"
    return wrong_bias if bias is not None and bias.dim() > 1 and not strict else None
