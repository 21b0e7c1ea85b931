"""The two computations that ``tune`` times, on random numbers: one product of a layer, and a chain of layers.

Both run on our kernels, on PyTorch and in float64, so that inaccurate results are found before timing.
"""

import functools
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from fusedmlp import functional
from fusedmlp.dispatch import predicate, reference
from fusedmlp.torch_tools.accuracy import compare
from fusedmlp.torch_tools.warn import first_line

Results = tuple[torch.Tensor, ...]


class LayerProduct:
    """One product of a layer ``weight (N, K)`` with M rows.

    "forward" is ``relu(x @ weight.T + bias)``; "grad_input" is ``grad_z @ weight`` with the ReLU mask of the
    layer below, whose output is ``y (M, K)``, and that layer's bias gradient; "grad_weight" is
    ``grad_z.T @ x``.
    """

    def __init__(self, operation: str, M: int, N: int, K: int, **like: Any) -> None:
        self.operation, self.kernels = operation, predicate.kernels()
        # Weights and gradients are as small as in a real network, so float16 results stay finite.
        self.x, self.weight = torch.randn(M, K, **like), torch.randn(N, K, **like) / K**0.5
        self.bias, self.y = torch.randn(N, **like), torch.randn(M, K, **like).relu_()
        self.grad_z = torch.randn(M, N, **like) / max(M, N) ** 0.5
        self.setting = self.kernels.launch.setting_of(self.x, True)
        self.aligned = self.kernels.launch.is_aligned(N) and self.kernels.launch.is_aligned(K)

    def by_kernel(self, tile: Any) -> Results:
        layer, how = self.kernels.layer, (self.aligned, self.setting)
        sums: list[Any] = []
        if self.operation == "forward":
            return (layer.forward.linear_forward(self.x, self.weight, self.bias, True, *how, tile),)
        if self.operation == "grad_input":
            result = layer.grad_input.grad_input(self.grad_z, self.weight, self.y, True, *how, sums, tile)
        else:
            result = (torch.empty_like(self.weight),)
            gradient = layer.grad_weight.Layer(self.grad_z, self.x, self.aligned, result[0])
            layer.grad_weight.grad_weights([gradient], None, self.setting, sums, tile)
        self.kernels.partial_sums.add_up(sums)
        return tuple(result)

    def by_torch(self, in_float64: bool = False) -> Results:
        """PyTorch's product. After "grad_input" our relu_backward masks and sums, as in a real call."""
        tensors = self.x, self.weight, self.bias, self.grad_z
        x, weight, bias, grad_z = (t.double() for t in tensors) if in_float64 else tensors
        if self.operation == "forward":
            return (reference.linear_forward(x, weight, bias, True),)
        if self.operation == "grad_weight":
            return (grad_z.t() @ x,)
        product = grad_z @ weight
        if in_float64:
            masked = product.masked_fill_(self.y <= 0, 0)
            return masked, masked.sum(0)
        sums: list[Any] = []
        relu_backward = self.kernels.layer.relu_backward.relu_backward
        result = relu_backward(product, self.y, True, self.setting, sums, True)
        self.kernels.partial_sums.add_up(sums)
        return tuple(result)


class Chain:
    """M rows through layers of these widths, with a ReLU between them and, if ``relu``, after the last.

    training: forward and backward with all gradients, otherwise the forward only.
    """

    def __init__(self, M: int, widths: tuple[int, ...], relu: bool, training: bool, **like: Any) -> None:
        layers = list(itertools.pairwise(widths))
        self.x = torch.randn(M, widths[0], **like)
        self.weights = [torch.randn(N, K, **like) / K**0.5 for K, N in layers]
        self.biases = [torch.randn(N, **like) for _, N in layers]
        self.inputs = [self.x, *self.weights, *self.biases]
        for tensor in self.inputs:
            tensor.requires_grad_(training)
        self.grad_output = torch.randn(M, widths[-1], **like) / M**0.5
        self.relu, self.training = relu, training

    def call(self, backend: Callable[[], AbstractContextManager[None]]) -> None:
        """Run the chain as a model does, on this backend."""
        with backend():
            y = functional.mlp(self.x, self.weights, self.biases, final_relu=self.relu)
            if self.training:
                torch.autograd.grad(y, self.inputs, self.grad_output)

    @torch.no_grad()
    def why_not_accurate(self) -> str | None:
        """None if the kernels that the present table selects are accurate, otherwise the problem.

        The backward is checked on its own, with PyTorch's activations.
        """
        count = len(self.weights)

        def forward(room: Any, *inputs: Any) -> Results:
            return tuple(room.mlp_forward(*inputs, self.relu, 0 if self.training else count - 1))

        def backward(room: Any, *inputs: Any) -> Results:
            needs = [True] * count
            grad_x, *others = room.mlp_backward(*inputs, self.relu, 0, True, needs, needs)
            return (grad_x, *others[0], *others[1])

        steps: list[tuple[Any, ...]] = [(forward, self.x, self.weights, self.biases)]
        if self.training:
            ys = reference.mlp_forward(self.x, self.weights, self.biases, self.relu, 0)
            steps.append((backward, self.grad_output, [self.x, *ys], self.weights))
        for run, *inputs in steps:
            wide = [[t.double() for t in one] if isinstance(one, list) else one.double() for one in inputs]
            torchs, exact = run(reference, *inputs), run(reference, *wide)
            problem = why_not_accurate(functools.partial(run, predicate.kernels(), *inputs), torchs, exact)
            if problem is not None:
                return f"{run.__name__}: {problem}"
        return None


def why_not_accurate(run: Callable[[], Results], torchs: Results, exact: Results) -> str | None:
    """None if ``accuracy.compare`` accepts the results of ``run``, otherwise the problem."""
    try:
        results = run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # from the kernel, from Triton, or from PyTorch
        return first_line(error)
    problems = (compare(*each).problem for each in zip(results, torchs, exact, strict=True))
    return next(filter(None, problems), None)
