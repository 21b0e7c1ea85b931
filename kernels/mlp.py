"""A chain of layers, Linear, ReLU, Linear, ..., forward and backward: which kernels run, in which order.

No pass over the activations is left: the forward's bias and ReLU and the backward's mask and bias gradient
are computed in the products, but for the ReLU after the last layer, whose gradient comes from outside.
"""

from collections.abc import Sequence

import torch

from ._partials import Sums, add_up
from .forward import linear_forward
from .grad_input import grad_input
from .grad_weight import grad_weights
from .relu_backward import relu_backward

# Weight gradients of so many elements fill a chip several times over. One launch for all layers saves
# launches where they are small; where they are large it would only keep every layer's grad_z in memory.
ENOUGH = 2**23


def mlp_forward(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    final_relu: bool,
    keep: int,
) -> list[torch.Tensor]:
    """``x (M, K)`` through each ``weight (N, K)``, ReLU between them and, if ``final_relu``, after the last.

    The outputs ``(M, N)``, contiguous, of the layers from number ``keep`` on: backward needs those, inference
    only the last. Dtypes and strides as in linear_forward.
    """
    ys = []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = linear_forward(x, weight, bias, final_relu or i < len(weights) - 1)
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
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """``(grad_x, grad_weights, grad_biases)``, each None where it is not needed.

    grad_output (M, N) of any strides; activations: x and every layer's output, None for those that are not
    looked at: below the layer ``lowest``, the lowest that needs a gradient (0 for x), there is nothing to do.
    Nothing that comes in is written to.
    """
    count = len(weights)
    grads_w: list[torch.Tensor | None] = [None] * count
    grads_b: list[torch.Tensor | None] = [None] * count
    sums: Sums = []
    waiting: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # for their weight gradients
    bias_left = None

    def weight_gradients() -> None:
        nonlocal bias_left
        if waiting or bias_left is not None:
            grads, grad_bias = grad_weights([(z, x) for _, z, x in waiting], bias_left, sums)
            for (i, _, _), grad in zip(waiting, grads, strict=True):
                grads_w[i] = grad
            if bias_left is not None:
                grads_b[-1] = grad_bias
            waiting.clear()
            bias_left = None

    if final_relu:
        grad_z, grads_b[-1] = relu_backward(grad_output, activations[-1], need_biases[-1], sums)
    else:
        grad_z = row_major(grad_output)
        bias_left = grad_z if need_biases[-1] else None
    grad_x = None
    for i in range(count - 1, lowest - 1, -1):
        x, weight = activations[i], weights[i]
        if need_weights[i]:
            assert x is not None
            waiting.append((i, grad_z, row_major(x)))
            if sum(z.shape[1] * x.shape[1] for _, z, x in waiting) > ENOUGH:
                weight_gradients()
        if i > lowest:
            assert weight is not None
            grad_z, grads_b[i - 1] = grad_input(grad_z, weight, x, need_biases[i - 1], sums)
        elif need_x:
            assert weight is not None
            grad_x, _ = grad_input(grad_z, weight, None, False, sums)
    weight_gradients()
    add_up(sums)
    return grad_x, grads_w, grads_b


def row_major(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where the elements of a row are not side by side: only what a caller brought may be so."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
