"""The training step of an MLP on a CPU without autograd: each formula is one or two ATen calls.

A step does, for layers ``z = x @ W.T + b`` with a ReLU between them:

    forward    each layer's input x is kept
    loss       and its gradient with respect to the last z
    backward   from the last layer: grad_b = grad_z.sum(0), grad_W = grad_z.T @ x, grad_x = grad_z @ W,
               which is 0 where the ReLU's output x is 0
    clip       torch.nn.utils.clip_grad_norm_, if asked for
    update     of each parameter p by its gradient g, as in torch.optim's documentation
               (https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html, Adam.html, AdamW.html)

    SGD    g += weight_decay * p;  m = momentum * m + (1 - dampening) * g
           p -= lr * m, or with Nesterov momentum p -= lr * (g + momentum * m)
    Adam   g += weight_decay * p, or for AdamW p -= lr * weight_decay * p
           m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g * g;  t += 1
           p -= lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

The operators are those that autograd runs, so NaN and infinities spread as in PyTorch's loop.
"""

from typing import Any

import torch
from torch import Tensor

from fusedmlp.dispatch import onednn
from fusedmlp.train.recipe import SHARES_MEMORY, Recipe, why_batch_unknown
from fusedmlp.train.shared_memory import memory_of

_aten = torch.ops.aten
_threshold_backward = _aten.threshold_backward.grad_input
_nll_loss, _nll_loss_backward = _aten.nll_loss_forward.default, _aten.nll_loss_backward.default
_log_softmax_backward = _aten._log_softmax_backward_data.default
_mse_loss, _mse_loss_backward = _aten.mse_loss.default, _aten.mse_loss_backward.default
_MEAN, _IGNORE_INDEX = 1, -100  # the losses' reduction, and cross_entropy's default
_LEAST_ROWS_IN_BFLOAT16 = 32  # on Zen 5 as fast as in float32; 64 rows are faster, one takes twice as long

# A layer: weight, bias, the weight in the dtype of the products, and the optimizer's group and state for the
# weight and for the bias.
_Options = tuple[dict[str, Any], dict[str, Any]]
_Layer = tuple[Tensor, Tensor | None, Tensor, _Options, _Options | None]


def why_not(recipe: Recipe, x: Tensor, y: Tensor, accumulating: bool) -> str | None:
    """Why :func:`run` cannot replace PyTorch's loop for this batch, or None if it can.

    accumulating: gradients of earlier calls wait in ``.grad``.
    """
    if type(x) is not Tensor or type(y) is not Tensor:
        return "Either x or y is not a plain torch.Tensor."
    weight = recipe.weights[0]
    if not (x.is_cpu and y.is_cpu and weight.is_cpu):
        return "The batch and the model are not all on the CPU."
    dtype = weight.dtype
    if x.dtype is not dtype or dtype not in (torch.float32, torch.float64):
        return f"The input x is {x.dtype} and the model {dtype}; both must be float32, or both float64."
    if x.is_inference() or y.is_inference():
        return "Either x or y was made in inference mode."
    if (reason := why_batch_unknown(recipe, x, y)) is not None:
        return reason
    # SGD updates the last layers before the first layer reads x for its weight's gradient. All other updates
    # come after x is last read, and y is read before any update.
    if recipe.update == "sgd" and recipe.memory.touch(x):
        return SHARES_MEMORY
    if accumulating:
        grads = [p.grad for p in recipe.parameters if p.grad is not None]
        if any(grad.layout is not torch.strided or not grad.is_contiguous() for grad in grads):
            return "A gradient that waits in .grad is not contiguous."
        memory = memory_of([*recipe.written, *grads])
        if memory is None or memory.touch(x):
            return "A gradient that waits in .grad shares memory with something else."
    return None


def by_onednn(x: Tensor, compute_dtype: torch.dtype | None) -> bool:
    """True if oneDNN computes the large products."""
    return (
        x.dtype is torch.float32
        and compute_dtype is None
        and onednn.why_not_here() is None
        and onednn.why_switched_off() is None
    )


