"""The launchers' names and signatures in plain torch: the path on the CPU, the oracle, double backward.

Everything here is differentiable by torch's own autograd, works in any dtype and on any device, and is what
``torch.nn.functional.linear`` followed by ``relu`` computes, bit for bit.
"""

import torch
from torch.nn import functional as F


def linear_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool
) -> torch.Tensor:
    """``x (..., K) @ weight.T (K, N) + bias (N,)``, then ReLU if asked: ``(..., N)``."""
    y = F.linear(x, weight, bias)
    if not relu:
        return y
    # In place on a tensor that nobody else holds, and that linear's backward does not need: no second
    # tensor is written. threshold_backward is its gradient, as it is that of the one out of place.
    # Subclasses, proxies and wrappers see the calls that a model on torch.nn makes.
    return y.relu_() if type(y) is torch.Tensor else F.relu(y)


def relu_backward(
    grad_output: torch.Tensor, y: torch.Tensor, need_grad_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(grad_z, grad_bias or None)`` from the gradient and the output y of ReLU, both (M, N)."""
    grad_z = torch.ops.aten.threshold_backward(grad_output, y, 0)
    return grad_z, grad_bias(grad_z) if need_grad_bias else None


def grad_bias(grad_z: torch.Tensor) -> torch.Tensor:
    """``grad_z.sum(0)``: (N,)."""
    return grad_z.sum(0)


def grad_input(grad_z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``grad_z (M, N) @ weight (N, K)``: (M, K)."""
    return grad_z @ weight


def grad_weight(grad_z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``grad_z.T (N, M) @ x (M, K)``: (N, K)."""
    return grad_z.t() @ x
