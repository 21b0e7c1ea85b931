"""The step of an MLP on a CPU in direct ATen calls: forward, loss, backward and update without autograd.

The same formulas as autograd's, in PyTorch's own operators, so NaN and infinities go where they go there.
"""

from typing import Any

import torch

from fusedmlp.dispatch import onednn
from fusedmlp.train.recipe import SHARES_MEMORY, Recipe

_aten = torch.ops.aten
_threshold_backward = _aten.threshold_backward.grad_input
_nll_loss, _nll_loss_backward = _aten.nll_loss_forward.default, _aten.nll_loss_backward.default
_log_softmax_backward = _aten._log_softmax_backward_data.default
_mse_loss, _mse_loss_backward = _aten.mse_loss.default, _aten.mse_loss_backward.default
_MEAN, _IGNORE_INDEX = 1, -100  # of the losses' reductions, and cross_entropy's default
_LEAST_ROWS_IN_BFLOAT16 = 32  # on Zen 5 as fast as float32; 64 are faster, and one takes twice the time


def why_not(recipe: Recipe, x: torch.Tensor, y: torch.Tensor) -> str | None:
    """None if :func:`run` is right for this batch, else the reason."""
    if type(x) is not torch.Tensor or type(y) is not torch.Tensor:
        return "x or y is not a plain torch.Tensor"
    weight = recipe.weights[0]
    if not (x.is_cpu and y.is_cpu and weight.is_cpu):
        return "x, y and the model are not all on the CPU"
    dtype = weight.dtype
    if x.dtype is not dtype or dtype not in (torch.float32, torch.float64):
        return f"x is {x.dtype} and the model {dtype}; float32 or float64 is known"
    if x.requires_grad or y.requires_grad or x.is_inference() or y.is_inference():
        return "x or y requires grad, or was made in inference mode"
    if x.layout is not torch.strided or y.layout is not torch.strided or x.is_nested or y.is_nested:
        return "x or y is sparse or nested"
    shape = x.shape
    if len(shape) < 2 or not (recipe.flatten or len(shape) == 2):
        return f"x {tuple(shape)} is not a batch of rows"
    rows, columns = shape[0], shape[1:].numel()
    if rows == 0 or columns != weight.shape[1]:
        return f"x {tuple(shape)} is empty, or has not the {weight.shape[1]} columns of the first layer"
    if recipe.loss == "cross_entropy":
        if y.dtype is not torch.int64 or y.shape != (rows,):
            return f"y is {tuple(y.shape)} of {y.dtype}; class numbers are known, int64, one for each row"
    elif y.dtype is not dtype or y.shape != (rows, recipe.weights[-1].shape[0]):
        return f"y is {tuple(y.shape)} of {y.dtype}, not like the output of the model"
    # SGD updates each layer as soon as it can, before the layers below have read x for the last time; y has
    # been read by then, and other updates come last of all.
    if recipe.update == "sgd" and recipe.memory.touch(x):
        return SHARES_MEMORY
    return None


def by_onednn(x: torch.Tensor, compute_dtype: torch.dtype | None) -> bool:
    """Whether the products of some size are oneDNN's."""
    return (
        x.dtype is torch.float32
        and compute_dtype is None
        and onednn.why_not_here() is None
        and onednn.why_switched_off() is None
    )


def run(
    recipe: Recipe,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    first: bool,
    last: bool,
    accumulate: int,
    clip_grad_norm: float | None,
    compute_dtype: torch.dtype | None,
) -> torch.Tensor:
    """The loss, after which the parameters and the optimizer's state are those of the next step.

    first, last: of ``accumulate`` calls, whose gradients lie in ``.grad`` in between. After the last call
    every ``.grad`` is None.
    """
    parameters = recipe.parameters
    with torch.no_grad():
        if first:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = None
        # SGD uses each gradient as soon as it is made, which takes less memory and finds it in the cache.
        at_once = recipe.update == "sgd" and accumulate == 1 and clip_grad_norm is None
        weights: list[torch.Tensor] = list(recipe.weights)
        if compute_dtype is not None:
            weights = [weight.to(compute_dtype) for weight in weights]
        use_onednn = by_onednn(x, compute_dtype)
        x = x.flatten(1) if recipe.flatten else x
        x = x if compute_dtype is None else x.to(compute_dtype)
        tensors = _forward(recipe, weights, x, use_onednn)
        loss, tensors[-1] = _loss(recipe, tensors[-1], y, 1 / accumulate)
        grads = _backward(recipe, weights, tensors, at_once, use_onednn)
        if at_once:
            return loss
        if accumulate > 1 or clip_grad_norm is not None:
            for parameter, grad in zip(parameters, grads, strict=True):
                if parameter.grad is None:
                    parameter.grad = grad
                else:
                    parameter.grad.add_(grad)
            if not last:
                return loss
            if clip_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
            grads = [parameter.grad for parameter in parameters]  # type: ignore[misc]  # none is None
            for parameter in parameters:
                parameter.grad = None
        _update(recipe, grads)
    return loss


