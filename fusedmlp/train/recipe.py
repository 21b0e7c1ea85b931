"""What a model, a loss and an optimizer are together, if they are well known: or the reason why not.

Asked anew at every step, as anything may have changed since: nothing here is cached, and no tensor's version
is trusted. The order of the questions is by what they cost.
"""

import operator
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook
from torch.optim import optimizer as _optimizer

from fusedmlp import nn
from fusedmlp.dispatch import backend_choice
from fusedmlp.torch_tools.patched import why_step_patched

# Every step asks these questions anew. A name of this module is found faster than an attribute of torch.
_Parameter, _Tensor, _Module, _SGD = torch.nn.Parameter, torch.Tensor, torch.nn.Module, torch.optim.SGD
_ReLU, _Flatten, _Identity = torch.nn.ReLU, torch.nn.Flatten, torch.nn.Identity
_is_grad_enabled, _is_autocast_enabled = torch.is_grad_enabled, torch.is_autocast_enabled
_is_anomaly_enabled = torch.is_anomaly_enabled
_are_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
# map calls these for every tensor of a step, which is faster than a loop.
_data_ptr, _nbytes = torch.Tensor.data_ptr, operator.attrgetter("nbytes")
_is_contiguous, _is_inference = torch.Tensor.is_contiguous, torch.Tensor.is_inference
_shape_of = operator.attrgetter("shape")
_dtype_of, _is_on_cpu = operator.attrgetter("dtype"), operator.attrgetter("is_cpu")
_look_at = operator.attrgetter(
    "__class__", "requires_grad", "dtype", "is_cpu", "_backward_hooks", "_post_accumulate_grad_hooks"
)
_use_count = torch.Tensor._use_count  # type: ignore[attr-defined, unused-ignore]

Loss = Literal["cross_entropy", "mse"]
Update = Literal["sgd", "adam", "adamw"]

SHARES_MEMORY = "x or y lies in the memory of a parameter or of the optimizer's state"
NO_STATE = "the optimizer has no state yet, which PyTorch's own step makes the first time"


class Recipe(NamedTuple):
    """An MLP Linear, ReLU, Linear, ..., Linear with its loss and its optimizer, as they are now.

    flatten: whether x goes through ``nn.Flatten`` first. weights, biases: the parameters themselves, layer by
    layer, all on one device and of one dtype. update: of SGD, Adam or AdamW. parameters: those that there
    are, as weight, bias, weight, ...; groups and states: for each of them its group of hyper-parameters and
    the optimizer's own state, complete: ``momentum_buffer`` where momentum is not 0, or ``step``,
    ``exp_avg`` and ``exp_avg_sq``. written: all tensors that the optimizer's step writes to, parameters and
    state; memory: where they lie, no two of them on one another.
    """

    flatten: bool
    weights: list[torch.nn.Parameter]
    biases: list[torch.nn.Parameter | None]
    loss: Loss
    update: Update
    parameters: list[torch.nn.Parameter]
    groups: list[dict[str, Any]]
    states: list[dict[str, Any]]
    written: list[torch.Tensor]
    memory: "Spans"


_LAST = 2**64  # no address is so large


