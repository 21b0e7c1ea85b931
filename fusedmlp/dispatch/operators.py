"""The kernels' launchers as operators of ``torch.library``: what a compiler can see without looking inside.

Only while compiling: an eager call of such an operator costs ten times what a call of the launcher does.
"""

from collections.abc import Sequence

import torch

from fusedmlp.dispatch import predicate, reference


def mlp_forward(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    final_relu: bool,
    keep: int,
    forced: bool,
) -> list[torch.Tensor]:
    """``kernels.mlp_forward``, x (M, K)."""
    ys: list[torch.Tensor] = _forward(x, list(weights), list(biases), final_relu, keep, forced)
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
    forced: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """``kernels.mlp_backward``: None where no gradient is needed, which an operator cannot return."""
    needs = [need_x, *need_weights, *need_biases]
    found = iter(
        _backward(
            grad_output, list(activations), list(weights), final_relu, lowest,
            need_x, list(need_weights), list(need_biases), forced,
        )
    )  # fmt: skip
    grads = [next(found) if need else None for need in needs]
    count = len(need_weights)
    return grads[0], grads[1 : 1 + count], grads[1 + count :]


@torch.library.custom_op(
    "fusedmlp::mlp_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor?[] biases, bool final_relu, int keep, bool forced) "
    "-> Tensor[]",
)
def _forward(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    final_relu: bool,
    keep: int,
    forced: bool,
) -> list[torch.Tensor]:
    ys: list[torch.Tensor] = predicate.kernels_or_reference(
        "mlp_forward", forced, x, weights, biases, final_relu, keep, forced
    )
    return ys


@_forward.register_fake
def _(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    final_relu: bool,
    keep: int,
    forced: bool,
) -> list[torch.Tensor]:
    return reference.mlp_forward(x, weights, biases, final_relu, keep, forced)


@torch.library.custom_op(
    "fusedmlp::mlp_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor?[] activations, Tensor?[] weights, bool final_relu, int lowest, "
    "bool need_x, bool[] need_weights, bool[] need_biases, bool forced) -> Tensor[]",
)
def _backward(
    grad_output: torch.Tensor,
    activations: list[torch.Tensor | None],
    weights: list[torch.Tensor | None],
    final_relu: bool,
    lowest: int,
    need_x: bool,
    need_weights: list[bool],
    need_biases: list[bool],
    forced: bool,
) -> list[torch.Tensor]:
    grad_x, grad_weights, grad_biases = predicate.kernels_or_reference(
        "mlp_backward",
        forced,
        grad_output,
        activations,
        weights,
        final_relu,
        lowest,
        need_x,
        need_weights,
        need_biases,
        forced,
    )
    return _those_needed(grad_x, grad_weights, grad_biases)


@_backward.register_fake
def _(
    grad_output: torch.Tensor,
    activations: list[torch.Tensor | None],
    weights: list[torch.Tensor | None],
    final_relu: bool,
    lowest: int,
    need_x: bool,
    need_weights: list[bool],
    need_biases: list[bool],
    forced: bool,
) -> list[torch.Tensor]:
    return _those_needed(
        *reference.mlp_backward(
            grad_output, activations, weights, final_relu, lowest, need_x, need_weights, need_biases, forced
        )
    )


def _those_needed(
    grad_x: torch.Tensor | None,
    grad_weights: Sequence[torch.Tensor | None],
    grad_biases: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    return [grad for grad in (grad_x, *grad_weights, *grad_biases) if grad is not None]
