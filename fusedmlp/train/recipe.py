"""Recipe: what the fast steps need to know about model, loss and optimizer.

A chain Linear, ReLU, Linear, ..., Linear has a recipe if it is trained on the cross-entropy or the mean
squared error by SGD, Adam or AdamW. For anything else, a sentence says why there is no recipe. Each step
makes its recipe anew and caches nothing, because anything may have changed since the last step: learning
rates, hooks, parameters, PyTorch's own functions. Cheap checks come first.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_anomaly_enabled, is_autocast_enabled, is_grad_enabled
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import CrossEntropyLoss, Flatten, Identity, Module, MSELoss, Parameter, ReLU
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.modules.module import _has_any_global_hook
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as _optimizer

from fusedmlp import nn
from fusedmlp.dispatch import backend_choice
from fusedmlp.torch_tools.patched import why_step_patched
from fusedmlp.train.shared_memory import Spans, memory_of

# map calls these for every parameter at every step, which is faster than a loop.
_is_contiguous, _is_inference = Tensor.is_contiguous, Tensor.is_inference
_shape_of, _dtype_of, _is_on_cpu = map(operator.attrgetter, ("shape", "dtype", "is_cpu"))
_look_at = operator.attrgetter(
    "__class__", "requires_grad", "dtype", "is_cpu", "_backward_hooks", "_post_accumulate_grad_hooks"
)
_use_count = Tensor._use_count  # type: ignore[attr-defined, unused-ignore]

SHARES_MEMORY = "Either x or y shares memory with a parameter or the optimizer's state."
NO_STATE = "The optimizer has no state yet; the first step runs as in PyTorch's loop."
NODE_IS_HELD = "The AccumulateGrad node of a parameter is kept alive, perhaps by a graph; it may have hooks."


class Recipe(NamedTuple):
    """An MLP with its loss and its optimizer, as they are at this step."""

    flatten: bool  # whether nn.Flatten comes first
    weights: list[Parameter]  # the model's own parameters, all of one dtype and device
    biases: list[Parameter | None]
    loss: str  # "cross_entropy" or "mse"
    update: str  # "sgd", "adam" or "adamw"
    parameters: list[Parameter]  # weight, bias, weight, ..., without the biases that are None
    groups: list[dict[str, Any]]  # for each parameter, its group in optimizer.param_groups
    # For each parameter, its entry in optimizer.state: momentum_buffer if the momentum is not 0; for Adam,
    # step, exp_avg and exp_avg_sq.
    states: list[dict[str, Any]]
    counts: list[Tensor]  # the optimizer's counts of steps: Adam's state["step"], none for SGD
    written: list[Tensor]  # all that the optimizer's step writes to: parameters, moments, counts
    memory: Spans  # where the tensors in written lie; no two of them share memory


def recipe_of(model: Module, loss_fn: Callable[..., Tensor], optimizer: Optimizer) -> Recipe | str:
    """The recipe, or a sentence that says why there is none."""
    if (reason := why_step_patched()) is not None:
        return reason
    loss = _loss_of(loss_fn)
    if loss not in ("cross_entropy", "mse"):
        return loss
    if (reason := why_update_unknown(optimizer)) is not None:
        return reason
    for group in optimizer.param_groups:
        for name in _REFUSED:
            if group.get(name, False):
                return f"The optimizer has {name}=True."
    layers = _layers_of(model)
    if isinstance(layers, str):
        return layers
    flatten, weights, biases = layers
    parameters = [p for pair in zip(weights, biases, strict=True) for p in pair if p is not None]
    if (reason := _why_parameters_unknown(weights, biases, parameters)) is not None:
        return reason
    groups = _groups_of(parameters, optimizer)
    if isinstance(groups, str):
        return groups
    decoupled = groups[0].get("decoupled_weight_decay", False)
    update = "sgd" if type(optimizer) is SGD else "adamw" if decoupled else "adam"
    found = _states_of(parameters, groups, optimizer, update)
    if isinstance(found, str):
        return found
    states, moments, counts = found
    written = [*parameters, *moments, *counts]
    memory = memory_of(written)
    rates = [group["lr"] for group in optimizer.param_groups if isinstance(group["lr"], Tensor)]
    if memory is None or any(map(memory.touch, rates)):
        return "Two parameters, or a parameter and the optimizer's state or learning rate, share memory."
    return Recipe(flatten, weights, biases, loss, update, parameters, groups, states, counts, written, memory)


def why_watched(device_type: str, forced: bool = False) -> str | None:
    """Why a step on this type of device has to run PyTorch's functions one by one under autograd, or None.

    forced: the step asked about runs on the kernels, so ``backend("triton")`` is no reason against it.
    """
    if not is_grad_enabled():
        return "Grad mode is off, and a backward would raise."
    if is_autocast_enabled(device_type):
        return "Autocast is on."
    if not backend_choice.quiet() and not (forced and backend_choice.forced()):
        return "Either explain() is recording or backend('triton') is in force."
    if is_anomaly_enabled():
        return "Anomaly detection is on."
    if _len_torch_dispatch_stack() > 0 or _len_torch_function_stack() > 0:
        return "A TorchDispatchMode or TorchFunctionMode is active."
    if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "A torch.func transform or forward-mode differentiation is active."
    if _top_saved_tensors_default_hooks(True) is not None:
        return "A hook on saved tensors is active."
    if is_compiling():
        return "The step is being traced by torch.compile."
    return None


def why_batch_unknown(recipe: Recipe, x: Tensor, y: Tensor) -> str | None:
    """Why x does not fit the model of this recipe, or y its loss; None if both fit."""
    if x.requires_grad or y.requires_grad:
        return "Either x or y requires grad."
    if x.layout is not torch.strided or y.layout is not torch.strided or x.is_nested or y.is_nested:
        return "Either x or y is sparse or nested."
    weight, shape = recipe.weights[0], x.shape
    if len(shape) < 2 or not (recipe.flatten or len(shape) == 2) or shape[1:].numel() != weight.shape[1]:
        return f"The input x {tuple(shape)} is not a batch of rows of {weight.shape[1]} columns."
    if shape[0] == 0:
        return "The batch is empty."
    if recipe.loss == "cross_entropy":
        if y.dtype is not torch.int64 or y.shape != (shape[0],):
            return f"The target y is {tuple(y.shape)} of {y.dtype}, not int64 class numbers for each row."
    elif y.dtype is not weight.dtype or y.shape != (shape[0], recipe.weights[-1].shape[0]):
        return f"The target y is {tuple(y.shape)} of {y.dtype}, not like the output of the model."
    return None


def _loss_of(loss_fn: Any) -> str:
    """The name of the loss, or a sentence that says why it is neither of the two."""
    kind = type(loss_fn)
    if loss_fn is cross_entropy or loss_fn is mse_loss:
        return "cross_entropy" if loss_fn is cross_entropy else "mse"
    if kind is not CrossEntropyLoss and kind is not MSELoss:
        name = getattr(loss_fn, "__name__", kind.__name__)
        return f"The loss is {name}, neither cross-entropy nor the mean squared error."
    own = loss_fn.__dict__
    usual = nn._unobserved(loss_fn, _FORWARDS) and own.get("reduction") == "mean"
    if kind is CrossEntropyLoss:
        usual = (
            usual
            and own.get("ignore_index") == -100
            and own.get("label_smoothing") == 0
            and own["_buffers"].get("weight", loss_fn) is None  # neither set nor deleted
            and "weight" not in own
        )
    if not usual:
        return f"The {kind.__name__} has a reduction other than the mean, weights, another option or a hook."
    return "cross_entropy" if kind is CrossEntropyLoss else "mse"


_REFUSED = ("maximize", "differentiable", "amsgrad", "capturable")


def _unhooked(step: Any) -> Any:
    """The step of an optimizer class without the wrapper for hooks that the first instance puts around it."""
    return step.__wrapped__ if "hooked" in vars(step) else step


_STEPS = {kind: _unhooked(kind.step) for kind in (SGD, Adam, AdamW)}
_ZERO_GRAD = Optimizer.zero_grad


def why_update_unknown(optimizer: Optimizer) -> str | None:
    """Why a step of the optimizer may do more than the formula of SGD, Adam or AdamW, or None."""
    kind, own = type(optimizer), optimizer.__dict__
    if kind not in _STEPS:
        return f"The optimizer is a {kind.__name__}, not SGD, Adam or AdamW."
    step = own.get("step")
    # A learning rate scheduler wraps the step, only to know whether it was called.
    if step is not None and not (
        "_wrapped_by_lr_sched" in vars(step) and _unhooked(step.__wrapped__) is _STEPS[kind]
    ):
        return "The optimizer's step was replaced."
    if _unhooked(kind.step) is not _STEPS[kind] or kind.zero_grad is not _ZERO_GRAD or "zero_grad" in own:
        return "The optimizer's step or zero_grad was replaced."
    if (
        own["_optimizer_step_pre_hooks"]
        or own["_optimizer_step_post_hooks"]
        or _optimizer._global_optimizer_pre_hooks
        or _optimizer._global_optimizer_post_hooks
    ):
        return "The optimizer's step has a hook."
    if own.get("grad_scale") is not None or own.get("found_inf") is not None:
        return "A GradScaler works on the optimizer."
    return None


def _groups_of(parameters: list[Parameter], optimizer: Optimizer) -> list[dict[str, Any]] | str:
    """The optimizer's group of each parameter, or a sentence that says what is unusual about the groups."""
    if len(optimizer.param_groups) == 1:
        (group,) = optimizer.param_groups
        if list(map(id, group["params"])) == list(map(id, parameters)):  # the usual case, checked fast
            return [group] * len(parameters)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if len(groups) != len(parameters):
        return "The optimizer's parameters are not just the parameters of the model."
    try:
        found = [groups[id(p)] for p in parameters]
    except KeyError:
        return "A parameter of the model is not in the optimizer."
    decoupled = found[0].get("decoupled_weight_decay")
    if any(group.get("decoupled_weight_decay") != decoupled for group in found):
        return "One group of parameters has a decoupled weight decay and another has not."
    return found


