"""The kernels' functions in plain PyTorch: the path on the CPU, the reference for tests, double backward.

Everything here is differentiable by PyTorch's autograd, works in any dtype and on any device, and computes
bit for bit what ``torch.nn.functional.linear`` followed by ``relu`` does.
"""

from collections.abc import Sequence

import torch
from torch.compiler import is_compiling
from torch.nn import functional as F

from fusedmlp.dispatch.backend_choice import Biases, Weights
from fusedmlp.torch_tools.patched import RELU, TORCH_RELU

Gradients = tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]

# Global names for every call on a CPU: looking up a chain of attributes takes a tenth of a microsecond.
_function_modes, _dispatch_modes = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack


def linear_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool
) -> torch.Tensor:
    """``x (..., K) @ weight.T (K, N) + bias (N,)``, then ReLU if asked: ``(..., N)``."""
    y = F.linear(x, weight, bias)
    return relu_forward(y, not watched()) if relu else y


def watched() -> bool:
    """True if a ReLU in place could be noticed.

    A mode sees every operator and may keep a tensor that one of them returned. A compiler gains nothing by a
    ReLU in place, and an exported graph must be that of ``torch.nn``. A function that replaced PyTorch's relu
    must be called.
    """
    modes = is_compiling() or _function_modes() > 0 or _dispatch_modes() > 0
    return modes or F.relu is not RELU or torch.relu is not TORCH_RELU


def relu_forward(y: torch.Tensor, in_place: bool) -> torch.Tensor:
    """ReLU of a result of ``F.linear``, in place if both ``in_place`` and autograd allow it.

    In place, no second tensor is written. linear's backward does not need y, and the gradient of both forms
    is threshold_backward. Subclasses, proxies and wrappers see the calls that a model on torch.nn makes.
    """
    # Up to torch 2.13 linear returns a view if x is not a matrix, which autograd would rebuild by as_strided.
    # A compiler cannot be asked whether a tensor is a view.
    if (
        in_place
        and type(y) is torch.Tensor
        and (y.dim() == 2 or not y.requires_grad or is_compiling() or not y._is_view())
    ):
        return y.relu_()
    return F.relu(y)


def mlp_forward(
    x: torch.Tensor, weights: Weights, biases: Biases, final_relu: bool, keep: int, forced: bool = False
) -> list[torch.Tensor]:
    """``x (..., K)`` through each ``weight (N, K)``, with a ReLU between the layers.

    final_relu: a ReLU after the last layer too. Returns the outputs ``(..., N)`` of the layers from number
    ``keep`` on. forced: ignored; the kernels have it.
    """
    ys = []
    last = len(weights) - 1
    in_place = not watched()
    for i, weight in enumerate(weights):
        x = F.linear(x, weight, biases[i])
        if final_relu or i < last:
            x = relu_forward(x, in_place)
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
) -> Gradients:
    """``(grad_x, grad_weights, grad_biases)``, each None where it is not needed.

    grad_output (M, N); activations: x and every layer's output, None if not used. lowest: the lowest layer
    that needs a gradient (0 if x does); nothing is computed below it.
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
    """PyTorch's rule, from the ReLU's output y: 0 where y <= 0, grad_output elsewhere."""
    grad_z: torch.Tensor = torch.ops.aten.threshold_backward(grad_output, y, 0)
    return grad_z