def _forward(
    recipe: Recipe, weights: list[torch.Tensor], x: torch.Tensor, use_onednn: bool
) -> list[torch.Tensor]:
    """What goes into each layer, and what comes out of the last."""
    tensors = [x]
    for weight, bias in zip(weights, recipe.biases, strict=True):
        if len(tensors) > 1:
            tensors[-1].relu_()
        tensors.append(_linear(tensors[-1], weight, bias, use_onednn))
    return tensors


def _loss(recipe: Recipe, output: torch.Tensor, y: torch.Tensor, scale: float) -> tuple[torch.Tensor, ...]:
    """The loss, and its gradient with regard to the output, times scale."""
    if output.dtype is not recipe.weights[0].dtype:
        output = output.to(recipe.weights[0].dtype)
    scaled = output.new_full((), scale)
    if recipe.loss == "mse":
        return _mse_loss(output, y, _MEAN), _mse_loss_backward(scaled, output, y, _MEAN)
    log_softmax = torch.log_softmax(output, 1)
    loss, total = _nll_loss(log_softmax, y, None, _MEAN, _IGNORE_INDEX)
    grad = _nll_loss_backward(scaled, log_softmax, y, None, _MEAN, _IGNORE_INDEX, total)
    return loss, _log_softmax_backward(grad, log_softmax, 1, log_softmax.dtype)


def _backward(
    recipe: Recipe,
    weights: list[torch.Tensor],
    tensors: list[torch.Tensor],
    at_once: bool,
    use_onednn: bool,
) -> list[torch.Tensor]:
    """The gradients of the parameters; none if at once each was subtracted from its parameter.

    tensors: the inputs of all layers, and the gradient of the last one's output. They are let go of on the
    way, so that a step takes no more memory than autograd's.
    """
    grads: list[torch.Tensor] = []
    rest = zip(reversed(recipe.groups), reversed(recipe.states), strict=True)
    for i in range(len(weights) - 1, -1, -1):
        grad_output, x = tensors.pop(), tensors.pop()
        weight, bias, cast = recipe.weights[i], recipe.biases[i], weights.pop()
        if bias is not None:
            grad_bias = grad_output.sum(0, dtype=weight.dtype)  # in float32, before a cast
            if at_once:
                _descend(bias, grad_bias, *next(rest))
            else:
                grads.append(grad_bias)
        if grad_output.dtype is not x.dtype:
            grad_output = grad_output.to(x.dtype)
        riding = None
        if at_once:
            group, state = next(rest)
            riding = _riding(weight, x, group, use_onednn)
        grad_weight = None if riding is not None else _grad_weight(grad_output, x, use_onednn)
        if grad_weight is not None and grad_weight.dtype is not weight.dtype:
            grad_weight = grad_weight.to(weight.dtype)
        if i > 0:  # before the weight changes
            tensors.append(_grad_input(grad_output, cast, use_onednn))
            _threshold_backward(tensors[-1], x, 0, grad_input=tensors[-1])
        if riding is not None:
            weight.addmm_(grad_output.t(), x, beta=riding[0], alpha=riding[1])
        elif at_once:
            _descend(weight, grad_weight, group, state)  # type: ignore[arg-type]  # it is a tensor here
        else:
            grads.append(grad_weight)  # type: ignore[arg-type]
    return grads[::-1]


def _riding(
    weight: torch.Tensor, x: torch.Tensor, group: dict[str, Any], use_onednn: bool
) -> tuple[float, float] | None:
    """beta and alpha with which the product that is the gradient updates the weight in the same pass.

    None if it cannot: with momentum the gradient goes elsewhere, oneDNN's product has no such form, and where
    a factor is 0 BLAS does not look at the NaNs in what it multiplies.
    """
    if (
        group["momentum"] != 0
        or x.dtype is not weight.dtype
        or (use_onednn and _pieces(weight.numel(), x.shape[0]) > 0)
    ):
        return None
    lr = float(group["lr"])
    keep = 1 - lr * float(group["weight_decay"])
    return (keep, -lr) if lr != 0 and keep != 0 else None