def _states_of(
    parameters: list[Parameter], groups: list[dict[str, Any]], optimizer: Optimizer, update: str
) -> tuple[list[dict[str, Any]], list[Tensor], list[Tensor]] | str:
    """The optimizer's state of each parameter, all moments and all counts of steps; or what is unusual."""
    having = [i for i, group in enumerate(groups) if update != "sgd" or group["momentum"] != 0]
    if not having:  # SGD without momentum neither reads nor writes state
        return [{}] * len(parameters), [], []
    get = optimizer.state.get
    states = [get(parameter) or {} for parameter in parameters]
    owners = [parameters[i] for i in having]  # for each moment, the parameter that it must resemble
    moments: list[Any]
    counts: list[Any] = []
    if update == "sgd":
        moments = [states[i].get("momentum_buffer") for i in having]
    else:
        owners += owners
        moments = [state.get(name) for name in ("exp_avg", "exp_avg_sq") for state in states]
        counts = [state.get("step") for state in states]
    first, tensors = parameters[0], moments + counts
    kinds = set(map(type, tensors))
    if type(None) in kinds:
        return NO_STATE
    if kinds != {Tensor}:
        return "The optimizer's state is not made of plain tensors."
    if any(count.dtype is not torch.float32 or count.dim() != 0 for count in counts):
        return "The optimizer's count of steps is not a float32 tensor with one element."
    if (
        list(map(_shape_of, moments)) != list(map(_shape_of, owners))
        or set(map(_dtype_of, moments)) != {first.dtype}
        or not all(map(_is_contiguous, moments))
        or not (
            all(map(_is_on_cpu, tensors)) if first.is_cpu else {t.device for t in moments} == {first.device}
        )
    ):
        return "The optimizer's state is not of the parameter's shape, dtype and device."
    return states, moments, counts


