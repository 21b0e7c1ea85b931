"""What a model, a loss and an optimizer are together, if they are well known: or the reason why not.

Asked anew at every step, as anything may have changed since: nothing here is cached, and no tensor's version
is trusted. The order of the questions is by what they cost.
"""

import functools
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.optim import optimizer as _optimizer

from fusedmlp import _backend, nn
from fusedmlp._patched import why_step_patched

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
    ``exp_avg`` and ``exp_avg_sq``. memory: where parameters and state lie, no two of them on one another.
    """

    flatten: bool
    weights: list[torch.nn.Parameter]
    biases: list[torch.nn.Parameter | None]
    loss: Loss
    update: Update
    parameters: list[torch.nn.Parameter]
    groups: list[dict[str, Any]]
    states: list[dict[str, Any]]
    memory: "Spans"

    def written(self) -> list[torch.Tensor]:
        """All tensors that the optimizer's step writes to: parameters and state."""
        return [*self.parameters, *_state_tensors(self.states, self.groups, self.update)]


class Spans(NamedTuple):
    """Pieces of memory that do not overlap: their first addresses, in order, and where each ends."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def touch(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor, which is strided, lies in one of them, were it with a gap between its rows."""
        if tensor.is_contiguous():
            size = tensor.nbytes
        else:
            steps = ((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            size = (sum(steps) + 1) * tensor.itemsize if tensor.numel() > 0 else 0
        start = tensor.data_ptr()
        after = bisect_right(self.starts, start)  # the first that begins behind it
        return (after > 0 and self.ends[after - 1] > start and size > 0) or (
            after < len(self.starts) and self.starts[after] < start + size
        )


@functools.lru_cache(64)  # a function of these numbers alone, which mostly are those of the step before
def _spans(starts: tuple[int, ...], sizes: tuple[int, ...]) -> Spans | None:
    """The pieces of so many bytes at these addresses, or None if two of them overlap."""
    pieces = sorted((start, start + size) for start, size in zip(starts, sizes, strict=True) if size > 0)
    begins, ends = tuple(start for start, _ in pieces), tuple(end for _, end in pieces)
    return Spans(begins, ends) if all(map(int.__le__, ends, begins[1:])) else None


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
    if _has_any_global_hook() or torch.nn.Module.__call__ is not nn._MODULE_CALL:
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
        elif kind is torch.nn.ReLU:
            if relu:
                return "a ReLU does not follow a Linear"
            relu = True
        elif kind is torch.nn.Flatten:
            if weights or flatten or module.start_dim != 1 or module.end_dim != -1:
                return "a Flatten is not the first of the layers, or keeps some dimensions"
            flatten = True
        elif kind is not torch.nn.Identity:
            return f"there is a {kind.__name__} among the layers; Linear and ReLU are known"
    if relu:
        return "the last layer is not a Linear without a ReLU"
    if (reason := _why_parameters_unknown(weights, biases)) is not None:
        return reason
    parameters = [p for pair in zip(weights, biases, strict=True) for p in pair if p is not None]
    groups = _groups_of(parameters, optimizer)
    if isinstance(groups, str):
        return groups
    decoupled = groups[0].get("decoupled_weight_decay", False)
    update: Update = "sgd" if type(optimizer) is torch.optim.SGD else "adamw" if decoupled else "adam"
    states = _states_of(parameters, groups, optimizer, update)
    if isinstance(states, str):
        return states
    memory = memory_of([*parameters, *_state_tensors(states, groups, update)])
    rates = [group["lr"] for group in optimizer.param_groups if isinstance(group["lr"], torch.Tensor)]
    if memory is None or any(map(memory.touch, rates)):
        return "two parameters, or a parameter and the optimizer's state or learning rate, share memory"
    return Recipe(flatten, weights, biases, loss, update, parameters, groups, states, memory)  # type: ignore[arg-type]


def why_watched(device_type: str, forced: bool = False) -> str | None:
    """Why a step on this kind of device has to run PyTorch's functions one by one under autograd, or None.

    forced: it runs on the kernels, as under ``backend("triton")``.
    """
    if not torch.is_grad_enabled():
        return "grad mode is off, under which a backward raises"
    if torch.is_autocast_enabled(device_type):
        return "autocast is on"
    if not _backend.quiet() and not (forced and _backend.forced()):
        return "explain() is recording, or backend('triton') is in force"
    if torch.is_anomaly_enabled():
        return "anomaly detection is on"
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._len_torch_function_stack() > 0:
        return "a TorchDispatchMode or TorchFunctionMode is active"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a torch.func transform or forward-mode differentiation is active"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "a hook on saved tensors is in force"
    if torch.compiler.is_compiling():
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
    holders = parameter._use_count()  # type: ignore[attr-defined, unused-ignore]  # not in every version's types
    if holders == 1:  # the object in Python: this is almost always so
        return False
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    there: bool = parameter._use_count() == holders  # type: ignore[attr-defined, unused-ignore]
    del node
    return there


def _why_parameters_unknown(
    weights: list[torch.nn.Parameter], biases: list[torch.nn.Parameter | None]
) -> str | None:
    first = weights[0]
    dtype, on_cpu, device = first.dtype, first.is_cpu, first.device
    seen: set[int] = set()
    columns = None
    for weight, bias in zip(weights, biases, strict=True):
        for parameter in (weight,) if bias is None else (weight, bias):
            if type(parameter) is not torch.nn.Parameter:
                return f"a parameter is a {type(parameter).__name__}"
            if not parameter.requires_grad or parameter.is_inference():
                return "a parameter is frozen, or was made in inference mode"
            # To compare devices takes longer than all else here.
            if parameter.dtype is not dtype or not (
                (parameter.is_cpu and on_cpu) or parameter.device == device
            ):
                return "the parameters are not all of one dtype on one device"
            if not parameter.is_contiguous():
                return "a parameter is not contiguous in memory"
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return "a parameter has a hook"
            if has_node(parameter):
                return NODE_IS_HELD
            seen.add(id(parameter))
        shape = weight.shape
        if (
            len(shape) != 2
            or (columns is not None and shape[1] != columns)
            or (bias is not None and bias.shape != shape[:1])
        ):
            return "the shapes of the layers do not fit"
        columns = shape[0]
    if len(seen) != 2 * len(weights) - sum(bias is None for bias in biases):
        return "two layers share a parameter"
    return None


def _groups_of(
    parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]] | str:
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
) -> list[dict[str, Any]] | str:
    states = []
    tensors: tuple[Any, ...]
    of = optimizer.state
    for parameter, group in zip(parameters, groups, strict=True):
        state = of.get(parameter)
        if state is None:
            state = {}
        states.append(state)
        if update == "sgd":
            if group["momentum"] == 0:
                continue
            tensors = (state.get("momentum_buffer"),)
        else:
            tensors = (state.get("exp_avg"), state.get("exp_avg_sq"))
            step = state.get("step")
            if step is None:
                return NO_STATE
            if type(step) is not torch.Tensor or step.dtype is not torch.float32 or step.dim() != 0:
                return "the optimizer's count of steps is not a float32 tensor"
        dtype, shape, on_cpu = parameter.dtype, parameter.shape, parameter.is_cpu
        for tensor in tensors:
            if tensor is None:
                return NO_STATE
            if (
                type(tensor) is not torch.Tensor
                or tensor.dtype is not dtype
                or tensor.shape != shape
                or not ((tensor.is_cpu and on_cpu) or tensor.device == parameter.device)
                or not tensor.is_contiguous()
            ):
                return "the optimizer's state is not of the parameter's shape, dtype and device"
    return states


def _state_tensors(
    states: list[dict[str, Any]], groups: list[dict[str, Any]], update: Update
) -> list[torch.Tensor]:
    """What the optimizer's step writes to besides the parameters."""
    if update == "sgd":
        pairs = zip(states, groups, strict=True)
        return [state["momentum_buffer"] for state, group in pairs if group["momentum"] != 0]
    return [state[name] for state in states for name in ("step", "exp_avg", "exp_avg_sq")]


def memory_of(tensors: list[torch.Tensor]) -> Spans | None:
    """Where these contiguous tensors lie, or None if two of them share memory.

    A step that works on one after the other, or on all at once, would find there what it wrote for another.
    """
    return _spans(tuple([t.data_ptr() for t in tensors]), tuple([t.nbytes for t in tensors]))
