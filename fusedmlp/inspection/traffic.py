"""The launches of a chain of layers, how many bytes each one moves, and the times measured for the chain."""

from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from fusedmlp.dispatch import autocast, backend_choice, onednn, predicate
from fusedmlp.dispatch.backend_choice import Run
from fusedmlp.dispatch.operators import Needs

Launch = tuple[str, int]  # its name, and how many bytes it reads and writes


class Figures(NamedTuple):
    """Microseconds of one product of a layer (its number in the chain), by the kernels and by PyTorch.

    operation: "forward" (with bias and ReLU), "grad_input" (with the mask and the bias gradient of the layer
    below) or "grad_weight". The faster one runs, unless backend("triton") is in force.
    """

    layer: int
    operation: str
    us: float
    torch_us: float


def _needs_of(run: Run) -> Needs | None:
    """The gradients that the backward of this call will compute, or None if it has no backward."""
    x = run.x.requires_grad
    weights = [weight.requires_grad for weight in run.weights]
    biases = [bias is not None and bias.requires_grad for bias in run.biases]
    layers = [i for i, (w, b) in enumerate(zip(weights, biases, strict=True)) if x or w or b]
    return Needs(layers[0], x, weights, biases) if layers and torch.is_grad_enabled() else None


class Chain:
    """A chain of layers that is about to run: ``rows`` (M), and ``shapes``, the (K, N) of each layer.

    Shapes that do not fit together are no error here: the layers themselves raise it.
    """

    def __init__(self, run: Run) -> None:
        # Autocast's own casts are not counted: fused or not, they come before the layers.
        if torch.amp.is_autocast_available(run.x.device.type):
            x, weights, biases = autocast.cast(run.x, run.weights, run.biases)
            run = run._replace(x=x, weights=weights, biases=biases)
        self.run = run
        self.shapes = [(weight.shape[-1:].numel(), weight.shape[:-1].numel()) for weight in run.weights]
        K = self.shapes[0][0]
        self.rows = run.x.numel() // K if K else run.x.shape[:-1].numel()
        self.needs = _needs_of(run)

    def unfused(self) -> tuple[list[Launch], list[Launch]]:
        """PyTorch's eager operators of the forward and of the backward."""
        M, one, last = self.rows, self.run.x.element_size(), len(self.shapes) - 1
        forward: list[Launch] = []
        backward: list[Launch] = []
        for i, (K, N) in enumerate(self.shapes):
            relu = i < last or self.run.final_relu
            bias = 0 if self.run.biases[i] is None else N
            forward.append(("linear", one * (M * K + N * K + bias + M * N)))
            forward += [("relu", one * 2 * M * N)] * relu
            if self.needs and i >= self.needs.lowest:
                gradients = [("threshold_backward", one * 3 * M * N)] * relu
                gradients += [("mm", one * (M * N + N * K + M * K))] * len(self._gradients(i))
                gradients += [("sum", one * (M * N + N))] * self.needs.biases[i]
                backward = gradients + backward
        return forward, backward

    def with_onednn(self, forward: list[Launch]) -> list[Launch]:
        """Rename the products of an unfused forward that oneDNN computes here."""
        x, names = self.run.x, []
        if type(x) is not torch.Tensor or x.is_nested or x.layout is not torch.strided:
            return forward
        for weight, bias in zip(self.run.weights, self.run.biases, strict=True):
            names.append("linear by oneDNN" if onednn.why_not(x, weight, bias) is None else "linear")
            x = x.new_empty((*x.shape[:-1], *weight.shape[:-1]))  # stands for the input of the next layer
        linears = iter(names)
        return [(next(linears) if name == "linear" else name, moved) for name, moved in forward]

    def launched(self) -> tuple[list[Launch], list[Launch]]:
        """The kernels of the forward and of the backward, by a dry run with these tensors."""
        kernels, run, needs = predicate.kernels(), self.run, self.needs
        x, forced = run.x.detach(), backend_choice.forced()
        x = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
        keep = max(0, needs.lowest - 1) if needs else len(run.weights) - 1
        launches: list[Launch] = []
        with kernels.dry_run(lambda name, args: launches.append((name, _bytes_of(args)))):
            ys = kernels.mlp_forward(x, run.weights, run.biases, run.final_relu, keep, forced)
            count = len(launches)
            if needs is not None:
                activations = [None] * needs.lowest + ([x, *ys] if needs.lowest == 0 else ys)
                # The output stands for the incoming gradient, which has its shape.
                kernels.mlp_backward(ys[-1], activations, run.weights, run.final_relu, *needs, forced)
        return launches[:count], launches[count:]

    def measured(self) -> tuple[Figures, ...]:
        """The times of the chain's products that were measured on this device, if it runs on the kernels."""
        if self.run.reason is not None:
            return ()
        kernels, x, found = predicate.kernels(), self.run.x, []
        table = kernels.table_of(x.device.index if x.is_cuda else None)
        for i, (K, N) in enumerate(self.shapes):
            for operation in ("forward", *self._gradients(i)):
                product = table.product(operation, kernels.arithmetic(x.dtype), self.rows, N, K)
                if product is not None:
                    found.append(Figures(i, operation, product.us, product.torch_us))
        return tuple(found)

    def _gradients(self, layer: int) -> list[str]:
        """The names of those of this layer's two products that the backward computes."""
        needs = self.needs
        if needs is None or layer < needs.lowest:
            return []
        of_input = layer > needs.lowest or needs.x
        return ["grad_input"] * of_input + ["grad_weight"] * needs.weights[layer]


def _bytes_of(args: tuple[Any, ...]) -> int:
    """How many bytes a kernel with these arguments reads and writes, if it touches each tensor once."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, torch.Tensor))