_CONTAINERS = (torch.nn.Sequential, nn.Sequential, nn.MLP)
_FORWARDS: dict[type[Module], Any] = nn._FORWARDS | {
    kind: kind.forward for kind in (*_CONTAINERS, Flatten, Identity, CrossEntropyLoss, MSELoss)
}


def _layers_of(model: Module) -> tuple[bool, list[Parameter], list[Parameter | None]] | str:
    """``(True if a Flatten comes first, weights, biases)``, or why the model has no recipe."""
    if _has_any_global_hook() or Module.__call__ is not nn._MODULE_CALL:
        return "A global hook of modules is registered, or Module.__call__ was replaced."
    if type(model) not in _CONTAINERS and type(model) not in nn._LINEARS:
        return f"The model is a {type(model).__name__}, not a Sequential of Linear and ReLU."
    modules: list[Module] = []
    if (reason := _collect(model, modules)) is not None:
        return reason
    flatten, relu = False, True  # relu: a Linear may come next, as it may after a ReLU and at the start
    weights: list[Parameter] = []
    biases: list[Parameter | None] = []
    for module in modules:
        kind = type(module)
        if kind in nn._LINEARS:
            if not relu:
                return "Two Linear layers follow each other without a ReLU."
            if not nn._own_parameters(module):
                return "The weight or bias of a Linear is not its registered parameter, as under weight_norm."
            weights.append(module._parameters["weight"])  # type: ignore[arg-type]  # a Linear's is not None
            biases.append(module._parameters["bias"])
            relu = kind is nn.LinearReLU
        elif kind is ReLU:
            if relu:
                return "A ReLU does not follow a Linear."
            relu = True
        elif kind is Flatten:
            if weights or flatten or module.start_dim != 1 or module.end_dim != -1:
                return "A Flatten is not the first of the layers, or keeps some dimensions."
            flatten = True
        elif kind is not Identity:
            return f"One of the layers is a {kind.__name__}, neither Linear nor ReLU."
    if relu:
        return "The last layer is not a Linear without a ReLU."
    return flatten, weights, biases


