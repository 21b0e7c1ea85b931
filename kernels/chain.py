"""A chain of layers, Linear, ReLU, Linear, ..., forward and backward: which kernels run, in which order.

Narrow layers go all in one launch where that is better, see narrow.select_form and narrow.wins.

No pass over the activations is left: the forward's bias and ReLU and the backward's mask and bias gradient
are computed in the products, but for the ReLU after the last layer, whose gradient comes from outside, and
for a copy of what a caller brought with other than contiguous rows.
"""

from collections.abc import Sequence

import torch

from .launch import Setting, is_aligned, is_regular, setting_of
from .layer.forward import linear_forward
from .layer.grad_input import grad_input
from .layer.grad_weight import Layer, grad_weights
from .layer.relu_backward import relu_backward
from .narrow.backward import narrow_backward
from .narrow.forward import narrow_forward
from .partial_sums import Sums, add_up

# So many multiplications take tens of microseconds on the fastest chips. One launch for all layers saves
# launches where they are short; where they are long it would only keep every layer's grad_z in memory.
ENOUGH = 2**33


def mlp_forward(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    final_relu: bool,
    keep: int,
    forced: bool = False,
) -> list[torch.Tensor]:
    """``x (M, K)`` through each ``weight (N, K)``, ReLU between them and, if ``final_relu``, after the last.

    The outputs ``(M, N)``, contiguous, of the layers from number ``keep`` on: backward needs those, inference
    only the last. Dtypes and strides as in linear_forward. Products for which PyTorch's operator was measured
    to be faster run on that, unless ``forced``.
    """
    setting = setting_of(x, forced)
    last = len(weights) - 1
    if last > 0:
        in_one = narrow_forward(x, weights, biases, final_relu, keep, setting)
        if in_one is not None:
            return in_one
    x_regular = is_regular(x)
    ys = []
    for i, weight in enumerate(weights):
        y_regular = is_aligned(weight.shape[0])
        bias = biases[i]
        regular = x_regular and y_regular and is_regular(weight) and (bias is None or bias.stride(0) == 1)
        x = linear_forward(x, weight, bias, final_relu or i < last, regular, setting)
        x_regular = y_regular
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

    grad_output (M, N) of any strides; activations: x and every layer's output, None for those that are not
    looked at: below the layer ``lowest``, the lowest that needs a gradient (0 for x), there is nothing to do.
    Nothing that comes in is written to. forced: as in mlp_forward.
    """
    setting = setting_of(grad_output, forced)
    if not final_relu:
        grad_output = row_major(grad_output)
    needs = need_x, need_weights[lowest:], need_biases[lowest:]
    chain = grad_output, activations[lowest:], weights[lowest:], final_relu, *needs, setting
    grad_x, grads_w, grads_b = _in_one(*chain) or _one_by_one(*chain)
    nothing: list[torch.Tensor | None] = [None] * lowest
    return grad_x, nothing + grads_w, nothing + grads_b


Gradients = tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]


def _in_one(
    grad_output: torch.Tensor,
    activations: Sequence[torch.Tensor | None],
    weights: Sequence[torch.Tensor | None],
    final_relu: bool,
    need_x: bool,
    need_weights: Sequence[bool],
    need_biases: Sequence[bool],
    setting: Setting,
) -> Gradients | None:
    """One launch for the gradients of all activations, or None where one a layer is better."""
    sums: Sums = []
    found = narrow_backward(
        grad_output, activations, weights, final_relu, need_x, need_weights, need_biases, setting, sums
    )
    if found is None:
        return None
    grad_x, grads_z, grads_b = found
    grads_w: list[torch.Tensor | None] = [None] * len(weights)
    waiting: list[Layer] = []
    for i, grad_z in enumerate(grads_z):
        x = activations[i]
        if need_weights[i]:
            assert x is not None
            assert grad_z is not None
            grads_w[i] = grad_w = x.new_empty(grad_z.shape[1], x.shape[1])
            x = row_major(x)
            waiting.append(Layer(grad_z, x, is_regular(grad_z) and is_regular(x), grad_w))
    bias_left = grad_output if need_biases[-1] and not final_relu else None
    if waiting or bias_left is not None:
        grad_bias = grad_weights(waiting, bias_left, setting, sums)
        grads_b[-1] = grads_b[-1] if grad_bias is None else grad_bias
    add_up(sums)
    return grad_x, grads_w, grads_b


def _one_by_one(
    grad_output: torch.Tensor,
    activations: Sequence[torch.Tensor | None],
    weights: Sequence[torch.Tensor | None],
    final_relu: bool,
    need_x: bool,
    need_weights: Sequence[bool],
    need_biases: Sequence[bool],
    setting: Setting,
) -> Gradients:
    """A launch for each layer's input gradient."""
    count = len(weights)
    grad_x = None
    grads_w: list[torch.Tensor | None] = [None] * count
    grads_b: list[torch.Tensor | None] = [None] * count
    sums: Sums = []
    waiting: list[Layer] = []  # for their weight gradients
    multiplications = 0
    bias_left = None
    if final_relu:
        grad_z, grads_b[-1] = relu_backward(grad_output, activations[-1], need_biases[-1], setting, sums)
    else:
        grad_z = grad_output
        bias_left = grad_z if need_biases[-1] else None
    z_regular = is_regular(grad_z)
    for i in range(count - 1, -1, -1):
        x, weight = activations[i], weights[i]
        x_regular = x is not None and is_regular(x)
        if need_weights[i]:
            assert x is not None
            grads_w[i] = grad_w = x.new_empty(grad_z.shape[1], x.shape[1])
            waiting.append(Layer(grad_z, x if x_regular else row_major(x), z_regular and x_regular, grad_w))
            multiplications += grad_w.numel() * x.shape[0]
            if multiplications > ENOUGH:
                grad_bias = grad_weights(waiting, bias_left, setting, sums)
                grads_b[-1] = grads_b[-1] if grad_bias is None else grad_bias
                waiting, multiplications, bias_left = [], 0, None
        if i > 0:
            assert weight is not None
            regular = z_regular and x_regular and is_regular(weight)
            grad_z, grads_b[i - 1] = grad_input(grad_z, weight, x, need_biases[i - 1], regular, setting, sums)
            z_regular = is_aligned(weight.shape[1])
        elif need_x:
            assert weight is not None
            regular = z_regular and is_regular(weight)
            grad_x, _ = grad_input(grad_z, weight, None, False, regular, setting, sums)
    if waiting or bias_left is not None:
        grad_bias = grad_weights(waiting, bias_left, setting, sums)
        grads_b[-1] = grads_b[-1] if grad_bias is None else grad_bias
    add_up(sums)
    return grad_x, grads_w, grads_b


def row_major(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where the elements of a row are not side by side: only what a caller brought may be so."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