class Spans(NamedTuple):
    """Pieces of memory that do not overlap: where each begins, in order, and its size in bytes."""

    pieces: list[tuple[int, int]]

    def touch(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor, which is strided, lies in one of them, were it with a gap between its rows."""
        if tensor.is_contiguous():
            size = tensor.nbytes
        else:
            steps = ((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            size = (sum(steps) + 1) * tensor.itemsize if tensor.numel() > 0 else 0
        start = tensor.data_ptr()
        after = bisect_right(self.pieces, (start, _LAST))  # the first piece that begins behind it
        return size > 0 and (
            (after > 0 and sum(self.pieces[after - 1]) > start)
            or (after < len(self.pieces) and self.pieces[after][0] < start + size)
        )


def memory_of(tensors: list[torch.Tensor]) -> Spans | None:
    """Where these contiguous tensors lie, or None if two of them share memory.

    A step that works on one after the other, or on all at once, would find there what it wrote for another.
    """
    # The address of a tensor without values is 0, wherever it was cut from.
    pieces = sorted(zip(map(_data_ptr, tensors), map(_nbytes, tensors), strict=True))
    end = 0
    for start, size in pieces:
        if start < end:
            return None
        end = start + size
    return Spans(pieces)


def recipe_of(
    model: torch.nn.Module, loss_fn: Callable[..., torch.Tensor], optimizer: torch.optim.Optimizer
) -> Recipe | str:
    """The recipe, or in a sentence what is not known."""
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
                return f"the optimizer has {name}=True"
    if _has_any_global_hook() or _Module.__call__ is not nn._MODULE_CALL:
        return "a global hook of modules is registered, or Module.__call__ was replaced"
    if type(model) not in _CONTAINERS and type(model) not in nn._LINEARS:
        return f"the model is a {type(model).__name__}; a Sequential of Linear and ReLU is known"
    flatten, relu = False, True  # whether a Linear may follow, as after a ReLU
    weights: list[torch.nn.Parameter] = []
    biases: list[torch.nn.Parameter | None] = []
    members: list[torch.nn.Module] = []
    if (reason := _members(model, members)) is not None:
        return reason
    for module in members:
        kind = type(module)
        if kind in nn._LINEARS:
            if not relu:
                return "two Linear layers follow each other without a ReLU"
            if not nn._own_parameters(module):
                return "weight or bias of a Linear is not its registered parameter, as under weight_norm"
            weights.append(module._parameters["weight"])  # type: ignore[arg-type]  # a Linear's is not None
            biases.append(module._parameters["bias"])
            relu = kind is nn.LinearReLU
        elif kind is _ReLU:
            if relu:
                return "a ReLU does not follow a Linear"
            relu = True
        elif kind is _Flatten:
            if weights or flatten or module.start_dim != 1 or module.end_dim != -1:
                return "a Flatten is not the first of the layers, or keeps some dimensions"
            flatten = True
        elif kind is not _Identity:
            return f"there is a {kind.__name__} among the layers; Linear and ReLU are known"
    if relu:
        return "the last layer is not a Linear without a ReLU"
    parameters = [p for pair in zip(weights, biases, strict=True) for p in pair if p is not None]
    if (reason := _why_parameters_unknown(weights, biases, parameters)) is not None:
        return reason
    groups = _groups_of(parameters, optimizer)
    if isinstance(groups, str):
        return groups
    decoupled = groups[0].get("decoupled_weight_decay", False)
    update: Update = "sgd" if type(optimizer) is _SGD else "adamw" if decoupled else "adam"
    found = _states_of(parameters, groups, optimizer, update)
    if isinstance(found, str):
        return found
    states, written = found[0], [*parameters, *found[1]]
    memory = memory_of(written)
    rates = [group["lr"] for group in optimizer.param_groups if isinstance(group["lr"], _Tensor)]
    if memory is None or any(map(memory.touch, rates)):
        return "two parameters, or a parameter and the optimizer's state or learning rate, share memory"
    known: Loss = loss  # type: ignore[assignment]  # it is one of the two, as asked above
    return Recipe(flatten, weights, biases, known, update, parameters, groups, states, written, memory)


def why_watched(device_type: str, forced: bool = False) -> str | None:
    """Why a step on this kind of device has to run PyTorch's functions one by one under autograd, or None.

    forced: it runs on the kernels, as under ``backend("triton")``.
    """
    if not _is_grad_enabled():
        return "grad mode is off, under which a backward raises"
    if _is_autocast_enabled(device_type):
        return "autocast is on"
    if not backend_choice.quiet() and not (forced and backend_choice.forced()):
        return "explain() is recording, or backend('triton') is in force"
    if _is_anomaly_enabled():
        return "anomaly detection is on"
    if _dispatch_modes() > 0 or _function_modes() > 0:
        return "a TorchDispatchMode or TorchFunctionMode is active"
    if _are_transforms_active() or forward_ad._current_level >= 0:
        return "a torch.func transform or forward-mode differentiation is active"
    if _top_hooks(True) is not None:
        return "a hook on saved tensors is in force"
    if is_compiling():
        return "torch.compile is tracing"
    return None


_CONTAINERS = (torch.nn.Sequential, nn.Sequential, nn.MLP)
_OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def _unhooked(step: Any) -> Any:
    """Without the wrapper for hooks and profiles, which its first instance puts around it."""
    return step.__wrapped__ if "hooked" in vars(step) else step


_STEPS = {kind: _unhooked(kind.step) for kind in _OPTIMIZERS}
_ZERO_GRAD = torch.optim.Optimizer.zero_grad
_KNOWN_MODULES = {
    **nn._FORWARDS,
    **{kind: kind.forward for kind in (*_CONTAINERS, torch.nn.Flatten, torch.nn.Identity)},
    **{kind: kind.forward for kind in (torch.nn.CrossEntropyLoss, torch.nn.MSELoss)},
}
_CROSS_ENTROPY, _MSE = torch.nn.functional.cross_entropy, torch.nn.functional.mse_loss


def _loss_of(loss_fn: Callable[..., torch.Tensor]) -> str:
    if loss_fn is _CROSS_ENTROPY:
        return "cross_entropy"
    if loss_fn is _MSE:
        return "mse"
    kind = type(loss_fn)
    if kind is torch.nn.CrossEntropyLoss:
        own = vars(loss_fn)
        if (
            _unobserved(loss_fn)  # type: ignore[arg-type]
            and own["reduction"] == "mean"
            and own["ignore_index"] == -100
            and own["label_smoothing"] == 0
            and loss_fn._buffers.get("weight", loss_fn) is None  # type: ignore[attr-defined]
            and "weight" not in own
        ):
            return "cross_entropy"
        return "the CrossEntropyLoss has weights, label smoothing, a hook or another option"
    if kind is torch.nn.MSELoss:
        if _unobserved(loss_fn) and vars(loss_fn)["reduction"] == "mean":  # type: ignore[arg-type]
            return "mse"
        return "the MSELoss has another reduction than the mean, or a hook"
    name = getattr(loss_fn, "__name__", kind.__name__)
    return f"the loss is {name}; cross entropy and the mean squared error are known"


def why_update_unknown(optimizer: torch.optim.Optimizer) -> str | None:
    """Why the optimizer's step may be more than the formula of SGD, Adam or AdamW, or None."""
    kind, own = type(optimizer), optimizer.__dict__
    if kind not in _OPTIMIZERS:
        return f"the optimizer is a {kind.__name__}; SGD, Adam and AdamW are known"
    step = own.get("step")
    # A scheduler wraps it, only to know that it was called.
    if step is not None and not (
        "_wrapped_by_lr_sched" in vars(step) and _unhooked(step.__wrapped__) is _STEPS[kind]
    ):
        return "the optimizer's step was replaced"
    if _unhooked(kind.step) is not _STEPS[kind] or kind.zero_grad is not _ZERO_GRAD or "zero_grad" in own:
        return "the optimizer's step or zero_grad was replaced"
    if (
        own["_optimizer_step_pre_hooks"]
        or own["_optimizer_step_post_hooks"]
        or _optimizer._global_optimizer_pre_hooks
        or _optimizer._global_optimizer_post_hooks
    ):
        return "the optimizer's step has a hook"
    if own.get("grad_scale") is not None or own.get("found_inf") is not None:
        return "a GradScaler works on the optimizer"
    return None


_REFUSED = ("maximize", "differentiable", "amsgrad", "capturable")


def _members(module: torch.nn.Module, members: list[torch.nn.Module]) -> str | None:
    """Add all modules that are no Sequentials, in the order in which they run; the reason where not known."""
    if not _unobserved(module):
        return f"a {type(module).__name__} is not known, or has a hook or a forward of its own"
    if type(module) not in _CONTAINERS:
        members.append(module)
        return None
    for member in module._modules.values():
        if (reason := _members(member, members)) is not None:  # type: ignore[arg-type]  # of a Sequential
            return reason
    return None


def _unobserved(module: torch.nn.Module) -> bool:
    """Whether a call of this module is its class's own forward, a known one, and nothing else."""
    own = module.__dict__
    known = _KNOWN_MODULES.get(type(module))
    return known is not None and not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or module._compiled_call_impl is not None
        or "forward" in own
        or type(module).forward is not known
    )


