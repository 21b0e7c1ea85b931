"""The autograd.Function of the fused chain: what is saved, when and why."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusedmlp.dispatch import backend_choice, operators, predicate, reference


class FusedMLP(torch.autograd.Function):
    """Linear, ReLU, Linear, ...; x (M, K), count weights (N, K), count biases (N,) or None: (M, N).

    forced: on the kernels throughout, whatever was measured, in the backward too.
    ``ctx`` in ``forward``: with ``setup_context`` a call costs four times as much.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        final_relu: bool,
        forced: bool,
        count: int,
        *parameters: torch.Tensor | None,
    ) -> torch.Tensor:
        weights, biases = parameters[:count], parameters[count:]
        need = ctx.needs_input_grad
        need_x, need_weights, need_biases = need[0], need[4 : 4 + count], need[4 + count :]
        lowest = 0
        while not (need_x or need_weights[lowest] or need_biases[lowest]):
            lowest += 1
        # A hidden layer's output tells where its ReLU was active and is the next layer's input, both at
        # once. Layers below the lowest that needs a gradient leave nothing behind.
        compiling = torch.compiler.is_compiling()
        insist = backend_choice.insists()  # here, for on a GPU the backward runs in another thread
        arguments: Any = x, weights, biases, final_relu, max(0, lowest - 1), forced
        ys: list[torch.Tensor]
        if compiling:
            ys = operators.mlp_forward(*arguments)
        else:
            ys = predicate.kernels_or_reference("mlp_forward", insist, *arguments)
        activations: list[torch.Tensor | None] = [None] * lowest + ([x, *ys] if lowest == 0 else ys)
        start = activations[lowest]
        if not need_weights[lowest]:
            activations[lowest] = None
        if not final_relu:
            activations[-1] = None
        first = lowest if need_x else lowest + 1  # layers from here on have an input gradient to compute
        ctx.save_for_backward(*activations, *[None] * first, *weights[first:])
        # What only create_graph=True wants, to compute the hidden layers anew: inputs of this function, whose
        # change in place nn.Linear allows, so they are not saved but looked at when it comes to that.
        ctx.only_for_create_graph = []
        if lowest < count - 1 and not compiling:  # which knows no create_graph
            rest = (None if need_weights[lowest] else start, weights[lowest], *biases[lowest:-1])
            ctx.only_for_create_graph = [_remembered(t) for t in rest]
        ctx.settings = final_relu, forced, insist, lowest, need_x, need_weights, need_biases
        return ys[-1]

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        final_relu, forced, insist, lowest, need_x, need_weights, need_biases = ctx.settings
        count = len(need_weights)
        saved = list(ctx.saved_tensors)  # once: checkpointing recomputes them at each look
        activations, weights = saved[: count + 1], saved[count + 1 :]
        compiling = torch.compiler.is_compiling()
        if not compiling and torch.is_grad_enabled() and ctx.only_for_create_graph:
            _recompute(ctx.only_for_create_graph, lowest, activations, weights)
        needs = need_x, need_weights, need_biases
        arguments = grad_output, activations, weights, final_relu, lowest, *needs, forced
        if compiling:
            grads = operators.mlp_backward(*arguments)
        elif predicate.is_for_kernels(grad_output):
            grads = predicate.kernels_or_reference("mlp_backward", insist, *arguments)
        else:
            grads = reference.mlp_backward(*arguments)
        grad_x, grad_weights, grad_biases = grads
        if not compiling and not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.only_for_create_graph = []  # as autograd lets go of what was saved
        return grad_x, None, None, None, *grad_weights, *grad_biases


def _remembered(
    tensor: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """The tensor as autograd knows it now, one that shares its version counter, and the version."""
    if tensor is None or tensor.is_inference():
        return tensor, None, 0
    if tensor.grad_fn is None:
        return tensor, tensor, tensor._version
    # The tensor itself, if something made from our output were written into it, would lead back here: a
    # circle that is never freed. So another one on the same memory, which is no view of it either.
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


def fused_mlp(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    final_relu: bool,
) -> torch.Tensor:
    """The fused chain for tensors that ``why_not_fused`` lets through; x (..., K), any strides."""
    # Reshaped outside the Function: a view returned from inside one cannot be modified in place.
    y: torch.Tensor
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if torch.is_grad_enabled() and (
        x.requires_grad
        or any(weight.requires_grad for weight in weights)
        or any(bias is not None and bias.requires_grad for bias in biases)
    ):
        y = FusedMLP.apply(rows, final_relu, backend_choice.forced(), len(weights), *weights, *biases)
    else:
        launch: Callable[..., list[torch.Tensor]]
        if torch.compiler.is_compiling():
            launch = operators.mlp_forward
        else:
            launch = functools.partial(
                predicate.kernels_or_reference, "mlp_forward", backend_choice.insists()
            )
            if torch._C._autograd._profiler_enabled():  # which autograd tells the Function's name
                launch = torch.autograd.profiler.record_function("FusedMLP")(launch)
        (y,) = launch(rows, weights, biases, final_relu, len(weights) - 1, backend_choice.forced())
    # Not a view, as eager's result is none: one made under no_grad could not be modified in place later.
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weights[-1].shape[0]))
