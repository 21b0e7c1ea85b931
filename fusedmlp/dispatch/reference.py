"""The launchers' names and signatures in plain torch: the path on the CPU, the oracle, double backward.

Everything here is differentiable by torch's own autograd, works in any dtype and on any device, and is what
``torch.nn.functional.linear`` followed by ``relu`` computes, bit for bit.
"""

from collections.abc import Sequence

import torch
from torch.compiler import is_compiling
from torch.nn import functional as F

from fusedmlp.torch_tools.patched import RELU, TORCH_RELU

# By name, as every call on a CPU asks: a chain of attributes is a tenth of a microsecond.
_function_modes, _dispatch_modes = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack


def linear_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool
) -> torch.Tensor:
    """``x (..., K) @ weight.T (K, N) + bias (N,)``, then ReLU if asked: ``(..., N)``."""
    y = F.linear(x, weight, bias)
    return _relu(y, not watched()) if relu else y


def watched() -> bool:
    """Whether a mode is active: it sees every operator, and may keep what one of them returned.

    Or a compiler, which makes no use of a ReLU in place: an exported graph is that of ``torch.nn``. Or a relu
    that replaced torch's, and wants to be called.
    """
    modes = is_compiling() or _function_modes() > 0 or _dispatch_modes() > 0
    return modes or F.relu is not RELU or torch.relu is not TORCH_RELU


def _relu(y: torch.Tensor, in_place: bool) -> torch.Tensor:
    # In place on a tensor that nobody else holds, and that linear's backward does not need: no second
    # tensor is written. threshold_backward is its gradient, as it is that of the one out of place.
    # Modes, subclasses, proxies and wrappers see the calls that a model on torch.nn makes. Up to torch 2.13
    # linear returns a view where x is no matrix, and autograd would rebuild that by as_strided.
    if in_place and type(y) is torch.Tensor and (y.dim() == 2 or not (y.requires_grad and _is_view(y))):
        return y.relu_()
    return F.relu(y)


def _is_view(y: torch.Tensor) -> bool:
    return not is_compiling() and y._is_view()  # which a compiler cannot be asked


def mlp_forward(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    final_relu: bool,
    keep: int,
    forced: bool = False,
) -> list[torch.Tensor]:
    """``x (..., K)`` through each ``weight (N, K)``, a ReLU between them and, if ``final_relu``, after the
    last: the outputs ``(..., N)`` of the layers from number ``keep`` on."""
    ys = []
    last = len(weights) - 1
    in_place = not watched()
    for i, weight in enumerate(weights):
        x = F.linear(x, weight, biases[i])
        if final_relu or i < last:
            x = _relu(x, in_place)
        if i >= keep:
            ys.append(x)
    return ys


def mlp_backward(
    grad_output: torch.Tensor,
    activations: Sequence[torch.Tensor | None],
    weights: Sequence[torch.Tensor | None],
    final_relu: bool,
    lowest: int,
    need_x: bool,
    need_weights: Sequence[bool],
    need_biases: Sequence[bool],
    forced: bool = False,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """``(grad_x, grad_weights, grad_biases)``, each None where it is not needed.

    grad_output (M, N); activations: x and every layer's output, None for those that are not looked at: below
    the layer ``lowest``, the lowest that needs a gradient (0 for x), there is nothing to do.
    """
    count = len(weights)
    grad_x = None
    grad_weights: list[torch.Tensor | None] = [None] * count
    grad_biases: list[torch.Tensor | None] = [None] * count
    grad_z = relu_backward(grad_output, activations[-1]) if final_relu else grad_output
    for i in range(count - 1, lowest - 1, -1):
        x, weight = activations[i], weights[i]
        if need_biases[i]:
            grad_biases[i] = grad_z.sum(0)
        if need_weights[i]:
            assert x is not None
            grad_weights[i] = grad_z.t() @ x
        if i > lowest:
            assert weight is not None
            grad_z = relu_backward(grad_z @ weight, x)
        elif need_x:
            assert weight is not None
            grad_x = grad_z @ weight
    return grad_x, grad_weights, grad_biases


def relu_backward(grad_output: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    """torch's rule, from the ReLU's output y: 0 where y <= 0, grad_output everywhere else."""
    grad_z: torch.Tensor = torch.ops.aten.threshold_backward(grad_output, y, 0)
    return grad_z
