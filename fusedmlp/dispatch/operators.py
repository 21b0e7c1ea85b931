"""Run the kernels' ``mlp_forward`` and ``mlp_backward``.

Eager code calls them directly. A compiler gets opaque operators of ``torch.library`` instead, of which an
eager call would cost ten times as much as the direct call. Once a kernel has failed on a device, the
functions of the same names in ``reference`` run in their place there.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling

from fusedmlp.dispatch import predicate, reference
from fusedmlp.dispatch.backend_choice import Biases, Weights
from fusedmlp.dispatch.reference import Gradients
from fusedmlp.torch_tools.warn import warn

HOW_TO_REPORT = "To report this, run: python -m fusedmlp --report problem.txt"


class Needs(NamedTuple):
    """Which gradients a chain's backward computes, and the lowest layer that has one to compute."""

    lowest: int
    x: bool
    weights: Sequence[bool]
    biases: Sequence[bool]


def mlp_forward(
    x: torch.Tensor,
    weights: Weights,
    biases: Biases,
    final_relu: bool,
    keep: int,
    forced: bool,
    insist: bool,
) -> list[torch.Tensor]:
    """``kernels.mlp_forward`` of x (M, K). insist: raise KernelFailed rather than use ``reference``."""
    ys: list[torch.Tensor]
    if is_compiling():
        ys = _forward(x, list(weights), list(biases), final_relu, keep, forced)
    else:
        ys = _kernels_or_reference("mlp_forward", insist, x, weights, biases, final_relu, keep, forced)
    return ys


def mlp_backward(
    grad_output: torch.Tensor,
    activations: list[torch.Tensor | None],
    weights: list[torch.Tensor | None],
    final_relu: bool,
    needs: Needs,
    forced: bool,
    insist: bool,
) -> Gradients:
    """``kernels.mlp_backward``: the gradients of x, weights and biases, each None if it is not needed."""
    arguments: Any = grad_output, activations, weights, final_relu, *needs, forced
    if not is_compiling():
        return _kernels_or_reference("mlp_backward", insist, *arguments)  # type: ignore[no-any-return]
    _, need_x, need_weights, need_biases = needs
    found = iter(_backward(*arguments))  # only the needed gradients, as an operator cannot return None
    one_by_one = [next(found) if need else None for need in (need_x, *need_weights, *need_biases)]
    count = len(need_weights)
    return one_by_one[0], one_by_one[1 : 1 + count], one_by_one[1 + count :]


def _kernels_or_reference(name: str, insist: bool, tensor: torch.Tensor, *rest: Any) -> Any:
    """Call this function of the kernels, or of ``reference`` if a kernel has failed on tensor's device.

    insist: raise KernelFailed instead, as under ``backend("triton")`` and while tune measures.
    """
    room, index = predicate.kernels(), tensor.device.index
    if insist or index not in predicate.failed:
        try:
            return getattr(room, name)(tensor, *rest)
        except room.KernelFailed as failure:
            if insist:
                raise
            text = str(failure).rstrip(".")
            reason = f"{text[0].upper()}{text[1:]}."
        # Outside of the except block, so that the memory that the kernels had allocated is free.
        predicate.failed[index] = reason
        warn(f"Layers on {tensor.device} run on PyTorch's operators from now on. {reason} {HOW_TO_REPORT}")
    return getattr(reference, name)(tensor, *rest)


@torch.library.custom_op(
    "fusedmlp::mlp_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor?[] biases, bool final_relu, int keep, bool forced) "
    "-> Tensor[]",
)
def _forward(*arguments: Any) -> list[torch.Tensor]:
    return _kernels_or_reference("mlp_forward", arguments[-1], *arguments)  # type: ignore[no-any-return]


_forward.register_fake(reference.mlp_forward)


@torch.library.custom_op(
    "fusedmlp::mlp_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor?[] activations, Tensor?[] weights, bool final_relu, int lowest, "
    "bool need_x, bool[] need_weights, bool[] need_biases, bool forced) -> Tensor[]",
)
def _backward(*arguments: Any) -> list[torch.Tensor]:
    return _needed(*_kernels_or_reference("mlp_backward", arguments[-1], *arguments))


_backward.register_fake(lambda *arguments: _needed(*reference.mlp_backward(*arguments)))


def _needed(x: torch.Tensor | None, *others: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    return [grad for group in ((x,), *others) for grad in group if grad is not None]
