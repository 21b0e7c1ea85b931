"""The optimizers' updates: the coefficients that the host computes, and the formula that the kernels compute.

The formulas are torch.optim's. The host computes, in double, the part of them that depends only on
hyper-parameters and the step's number: a row of eight coefficients for each parameter and step. With
c1 = 1 - beta1**step and c2 = 1 - beta2**step, a row is:

           0          1             2              3              4          5              6
    sgd    lr         weight_decay  momentum       1 - dampening
    adam   lr / c1    weight_decay  1 - beta1      beta2          1 - beta2  1 / sqrt(c2)   eps
    adamw  lr / c1    lr * decay    1 - beta1      beta2          1 - beta2  1 / sqrt(c2)   eps
"""

from typing import Any

import triton
import triton.language as tl

COEFFICIENTS: tl.constexpr = tl.constexpr(8)  # in a row

Coefficients = tuple[Any, ...]  # eight numbers, some perhaps a float64 tensor with one for each step


def sgd_coefficients(lr: float, momentum: float, dampening: float, weight_decay: float) -> Coefficients:
    """The coefficients of SGD.

    >>> sgd_coefficients(0.1, 0.9, 0.0, 0.0)
    (0.1, 0.0, 0.9, 1.0, 0.0, 0.0, 0.0, 0.0)
    """
    return (lr, weight_decay, momentum, 1.0 - dampening, 0.0, 0.0, 0.0, 0.0)


def adam_coefficients(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool, step: Any
) -> Coefficients:
    """The coefficients of Adam, or of AdamW if ``decoupled``, for update number ``step``.

    step: from 1, or a float64 tensor of such numbers; then some coefficients are tensors as well.
    """
    beta1, beta2 = betas
    correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
    decay = lr * weight_decay if decoupled else weight_decay
    return (lr / correction1, decay, 1.0 - beta1, beta2, 1.0 - beta2, correction2**-0.5, eps, 0.0)


@triton.jit
def update(
    grad,  # of the loss, float32
    param_ptr,  # float32
    low_precision_ptr,  # the same in the dtype of products, or None
    moment_ptr,  # float32: momentum_buffer, exp_avg, or None
    square_ptr,  # float32: exp_avg_sq, or None
    offs,
    mask,
    coefficients_ptr,  # (COEFFICIENTS,) float32
    OPTIMIZER: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    """Update a tile of a parameter and of its state in place."""
    param = tl.load(param_ptr + offs, mask=mask, other=0.0)
    rate = tl.load(coefficients_ptr)
    decay = tl.load(coefficients_ptr + 1)
    if OPTIMIZER == "adamw":
        param -= decay * param  # param *= 1 - lr * weight_decay
    else:
        grad += decay * param
    if OPTIMIZER == "sgd":
        if moment_ptr is not None:
            momentum = tl.load(coefficients_ptr + 2)
            moment = tl.load(moment_ptr + offs, mask=mask, other=0.0)
            moment = momentum * moment + tl.load(coefficients_ptr + 3) * grad
            tl.store(moment_ptr + offs, moment, mask=mask)
            grad = grad + momentum * moment if NESTEROV else moment
        param -= rate * grad
    else:
        # moment = beta1 * moment + (1 - beta1) * grad;  square = beta2 * square + (1 - beta2) * grad**2
        moment = tl.load(moment_ptr + offs, mask=mask, other=0.0)
        moment += tl.load(coefficients_ptr + 2) * (grad - moment)
        tl.store(moment_ptr + offs, moment, mask=mask)
        square = tl.load(square_ptr + offs, mask=mask, other=0.0)
        square = tl.load(coefficients_ptr + 3) * square + tl.load(coefficients_ptr + 4) * grad * grad
        tl.store(square_ptr + offs, square, mask=mask)
        # param -= lr * (moment / c1) / (sqrt(square / c2) + eps)
        root = tl.sqrt(square) * tl.load(coefficients_ptr + 5) + tl.load(coefficients_ptr + 6)
        param -= rate * (moment / root)
    tl.store(param_ptr + offs, param, mask=mask)
    if low_precision_ptr is not None:
        tl.store(low_precision_ptr + offs, param.to(low_precision_ptr.dtype.element_ty), mask=mask)
