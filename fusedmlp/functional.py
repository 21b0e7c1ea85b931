"""Linear, Linear+ReLU and whole chains of them as functions: ``torch.nn.functional``'s, fused."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fusedmlp.dispatch import onednn
from fusedmlp.dispatch.autocast import autocast_dtype, dtype_after_cast
from fusedmlp.dispatch.autograd_function import fused_mlp
from fusedmlp.dispatch.backend_choice import chosen, forced
from fusedmlp.dispatch.predicate import choose_kernels, why_not_fused, why_not_fused_mlp

__all__ = ["linear", "linear_relu", "mlp", "why_not_fused", "why_not_fused_mlp"]


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``input @ weight.T + bias``, as ``torch.nn.functional.linear``.

    input ``(..., in_features)``, weight ``(out_features, in_features)``, bias ``(out_features,)`` or None, of
    one dtype on one device; returns ``(..., out_features)``. Raises what torch raises, naming the shapes.

    >>> linear(torch.randn(8, 4), torch.randn(2, 4)).shape
    torch.Size([8, 2])
    """
    try:
        # Without a ReLU there is nothing to fuse, so the kernels run only if a backend is forced.
        if chosen.quiet or not choose_kernels(input, (weight,), (bias,), False):
            return onednn.linear_forward(input, weight, bias, False)
        return fused_mlp(input, (weight,), (bias,), False)
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
        if choose_kernels(input, (weight,), (bias,), True):
            return fused_mlp(input, (weight,), (bias,), True)
        return onednn.linear_forward(input, weight, bias, True)
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
        if choose_kernels(x, weights, biases, final_relu):
            return fused_mlp(x, weights, biases, final_relu)
        return onednn.mlp_forward(x, weights, biases, final_relu)
    except RuntimeError as error:
        shape = tuple(x.shape)
        for weight, bias in zip(weights, biases, strict=True):
            _raise_clearer(error, x, weight, bias, shape)
            shape = (*shape[:-1], *weight.shape[:1])  # no mistake in this layer: the next one's input
        raise


def _raise_clearer(
    error: RuntimeError,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Raise the same type of error with the caller's mistake in words, if there is one that it does not name.

    torch's own sentence stays in the message, so that code and tests that match on it go on working.
    """
    if type(error) is not RuntimeError or torch.compiler.is_compiling():  # out of memory, for one
        return
    problem = _mistake(input, weight, bias, shape)
    sentence: str | None = str(error)
    if forced():  # the error is our refusal: torch has not been asked yet
        sentence = _torchs_sentence(input, weight, bias, shape)
        if problem is None and sentence is not None:
            problem = str(error)
    if problem is None or (sentence == str(error) and problem in sentence):
        return
    raise RuntimeError(problem if sentence is None else f"{problem} (torch: {sentence})") from error


def _torchs_sentence(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: tuple[int, ...] | None
) -> str | None:
    """What torch raises for this layer, or None if it accepts it."""
    try:
        with torch.no_grad():
            F.linear(input if shape is None else input.new_empty(shape), weight, bias)
    except Exception as error:
        return str(error) if type(error) is RuntimeError else None
    return None


def _mistake(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: tuple[int, ...] | None
) -> str | None:
    """The caller's mistake in words, if there is one; asked only after an error.

    shape: of this layer's input, if that is not ``input`` itself but computed from it.
    """
    tensors = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    if any(type(t) not in (torch.Tensor, torch.nn.Parameter) or t.is_nested for t in tensors.values()):
        return None
    shape = tuple(input.shape) if shape is None else shape
    shapes = f"input {shape}, weight {tuple(weight.shape)}"
    shapes += "" if bias is None else f", bias {tuple(bias.shape)}"
    strict = forced()  # then torch may well accept these tensors
    if weight.dim() != 2:
        needed = "linear needs a weight of shape (out_features, in_features)"
        return None if strict else f"{needed}, got {shapes}"
    if shape[-1:] != weight.shape[1:]:
        K = weight.shape[1]
        return f"linear with in_features={K} needs an input of shape (..., {K}), got {shapes}"
    N = weight.shape[0]
    wrong_bias = f"linear with out_features={N} needs a bias of shape ({N},), got {shapes}"
    # torch accepts a bias of one number as well, and one of more dimensions if they fit the input's.
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