def run(
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    done: int,
    accumulate: int,
    clip_grad_norm: float | None,
    compute_dtype: torch.dtype | None,
) -> Tensor:
    """Do the step on this batch, and return the mean loss before the update.

    accumulate: calls for each update; in between, the gradients wait in ``.grad``, and after the update every
    ``.grad`` is None. done: calls since the last update.
    """
    parameters = recipe.parameters
    with torch.no_grad():
        if done == 0:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = None
        # SGD uses each gradient as soon as it is computed, which saves memory and finds it in the cache.
        at_once = recipe.update == "sgd" and accumulate == 1 and clip_grad_norm is None
        use_onednn = by_onednn(x, compute_dtype)
        x = x.flatten(1) if recipe.flatten else x
        x = x if compute_dtype is None else x.to(compute_dtype)
        layers = _layers_of(recipe, compute_dtype)
        tensors = _forward(layers, x, use_onednn)
        loss, tensors[-1] = _loss(recipe, tensors[-1], y, 1 / accumulate)
        grads = _backward(layers, tensors, at_once, use_onednn)
        if at_once:
            return loss
        if accumulate > 1 or clip_grad_norm is not None:
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
            if done + 1 < accumulate:
                return loss
            if clip_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
            grads = [parameter.grad for parameter in parameters]  # type: ignore[misc]  # none is None
            for parameter in parameters:
                parameter.grad = None
        _update(recipe, grads)
    return loss


def _layers_of(recipe: Recipe, compute_dtype: torch.dtype | None) -> list[_Layer]:
    options = zip(recipe.groups, recipe.states, strict=True)  # for each parameter: weight, bias, weight, ...
    layers: list[_Layer] = []
    for weight, bias in zip(recipe.weights, recipe.biases, strict=True):
        multiplied = weight if compute_dtype is None else weight.to(compute_dtype)
        layers.append((weight, bias, multiplied, next(options), None if bias is None else next(options)))
    return layers


def _forward(layers: list[_Layer], x: Tensor, use_onednn: bool) -> list[Tensor]:
    """The input of each layer, and the output of the last."""
    tensors = [x]
    for _, bias, weight, _, _ in layers:
        if len(tensors) > 1:
            tensors[-1].relu_()
        tensors.append(_linear(tensors[-1], weight, bias, use_onednn))
    return tensors


def _loss(recipe: Recipe, output: Tensor, y: Tensor, scale: float) -> tuple[Tensor, ...]:
    """The loss, and ``scale`` times its gradient with respect to the output."""
    if output.dtype is not recipe.weights[0].dtype:
        output = output.to(recipe.weights[0].dtype)
    scaled = output.new_full((), scale)
    if recipe.loss == "mse":
        return _mse_loss(output, y, _MEAN), _mse_loss_backward(scaled, output, y, _MEAN)
    log_softmax = torch.log_softmax(output, 1)
    loss, total = _nll_loss(log_softmax, y, None, _MEAN, _IGNORE_INDEX)
    grad = _nll_loss_backward(scaled, log_softmax, y, None, _MEAN, _IGNORE_INDEX, total)
    return loss, _log_softmax_backward(grad, log_softmax, 1, log_softmax.dtype)


def _backward(layers: list[_Layer], tensors: list[Tensor], at_once: bool, use_onednn: bool) -> list[Tensor]:
    """Return the parameters' gradients; with ``at_once``, update each parameter by SGD and return none.

    tensors: the inputs of all layers, and the gradient of the last layer's output. Both lists are emptied on
    the way, so that a step takes no more memory than autograd's.
    """
    grads: list[Tensor] = []
    while layers:
        weight, bias, multiplied, of_weight, of_bias = layers.pop()
        grad_output, x = tensors.pop(), tensors.pop()
        if bias is not None:
            grad_bias = grad_output.sum(0, dtype=weight.dtype)  # summed in float32, before a cast
            if at_once:
                _descend(bias, grad_bias, *of_bias)  # type: ignore[misc]  # there is a bias
            else:
                grads.append(grad_bias)
        if grad_output.dtype is not x.dtype:
            grad_output = grad_output.to(x.dtype)
        factors = _factors_of_addmm(weight, x, of_weight[0], use_onednn) if at_once else None
        if factors is None:
            grad_weight = _grad_weight(grad_output, x, use_onednn)
            if grad_weight.dtype is not weight.dtype:
                grad_weight = grad_weight.to(weight.dtype)
        if layers:  # before the weight changes
            if use_onednn and onednn.pays(x.shape[0] * weight.numel(), weight.shape[0]):
                tensors.append(onednn.product(grad_output, multiplied.t()))
            else:
                tensors.append(grad_output.mm(multiplied))
            _threshold_backward(tensors[-1], x, 0, grad_input=tensors[-1])
        if factors is not None:
            weight.addmm_(grad_output.t(), x, beta=factors[0], alpha=factors[1])
        elif at_once:
            _descend(weight, grad_weight, *of_weight)
        else:
            grads.append(grad_weight)
    return grads[::-1]