NODE_IS_HELD = (
    "somebody holds the AccumulateGrad node of a parameter, or a graph with it, and it may have hooks"
)


def has_node(parameter: torch.Tensor) -> bool:
    """Whether somebody holds the parameter's AccumulateGrad node, whose hooks only a backward calls.

    The node holds the parameter, is made when it is first asked for, and lives no longer than somebody holds
    it: so it is there if, once we have asked for it, nobody more than before holds the parameter.
    """
    holders = _use_count(parameter)
    if holders == 1:
        return False
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    there: bool = _use_count(parameter) == holders
    del node
    return there


def _why_parameters_unknown(
    weights: list[torch.nn.Parameter],
    biases: list[torch.nn.Parameter | None],
    parameters: list[torch.nn.Parameter],
) -> str | None:
    # Of all at once, and one by one only where something is unusual.
    usual = (_Parameter, True, weights[0].dtype, True, None, None)
    if list(map(_look_at, parameters)) != [usual] * len(parameters):
        first = weights[0]
        if first.is_meta:
            return "the model is on meta, where tensors have no values"
        for parameter in parameters:
            if type(parameter) is not torch.nn.Parameter:
                return f"a parameter is a {type(parameter).__name__}"
            if not parameter.requires_grad:
                return "a parameter is frozen: requires_grad is False"
            if parameter.dtype is not first.dtype or parameter.device != first.device:
                return "the parameters are not all of one dtype on one device"
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return "a parameter has a hook"
    if not all(map(_is_contiguous, parameters)):
        return "a parameter is not contiguous in memory"
    columns = None
    for weight, bias in zip(weights, biases, strict=True):
        shape = weight.shape
        if (
            len(shape) != 2
            or (columns is not None and shape[1] != columns)
            or (bias is not None and bias.shape != (shape[0],))
        ):
            return "the shapes of the layers do not fit"
        columns = shape[0]
    if len(set(map(id, parameters))) != len(parameters):
        return "two layers share a parameter"
    # Each is held by its object in Python, and almost always by nobody else.
    if sum(map(_use_count, parameters)) != len(parameters) and any(map(has_node, parameters)):
        return NODE_IS_HELD
    if any(map(_is_inference, parameters)):
        return "a parameter was made in inference mode"
    return None