def _collect(module: Module, modules: list[Module]) -> str | None:
    """Append all modules except Sequentials in the order in which they run, or return why that is unknown."""
    if type(module) not in _FORWARDS or not nn._unobserved(module, _FORWARDS):
        return f"A {type(module).__name__} is not known, or has a hook or a forward of its own."
    if type(module) not in _CONTAINERS:
        modules.append(module)
        return None
    for member in module._modules.values():
        if (reason := _collect(member, modules)) is not None:  # type: ignore[arg-type]  # of a Sequential
            return reason
    return None


def has_node(parameter: Tensor) -> bool:
    """True if the parameter's AccumulateGrad node exists. It may have hooks, which only a backward calls.

    PyTorch makes the node when something first asks for it, and drops it with the last reference to it. The
    node itself holds a reference to the parameter. So if asking for the node leaves the number of references
    to the parameter as it was, the node existed before.
    """
    holders = _use_count(parameter)
    if holders == 1:
        return False
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    there: bool = _use_count(parameter) == holders
    del node
    return there


def _why_parameters_unknown(
    weights: list[Parameter], biases: list[Parameter | None], parameters: list[Parameter]
) -> str | None:
    # One fast comparison of all parameters; only where it fails are they checked one by one.
    usual = (Parameter, True, weights[0].dtype, True, None, None)
    if list(map(_look_at, parameters)) != [usual] * len(parameters):
        first = weights[0]
        if first.is_meta:
            return "The model is on meta, where tensors have no values."
        for parameter in parameters:
            if type(parameter) is not Parameter:
                return f"A parameter is a {type(parameter).__name__}."
            if not parameter.requires_grad:
                return "A parameter is frozen: requires_grad is False."
            if parameter.dtype is not first.dtype or parameter.device != first.device:
                return "The parameters are not all of one dtype on one device."
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return "A parameter has a hook."
    if not all(map(_is_contiguous, parameters)):
        return "A parameter is not contiguous in memory."
    columns = None  # that the next weight must have: the outputs of the layer before it
    for weight, bias in zip(weights, biases, strict=True):
        shape = weight.shape
        fits = len(shape) == 2 and (columns is None or shape[1] == columns)
        if not fits or (bias is not None and bias.shape != (shape[0],)):
            return "The shapes of the layers do not fit."
        columns = shape[0]
    if len(set(map(id, parameters))) != len(parameters):
        return "Two layers share a parameter."
    # The first sum is fast: almost always, the only reference to a parameter is that of its Python object.
    if sum(map(_use_count, parameters)) != len(parameters) and any(map(has_node, parameters)):
        return NODE_IS_HELD
    if any(map(_is_inference, parameters)):
        return "A parameter was made in inference mode."
    return None
