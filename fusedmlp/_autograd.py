"""The autograd.Function of the fused layer: what is saved, when and why."""

from typing import Any

import torch

from fusedmlp import _dispatch


class FusedLinear(torch.autograd.Function):
    """``y = relu(x @ weight.T + bias)`` or without ReLU; x (M, K), weight (N, K), bias (N,) or None.

    ``ctx`` in ``forward``: with ``setup_context`` a call costs four times as much.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool
    ) -> torch.Tensor:
        y: torch.Tensor = _dispatch.kernels().linear_forward(x, weight, bias, relu)
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_weight else None,
            weight if need_x else None,
            # The output tells where ReLU was active, and is kept anyway: it is the next layer's input.
            y if relu and (need_x or need_weight or need_bias) else None,
        )
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        x, weight, y = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        operators = _dispatch.backward_operators(grad_output)
        if y is not None:
            # grad_output and the saved tensors are others' too: grad_z is a new tensor.
            grad_z, grad_bias = operators.relu_backward(grad_output, y, need_bias)
        else:
            grad_z, grad_bias = grad_output, operators.grad_bias(grad_output) if need_bias else None
        grad_x = operators.grad_input(grad_z, weight) if need_x else None
        grad_weight = operators.grad_weight(grad_z, x) if need_weight else None
        return grad_x, grad_weight, grad_bias, None


def fused_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool
) -> torch.Tensor:
    """The fused layer for tensors that ``why_not_fused`` lets through; x (..., K), any strides."""
    # Reshaped outside the Function: a view returned from inside one cannot be modified in place.
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y: torch.Tensor = FusedLinear.apply(rows, weight, bias, relu)
    else:
        y = _dispatch.kernels().linear_forward(rows, weight, bias, relu)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])
