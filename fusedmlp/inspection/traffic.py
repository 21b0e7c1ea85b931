"""What a stretch of layers launches, how many bytes each launch moves, and what was measured of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from fusedmlp.dispatch import backend_choice, onednn, predicate
from fusedmlp.dispatch.backend_choice import Run

Launch = tuple[str, int]  # its name, and how many bytes it moves


class Figures(NamedTuple):
    """Microseconds of one product of a layer (its number in the stretch) on the kernels and on PyTorch.

    operation: "forward" (with bias and ReLU), "grad_input" (with the mask and the bias gradient of the layer
    below) or "grad_weight". The one that takes less time is taken, unless backend("triton") is in force.
    """

    layer: int
    operation: str
    us: float
    torch_us: float


class Needs(NamedTuple):
    """Which gradients a stretch's backward computes, and the lowest layer that has one to compute."""

    lowest: int
    x: bool
    weights: list[bool]
    biases: list[bool]


def needs_of(run: Run) -> Needs | None:
    x = run.x.requires_grad
    weights = [weight.requires_grad for weight in run.weights]
    biases = [bias is not None and bias.requires_grad for bias in run.biases]
    layers = [i for i, (w, b) in enumerate(zip(weights, biases, strict=True)) if x or w or b]
    return Needs(layers[0], x, weights, biases) if layers and torch.is_grad_enabled() else None


def unfused(
    M: int, shapes: Sequence[tuple[int, int]], run: Run, needs: Needs | None
) -> tuple[list[Launch], list[Launch]]:
    """PyTorch's operators of forward and backward, each with the bytes that it reads and writes."""
    last = len(shapes) - 1
    relu = [run.final_relu or i < last for i in range(len(shapes))]
    one = run.x.element_size()
    forward: list[Launch] = []
    backward: list[Launch] = []
    for i, (K, N) in enumerate(shapes):
        forward.append(("linear", one * (M * K + N * K + (N if run.biases[i] is not None else 0) + M * N)))
        if relu[i]:
            forward.append(("relu", one * 2 * M * N))
    if needs is None:
        return forward, backward
    for i in range(last, needs.lowest - 1, -1):
        K, N = shapes[i]
        if relu[i]:
            backward.append(("threshold_backward", one * 3 * M * N))
        products = (i > needs.lowest or needs.x) + needs.weights[i]
        backward += [("mm", one * (M * N + N * K + M * K))] * products
        if needs.biases[i]:
            backward.append(("sum", one * (M * N + N)))
    return forward, backward


def with_onednn(launches: Sequence[Launch], run: Run) -> list[Launch]:
    """Of a forward on PyTorch's operators: which products are oneDNN's."""
    if type(run.x) is not torch.Tensor or run.x.is_nested or run.x.layout is not torch.strided:
        return list(launches)
    x, layers, named = run.x, iter(zip(run.weights, run.biases, strict=True)), []
    for name, moved in launches:
        if name == "linear":
            weight, bias = next(layers)
            name = "linear by oneDNN" if onednn.why_not(x, weight, bias) is None else name
            # What the next layer gets, as far as is asked: nothing is written to it.
            x = x.new_empty((*x.shape[:-1], *weight.shape[:-1]))
        named.append((name, moved))
    return named


def _bytes_of(args: tuple[Any, ...]) -> int:
    """What a kernel with these arguments reads and writes, if each tensor once."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, torch.Tensor))


def launched(run: Run, needs: Needs | None) -> tuple[list[Launch], list[Launch]]:
    """The kernels of forward and backward, by a dry run of what FusedMLP does with these tensors."""
    kernels, x, count = predicate.kernels(), run.x.detach(), len(run.weights)
    x = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    keep = max(0, needs.lowest - 1) if needs else count - 1
    forward: list[Launch] = []
    backward: list[Launch] = []
    with kernels.dry_run(lambda name, args: forward.append((name, _bytes_of(args)))):
        ys = kernels.mlp_forward(x, run.weights, run.biases, run.final_relu, keep, backend_choice.forced())
    if needs is None:
        return forward, backward
    lowest = needs.lowest
    activations = [None] * lowest + ([x, *ys] if lowest == 0 else ys)
    # The output stands for the gradient that comes in: of its shape, and nothing is written to.
    with kernels.dry_run(lambda name, args: backward.append((name, _bytes_of(args)))):
        kernels.mlp_backward(
            ys[-1], activations, run.weights, run.final_relu, *needs, backend_choice.forced()
        )
    return forward, backward


def measured(run: Run, M: int, shapes: Sequence[tuple[int, int]], needs: Needs | None) -> tuple[Figures, ...]:
    """Of a stretch on the kernels, the products that were measured on this device."""
    if run.reason is not None:
        return ()
    kernels, found = predicate.kernels(), []
    table = kernels.table_of(run.x.device.index if run.x.is_cuda else None)
    kind = kernels.arithmetic(run.x.dtype)
    for i, (K, N) in enumerate(shapes):
        operations = ["forward"]
        if needs is not None and (i > needs.lowest or (i == needs.lowest and needs.x)):
            operations.append("grad_input")
        if needs is not None and needs.weights[i]:
            operations.append("grad_weight")
        for operation in operations:
            product = table.product(operation, kind, M, N, K)
            if product is not None:
                found.append(Figures(i, operation, product.us, product.torch_us))
    return tuple(found)
