"""The autograd.Function of a chain on the kernels, which decides what is saved for the backward."""

from typing import Any

import torch
from torch.compiler import is_compiling

from fusedmlp.dispatch import autocast, backend_choice, operators, predicate, reference
from fusedmlp.dispatch.backend_choice import Biases, Weights


class FusedMLP(torch.autograd.Function):
    """Linear, ReLU, Linear, ...: x (M, K), count weights (N, K), count biases (N,) or None; returns (M, N).

    forced: every product runs on the kernels, in the backward too, whatever was measured.
    ``forward`` takes ``ctx``, because with ``setup_context`` a call costs four times as much.
    """

    # Example: of three layers with outputs y0, y1, y2 and a ReLU after the last, layer 0 is frozen. Then
    # lowest is 1, and activations are [None, y0, y1, y2]. Number i is the input of layer i, and shows where
    # the ReLU of layer i - 1 was active. y2 is not saved if there is no ReLU after the last layer. Only layer
    # 2's weight is saved, because layer 1 passes no gradient on.

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        final_relu: bool,
        forced: bool,
        count: int,
        *parameters: torch.Tensor | None,
    ) -> torch.Tensor:
        weights: Any = parameters[:count]
        biases = parameters[count:]
        need = ctx.needs_input_grad
        need_x, need_weights, need_biases = need[0], need[4 : 4 + count], need[4 + count :]
        lowest = 0
        while not (need_x or need_weights[lowest] or need_biases[lowest]):
            lowest += 1
        insist = backend_choice.insists()  # asked here, as on a GPU the backward runs in another thread
        keep = max(0, lowest - 1)
        ys = operators.mlp_forward(x, weights, biases, final_relu, keep, forced, insist)
        activations: list[torch.Tensor | None] = [None] * lowest + ([x, *ys] if lowest == 0 else ys)
        start = activations[lowest]
        if not need_weights[lowest]:
            activations[lowest] = None
        if not final_relu:
            activations[-1] = None
        first = lowest if need_x else lowest + 1  # the lowest layer whose input needs a gradient
        ctx.save_for_backward(*activations, *[None] * first, *weights[first:])
        # create_graph=True computes the hidden layers again, from inputs of this function. nn.Linear allows
        # in-place changes of them, so they are checked only in that case. A compiler has no create_graph.
        ctx.only_for_create_graph = []
        if lowest < count - 1 and not is_compiling():
            rest = (None if need_weights[lowest] else start, weights[lowest], *biases[lowest:-1])
            ctx.only_for_create_graph = [_remembered(t) for t in rest]
        needs = operators.Needs(lowest, need_x, need_weights, need_biases)
        ctx.settings = final_relu, needs, forced, insist
        return ys[-1]

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        final_relu, needs, forced, insist = ctx.settings
        count = len(needs.weights)
        saved = list(ctx.saved_tensors)  # read once: checkpointing recomputes them at each access
        activations, weights = saved[: count + 1], saved[count + 1 :]
        compiling = is_compiling()
        if not compiling and torch.is_grad_enabled() and ctx.only_for_create_graph:
            _recompute(ctx.only_for_create_graph, needs.lowest, activations, weights)
        arguments = grad_output, activations, weights, final_relu
        if compiling or predicate.is_for_kernels(grad_output):
            grads = operators.mlp_backward(*arguments, needs, forced, insist)
        else:
            grads = reference.mlp_backward(*arguments, *needs)
        grad_x, grad_weights, grad_biases = grads
        if not compiling and not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.only_for_create_graph = []  # autograd frees what was saved now, too
        return grad_x, None, None, None, *grad_weights, *grad_biases


def _remembered(
    tensor: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """The tensor as autograd knows it now, another one that shares its version counter, and the version."""
    if tensor is None or tensor.is_inference():
        return tensor, None, 0
    if tensor.grad_fn is None:
        return tensor, tensor, tensor._version
    # If something made from our output were written into the tensor itself, it would lead back here: a cycle
    # that is never freed. So keep another tensor on the same memory, which is no view of it either.
    with torch.enable_grad():
        alias = torch.ops.aten._unsafe_view(tensor, tensor.shape)
    return alias, tensor.detach(), tensor._version


def _recompute(
    rest: list[tuple[Any, torch.Tensor | None, int]],
    lowest: int,
    activations: list[torch.Tensor | None],
    weights: list[torch.Tensor],
) -> None:
    """Put the hidden activations in place as functions of x and the parameters.

    The saved ones are constants to autograd: second derivatives through them would silently be missing.
    """
    for tensor, witness, version in rest:
        if witness is not None and witness._version != version:
            raise RuntimeError(
                "create_graph=True needs the chain's input and parameters as they were in its forward, but "
                f"one of shape {tuple(tensor.shape)} has been modified by an inplace operation since"
            )
    start, weight, *biases = (tensor for tensor, _, _ in rest)
    x: Any = activations[lowest] if start is None else start
    activations[lowest] = x
    for i, bias in enumerate(biases, lowest):
        x = reference.linear_forward(x, weight if i == lowest else weights[i], bias, True)
        activations[i + 1] = x


def fused_mlp(x: torch.Tensor, weights: Weights, biases: Biases, final_relu: bool) -> torch.Tensor:
    """The chain on the kernels, for tensors that ``why_not_fused`` lets through; x (..., K), any strides."""
    x, weights, biases = autocast.cast(x, weights, biases)  # outside of the Function, as autocast itself does
    # Reshaped outside the Function: a view returned from inside one cannot be modified in place.
    y: torch.Tensor
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    forced = backend_choice.forced()
    if torch.is_grad_enabled() and (
        x.requires_grad
        or any(weight.requires_grad for weight in weights)
        or any(bias is not None and bias.requires_grad for bias in biases)
    ):
        y = FusedMLP.apply(rows, final_relu, forced, len(weights), *weights, *biases)
    else:
        launch = operators.mlp_forward
        if not is_compiling() and torch._C._autograd._profiler_enabled():
            launch = torch.autograd.profiler.record_function("FusedMLP")(launch)  # as autograd names it
        (y,) = launch(rows, weights, biases, final_relu, len(weights) - 1, forced, backend_choice.insists())
    # Not a view, as eager's result is none: one made under no_grad could not be modified in place later.
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weights[-1].shape[0]))