def _descend(
    parameter: torch.Tensor, grad: torch.Tensor, group: dict[str, Any], state: dict[str, Any]
) -> None:
    """SGD's step, PyTorch's formula. The gradient is written to."""
    lr, momentum, decay = float(group["lr"]), float(group["momentum"]), float(group["weight_decay"])
    if decay != 0:
        grad.add_(parameter, alpha=decay)
    if momentum != 0:
        buffer = state["momentum_buffer"].mul_(momentum).add_(grad, alpha=1 - group["dampening"])
        grad = grad.add_(buffer, alpha=momentum) if group["nesterov"] else buffer
    parameter.add_(grad, alpha=-lr)


def _update(recipe: Recipe, grads: list[torch.Tensor]) -> None:
    """By all gradients; of Adam by PyTorch's own fused operator, a group of parameters at a time."""
    if recipe.update == "sgd":
        for each in zip(recipe.parameters, grads, recipe.groups, recipe.states, strict=True):
            _descend(*each)
        return
    members: dict[int, list[int]] = {}
    for i, group in enumerate(recipe.groups):
        members.setdefault(id(group), []).append(i)
    for indices in members.values():
        group = recipe.groups[indices[0]]
        states = [recipe.states[i] for i in indices]
        beta1, beta2 = group["betas"]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        fused = torch._fused_adamw_ if recipe.update == "adamw" else torch._fused_adam_
        fused(  # as torch.optim.Adam calls it, on tensors that are known to be of one dtype on the CPU
            [recipe.parameters[i] for i in indices],
            [grads[i] for i in indices],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            amsgrad=False,
            beta1=float(beta1),
            beta2=float(beta2),
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            eps=float(group["eps"]),
            maximize=False,
        )
    torch.autograd.graph.increment_version(recipe.written)  # which fused operators leave out


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, use_onednn: bool
) -> torch.Tensor:
    if bias is not None and bias.dtype is not x.dtype:  # to() takes time where it does nothing
        bias = bias.to(x.dtype)
    if use_onednn and onednn.pays(x.shape[0] * weight.numel(), weight.shape[1]):
        return onednn.product(x, weight, bias)
    return x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _grad_input(grad_output: torch.Tensor, weight: torch.Tensor, use_onednn: bool) -> torch.Tensor:
    if use_onednn and onednn.pays(grad_output.shape[0] * weight.numel(), weight.shape[0]):
        return onednn.product(grad_output, weight.t())
    return grad_output.mm(weight)


def _grad_weight(grad_output: torch.Tensor, x: torch.Tensor, use_onednn: bool) -> torch.Tensor:
    pieces = _pieces(grad_output.shape[1] * x.shape[1], x.shape[0]) if use_onednn else 0
    if pieces == 0:
        return grad_output.t().mm(x)
    total = None
    for g, rows in zip(grad_output.tensor_split(pieces), x.tensor_split(pieces), strict=True):
        part = onednn.product(g.t(), rows.t())
        total = part if total is None else total.add_(part)
    return total  # type: ignore[return-value]  # there is a piece


def _pieces(numel: int, rows: int) -> int:
    """Into how many pieces of rows oneDNN's product for a weight gradient of so many values is cut, to keep
    its sums as right as MKL's; 0 if it does not pay."""
    pieces = -(-rows // onednn.MOST_TERMS)
    return pieces if onednn.pays(rows // pieces * numel, -(-rows // pieces)) else 0


def why_too_few_for_bfloat16(x: torch.Tensor) -> str | None:
    """Why a step with this batch is computed in float32 although bfloat16 was asked for, or None."""
    if len(x) >= _LEAST_ROWS_IN_BFLOAT16:
        return None
    return f"below {_LEAST_ROWS_IN_BFLOAT16} rows casting the weights takes longer than bfloat16 saves"


def why_not_bfloat16() -> str | None:
    """Why products in bfloat16 take longer than in float32 on this CPU, or None."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        probe = getattr(torch.cpu, name, None)  # private, so it may be missing
        if probe is not None and probe():
            return None
    return "this CPU has neither AMX nor AVX512-BF16, as far as PyTorch can tell"
