"""Linear, Linear+ReLU and whole chains of layers as functions, fused where the kernels run."""

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

    x ``(..., K)``; weights ``(N, K)``, where each K is the N of the layer before; for each weight a bias
    ``(N,)`` or None. All have one dtype and one device. Returns ``(..., N)`` with the N of the last layer.
    Raises ValueError unless there is at least one weight, and one bias or None for each; TypeError if weights
    or biases is not a list; otherwise what :func:`linear` raises.

    In the backward, the product that makes a hidden layer's gradient also applies the ReLU's mask and sums
    the bias gradient, so that no separate pass over the activations is needed.

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
        for weight, bias in zip(weights, biases, strict=True):
            _raise_clearer(error, x, weight, bias)
            # This layer has no mistake. The next one's input has this shape, and needs no memory here.
            one = torch.empty((), dtype=x.dtype, device=x.device)
            x = one.expand(*x.shape[:-1], *weight.shape[:1])
        raise


def _raise_clearer(
    error: RuntimeError, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Raise the same type of error with the caller's mistake in words, if torch's message does not name it.

    torch's own sentence stays in the message, so that code and tests that match on it go on working.
    """
    if type(error) is not RuntimeError or torch.compiler.is_compiling():  # not out of memory, for example
        return
    problem = _mistake(input, weight, bias)
    sentence: str | None = str(error)
    if forced():  # the error is our refusal, and torch has not seen the tensors yet
        sentence = _torchs_sentence(input, weight, bias)
        if problem is None and sentence is not None:
            problem = str(error)
    if problem is None or (sentence == str(error) and problem in sentence):
        return
    raise RuntimeError(problem if sentence is None else f"{problem} (torch: {sentence})") from error


def _torchs_sentence(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """The message of the RuntimeError that torch raises for this layer, or None if it raises none."""
    try:
        with torch.no_grad():
            F.linear(input, weight, bias)
    except Exception as error:
        return str(error) if type(error) is RuntimeError else None
    return None


def _mistake(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """The caller's mistake in words, or None. This is called only after an error."""
    tensors = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    if any(type(t) not in (torch.Tensor, torch.nn.Parameter) or t.is_nested for t in tensors.values()):
        return None
    shape = tuple(input.shape)
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