def _groups_of(
    parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]] | str:
    if len(optimizer.param_groups) == 1:
        (group,) = optimizer.param_groups
        if list(map(id, group["params"])) == list(map(id, parameters)):  # in this order, as is usual
            return [group] * len(parameters)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if len(groups) != len(parameters):
        return "the optimizer has not just the parameters of the model"
    try:
        found = [groups[id(p)] for p in parameters]
    except KeyError:
        return "a parameter of the model is not in the optimizer"
    decoupled = found[0].get("decoupled_weight_decay")
    if any(group.get("decoupled_weight_decay") != decoupled for group in found):
        return "one group of parameters has a decoupled weight decay and another has not"
    return found


def _states_of(
    parameters: list[torch.nn.Parameter],
    groups: list[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    update: Update,
) -> tuple[list[dict[str, Any]], list[torch.Tensor]] | str:
    """Of each parameter, and all tensors in it together; or why not known."""
    having = [i for i, group in enumerate(groups) if update != "sgd" or group["momentum"] != 0]
    if not having:  # a step takes nothing from the state, so nobody looks for it
        return [{}] * len(parameters), []
    get = optimizer.state.get
    states = [get(parameter) or {} for parameter in parameters]
    owners = [parameters[i] for i in having]  # of each tensor in moments, which has to be like it
    moments: list[Any]
    steps: list[Any] = []
    if update == "sgd":
        moments = [states[i].get("momentum_buffer") for i in having]
    else:
        owners += owners
        moments = [state.get(name) for name in ("exp_avg", "exp_avg_sq") for state in states]
        steps = [state.get("step") for state in states]
    first, tensors = parameters[0], moments + steps
    kinds = set(map(type, tensors))
    if type(None) in kinds:
        return NO_STATE
    if kinds != {_Tensor}:
        return "the optimizer's state is not made of plain tensors"
    if any(step.dtype is not torch.float32 or step.dim() != 0 for step in steps):
        return "the optimizer's count of steps is not a float32 tensor"
    if (
        list(map(_shape_of, moments)) != list(map(_shape_of, owners))
        or set(map(_dtype_of, moments)) != {first.dtype}
        or not all(map(_is_contiguous, moments))
        or not (
            all(map(_is_on_cpu, tensors)) if first.is_cpu else {t.device for t in moments} == {first.device}
        )
    ):
        return "the optimizer's state is not of the parameter's shape, dtype and device"
    return states, tensors