def _factors_of_addmm(
    weight: Tensor, x: Tensor, group: dict[str, Any], use_onednn: bool
) -> tuple[float, float] | None:
    """``(beta, alpha)`` with which ``addmm_`` does SGD's update, computing the weight's gradient on the way.

    None if it cannot: momentum needs the gradient itself, oneDNN has no such call, and if a factor is 0 BLAS
    ignores NaN in what the factor multiplies.
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


def _descend(parameter: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
    """Update a parameter by SGD. The gradient is overwritten."""
    lr, momentum, decay = float(group["lr"]), float(group["momentum"]), float(group["weight_decay"])
    if decay != 0:
        grad.add_(parameter, alpha=decay)
    if momentum != 0:
        buffer = state["momentum_buffer"].mul_(momentum).add_(grad, alpha=1 - group["dampening"])
        grad = grad.add_(buffer, alpha=momentum) if group["nesterov"] else buffer
    parameter.add_(grad, alpha=-lr)


def _update(recipe: Recipe, grads: list[Tensor]) -> None:
    """Do the optimizer's step. Adam's is PyTorch's fused operator, called for each group of parameters."""
    if recipe.update == "sgd":
        for each in zip(recipe.parameters, grads, recipe.groups, recipe.states, strict=True):
            _descend(*each)
        return
    torch._foreach_add_(recipe.counts, 1)
    fused = torch._fused_adamw_ if recipe.update == "adamw" else torch._fused_adam_
    for group in {id(group): group for group in recipe.groups}.values():
        indices = [i for i, other in enumerate(recipe.groups) if other is group]
        states = [recipe.states[i] for i in indices]
        beta1, beta2 = group["betas"]
        fused(  # as torch.optim.Adam calls it for tensors of one dtype on the CPU
            [recipe.parameters[i] for i in indices],
            [grads[i] for i in indices],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [recipe.counts[i] for i in indices],
            amsgrad=False,
            beta1=float(beta1),
            beta2=float(beta2),
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            eps=float(group["eps"]),
            maximize=False,
        )
    torch.autograd.graph.increment_version(recipe.written)  # the fused operators do not do this


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, use_onednn: bool) -> Tensor:
    if bias is not None and bias.dtype is not x.dtype:  # to() takes time even if it does nothing
        bias = bias.to(x.dtype)
    if use_onednn and onednn.pays(x.shape[0] * weight.numel(), weight.shape[1]):
        return onednn.product(x, weight, bias)
    return x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _grad_weight(grad_output: Tensor, x: Tensor, use_onednn: bool) -> Tensor:
    pieces = _pieces(grad_output.shape[1] * x.shape[1], x.shape[0]) if use_onednn else 0
    if pieces == 0:
        return grad_output.t().mm(x)
    total = None
    for g, rows in zip(grad_output.tensor_split(pieces), x.tensor_split(pieces), strict=True):
        part = onednn.product(g.t(), rows.t())
        total = part if total is None else total.add_(part)
    return total  # type: ignore[return-value]  # there is a piece


def _pieces(numel: int, rows: int) -> int:
    """In how many pieces oneDNN computes a weight gradient of ``numel`` elements; 0 if MKL computes it.

    Each piece sums over a part of the rows, so that the sums are as accurate as MKL's.
    """
    pieces = -(-rows // onednn.MOST_TERMS)
    return pieces if onednn.pays(rows // pieces * numel, -(-rows // pieces)) else 0


def why_too_few_for_bfloat16(x: Tensor) -> str | None:
    """Why a batch this small is computed in float32 although bfloat16 was asked for, or None."""
    if len(x) >= _LEAST_ROWS_IN_BFLOAT16:
        return None
    return f"Below {_LEAST_ROWS_IN_BFLOAT16} rows casting the weights takes longer than bfloat16 saves."


def why_not_bfloat16() -> str | None:
    """Why products in bfloat16 take longer than in float32 on this CPU, or None."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        probe = getattr(torch.cpu, name, None)  # private, so it may be missing
        if probe is not None and probe():
            return None
    return "This CPU has neither AMX nor AVX512-BF16, as far as PyTorch can tell."
