"""A chain of layers, Linear, ReLU, Linear, ..., forward and backward: which kernels run, in which order.

With ``h[0] = x (M, K)``, and for layer i weight ``W[i] (N, K)`` and bias ``b[i] (N,)``:

    forward     h[i + 1] = relu(h[i] @ W[i].T + b[i])    the last layer without ReLU, unless final_relu
    backward    grad_z[i - 1] = grad_z[i] @ W[i] where h[i] > 0, else 0
                grad_W[i] = grad_z[i].T @ h[i],   grad_b[i] = grad_z[i].sum(0),   grad_x = grad_z[0] @ W[0]

Usually each layer has its own launches (layer/): one for its forward, and one for its grad_z, with the mask
and grad_b. One more launch computes all grad_W, and another adds partial sums. A separate pass over the
activations is needed only for a final ReLU, and to copy tensors whose rows are not contiguous. A chain of
narrow layers (narrow/) has one launch for the whole forward and one for all grad_z, where that is faster: see
narrow.forward.select_form and wins.
"""

from collections.abc import Sequence

import torch

from .launch import Setting, is_aligned, is_aligned_tensor, setting_of
from .layer.forward import linear_forward
from .layer.grad_input import grad_input
from .layer.grad_weight import Layer, grad_weights
from .layer.relu_backward import relu_backward
from .narrow.backward import Chain, narrow_backward
from .narrow.forward import narrow_forward
from .partial_sums import Sums, add_up

# After this many multiplications, weight gradients are launched without waiting for more layers. They take
# tens of microseconds on the fastest chips, so a saved launch no longer matters, but waiting would keep every
# layer's grad_z in memory.
ENOUGH = 2**33

Grads = list[torch.Tensor | None]


def mlp_forward(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    final_relu: bool,
    keep: int,
    forced: bool = False,
) -> list[torch.Tensor]:
    """``x (M, K)`` through each ``weight (N, K)``, with ReLU between them and, if ``final_relu``, at the end.

    Returns the contiguous outputs ``(M, N)`` of the layers from number ``keep`` on: backward needs all of
    them, inference only the last. Dtypes and strides are those of linear_forward. A product for which
    PyTorch's operator was measured to be faster uses that operator, unless ``forced``.

    >>> hidden, y = mlp_forward(x, [weight1, weight2], [bias1, bias2], final_relu=False, keep=0)
    """
    setting = setting_of(x, forced)
    last = len(weights) - 1
    if last > 0:
        in_one = narrow_forward(x, weights, biases, final_relu, keep, setting)
        if in_one is not None:
            return in_one
    x_aligned = is_aligned_tensor(x)
    ys = []
    for i, weight in enumerate(weights):
        y_aligned = is_aligned(weight.shape[0])
        bias = biases[i]
        aligned = (
            x_aligned and y_aligned and is_aligned_tensor(weight) and (bias is None or bias.stride(0) == 1)
        )
        x = linear_forward(x, weight, bias, final_relu or i < last, aligned, setting)
        x_aligned = y_aligned
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
) -> tuple[torch.Tensor | None, Grads, Grads]:
    """``(grad_x, grad_weights, grad_biases)``, each None where it is not needed.

    grad_output: (M, N) of any strides. activations: x and every layer's output. lowest: the lowest layer that
    needs a gradient; 0 if x needs one. Activations and weights that no gradient depends on may be None. No
    argument is written to. forced: as in mlp_forward.

    >>> grad_x, grad_weights, grad_biases = mlp_backward(
    ...     grad_y, [x, hidden, y], [weight1, weight2], False, 0, True, [True, True], [True, True])
    """
    setting = setting_of(grad_output, forced)
    if not final_relu:
        grad_output = row_major(grad_output)
    bias_left = grad_output if need_biases[-1] and not final_relu else None
    products = _WeightGradients(len(weights) - lowest, bias_left, setting)
    needs = need_x, need_weights[lowest:], need_biases[lowest:]
    chain = Chain(
        grad_output, activations[lowest:], weights[lowest:], final_relu, *needs, setting, products.sums
    )
    found = narrow_backward(chain)
    if found is None:
        grad_x, grads_b = _one_by_one(chain, products)
    else:
        grad_x, grads_z, grads_b = found
        for i, grad_z in enumerate(grads_z):
            if need_weights[lowest + i]:
                x = activations[lowest + i]
                assert x is not None
                assert grad_z is not None
                x = row_major(x)
                products.add(i, grad_z, x, is_aligned_tensor(grad_z) and is_aligned_tensor(x))
    products.launch()
    if products.grad_bias is not None:
        grads_b[-1] = products.grad_bias
    add_up(products.sums)
    below: Grads = [None] * lowest
    return grad_x, below + products.grads, below + grads_b


class _WeightGradients:
    """Collects the weight gradients of a chain, and the last layer's bias gradient, for a common launch."""

    def __init__(self, layers: int, bias_left: torch.Tensor | None, setting: Setting) -> None:
        self.grads: Grads = [None] * layers
        self.grad_bias: torch.Tensor | None = None
        self.sums: Sums = []
        self.multiplications = 0
        self._waiting: list[Layer] = []
        self._bias_left = bias_left
        self._setting = setting

    def add(self, i: int, grad_z: torch.Tensor, x: torch.Tensor, aligned: bool) -> None:
        """Queue the weight gradient of layer i. The rows of x must be contiguous."""
        self.grads[i] = grad = x.new_empty(grad_z.shape[1], x.shape[1])
        self._waiting.append(Layer(grad_z, x, aligned, grad))
        self.multiplications += grad.numel() * x.shape[0]

    def launch(self) -> None:
        """Compute the queued gradients."""
        if self._waiting or self._bias_left is not None:
            grad_bias = grad_weights(self._waiting, self._bias_left, self._setting, self.sums)
            self.grad_bias = self.grad_bias if grad_bias is None else grad_bias
            self._waiting, self.multiplications, self._bias_left = [], 0, None


def _one_by_one(chain: Chain, products: _WeightGradients) -> tuple[torch.Tensor | None, Grads]:
    """``(grad_x, grad_biases)``, with a launch for each layer's input gradient."""
    grad_z, activations, weights, final_relu, need_x, need_weights, need_biases, setting, sums = chain
    grad_x = None
    grads_b: Grads = [None] * len(weights)
    if final_relu:
        grad_z, grads_b[-1] = relu_backward(grad_z, activations[-1], need_biases[-1], setting, sums)
    z_aligned = is_aligned_tensor(grad_z)
    for i in range(len(weights) - 1, -1, -1):
        x, weight = activations[i], weights[i]
        x_aligned = x is not None and is_aligned_tensor(x)
        if need_weights[i]:
            assert x is not None
            products.add(i, grad_z, x if x_aligned else row_major(x), z_aligned and x_aligned)
            if products.multiplications > ENOUGH:
                products.launch()
        if i > 0:
            assert weight is not None
            aligned = z_aligned and x_aligned and is_aligned_tensor(weight)
            grad_z, grads_b[i - 1] = grad_input(grad_z, weight, x, need_biases[i - 1], aligned, setting, sums)
            z_aligned = is_aligned(weight.shape[1])
        elif need_x:
            assert weight is not None
            aligned = z_aligned and is_aligned_tensor(weight)
            grad_x, _ = grad_input(grad_z, weight, None, False, aligned, setting, sums)
    return grad_x, grads_b


def row_major(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy if its rows are not contiguous. Only tensors from the caller can need one."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
