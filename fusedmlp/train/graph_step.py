"""The ordinary step in CUDA graphs: zero_grad, forward, loss, backward, clip and update in one replay.

There is one graph for each shape of a batch, captured after a few steps without one:

    steps 1, 2   run as in PyTorch's loop, but on a side stream
    step 3       rehearses the capture: it does the same work in the graph's memory, so that libraries choose,
                 compile and allocate now what they need at a first call
    step 4       captures the step, which runs no kernel, and replays the graph
    from 5 on    copies the batch and changed learning rates into the graph's memory and replays the graph

All these steps train, so no state has to be saved and restored. The optimizer's step is captured if the
optimizer was made with ``fused=True`` or ``capturable=True``; else it runs after each replay.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.optim import Optimizer

from fusedmlp.dispatch import backend_choice
from fusedmlp.torch_tools import cuda_graph
from fusedmlp.torch_tools.patched import why_step_patched
from fusedmlp.torch_tools.warn import warn
from fusedmlp.train.recipe import NODE_IS_HELD, has_node, why_update_unknown

_WARM_UP = 3  # steps of a shape before its graph is captured; the last one is the rehearsal
_MOST = 16  # graphs, each with memory of its own

ForwardBackward = Callable[[Tensor, Tensor], Tensor]  # computes a batch's loss and .grad
Update = Callable[[], None]  # clips the gradients in .grad and steps the optimizer


def why_not(model: torch.nn.Module, loss_fn: Any, optimizer: Optimizer, x: Tensor, y: Tensor) -> str | None:
    """Why replaying a step with this batch would leave something out, or None if it would not."""
    if type(x) is not Tensor or type(y) is not Tensor or y.device != x.device:
        return "The batch x, y is not plain tensors on one device."
    if x.requires_grad or y.requires_grad:
        return "Either x or y requires grad."
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return "Another CUDA graph is being captured."
    if (reason := cuda_graph.why_not_capture() or why_step_patched()) is not None:
        return reason
    if _has_any_global_hook():
        return "A global hook of modules is registered."
    for module in _modules(model, loss_fn):
        for kind in type(module).__mro__:
            if kind.__name__ in _PARALLEL and kind.__module__.startswith("torch."):
                return f"The model is parallel by {kind.__name__}, and a replay would not communicate."
        if any(vars(module)[name] for name in _HOOKS):
            return f"A {type(module).__name__} has a hook."
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for parameter in model.parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return "A parameter has a hook."
        if parameter.requires_grad and parameter.is_leaf and has_node(parameter):
            return NODE_IS_HELD
        if parameter.requires_grad and id(parameter) not in updated:
            return "A parameter of the model is not in the optimizer."
        if parameter.device != x.device:
            return "A parameter is on another device than x."
    return None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Names, because importing some of these classes takes a second.
_PARALLEL = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def takes_update(optimizer: Optimizer) -> bool:
    """True if the optimizer's step can be captured, with its learning rates as tensors."""
    return why_update_unknown(optimizer) is None and all(
        group.get("fused") or group.get("capturable") for group in optimizer.param_groups
    )


def written_by(optimizer: Optimizer) -> list[Tensor]:
    """The tensors that the optimizer's step writes to: parameters with a gradient, and their state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    tensors = (t for p in parameters for t in (p, *optimizer.state.get(p, {}).values()))
    return [t for t in tensors if isinstance(t, Tensor) and not t.is_inference()]


def fingerprint(
    model: torch.nn.Module, loss_fn: Any, optimizer: Optimizer, with_update: bool
) -> tuple[Any, ...]:
    """All that a capture bakes into a graph. Once the fingerprint changes, the graph is wrong.

    It leaves out learning rates that are numbers; :func:`renew` writes those into the graph's memory.
    """
    parts: list[Any] = [_settings(), loss_fn if not isinstance(loss_fn, torch.nn.Module) else None]
    for module in _modules(model, loss_fn):
        parts.append((id(module), type(module), type(module).forward))
        parts += [(name, _value(it)) for name, it in vars(module).items() if not name.startswith("_")]
        parts += [_value(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())]
    if with_update:
        for group in optimizer.param_groups:
            parts += [
                (name, _value(it))
                for name, it in group.items()
                if name != "params" and not (name == "lr" and isinstance(it, (int, float)))
            ]
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                parts.append((id(parameter), *map(_value, state.values())))
    return tuple(parts)


class Graph:
    """A step that is rehearsed once, then captured, then replayed for batches of the same shapes."""

    def __init__(self, steps: "Graphs", x: Tensor, y: Tensor) -> None:
        self.model, self.loss_fn, self.optimizer = steps.model, steps.loss_fn, steps.optimizer
        self.with_update = takes_update(self.optimizer)
        self.fingerprint = fingerprint(self.model, self.loss_fn, self.optimizer, self.with_update)
        # The fingerprint has ids of these objects, so they must stay alive.
        self.kept = [vars(module).copy() for module in _modules(self.model, self.loss_fn)]
        self.x, self.y = torch.empty_like(x), torch.empty_like(y)
        self.values = _numeric_rates(self.optimizer) if self.with_update else []
        self.rates = [torch.full((), lr, dtype=torch.float32, device=x.device) for lr in self.values]
        self.graph: torch.cuda.CUDAGraph | None = None

    def rehearse(self, x: Tensor, y: Tensor, forward_backward: ForwardBackward, update: Update) -> Tensor:
        """Train on this batch by the same calls that the next step captures, and return the loss."""
        self.x.copy_(x)
        self.y.copy_(y)
        self.optimizer.zero_grad()
        loss = self._step(forward_backward, update, capturable=False)
        if not self.with_update:
            update()
        return loss

    def capture(self, stream: "torch.cuda.Stream", forward_backward: ForwardBackward, update: Update) -> None:
        """Capture the step. After CaptureFailed no parameter has a gradient; all else is as it was."""
        self.optimizer.zero_grad(set_to_none=True)  # so that gradients are allocated in the graph's memory
        known = [(tensor, tensor._version) for tensor in self._tensors()]
        try:
            self.graph, self.loss = cuda_graph.capture(
                lambda: self._step(forward_backward, update, capturable=True), self.x.device, stream
            )
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)  # gradients that backward made have lost their memory
            raise
        self.grads = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        # The tensors that a replay writes to. A fused optimizer raises no versions, so its tensors are added.
        self.written = [tensor for tensor, version in known if tensor._version != version]
        self.written += [grad for _, grad in self.grads if not grad.is_inference()]
        if self.with_update:
            self.written += written_by(self.optimizer)

    def _tensors(self) -> Iterator[Tensor]:
        """The model's and the loss's tensors that have a version."""
        for module in _modules(self.model, self.loss_fn):
            for it in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
                if isinstance(it, Tensor) and not it.is_inference():
                    yield it

    def _step(self, forward_backward: ForwardBackward, update: Update, capturable: bool) -> Tensor:
        """The work that a capture records, on the batch in the graph's memory."""
        loss = forward_backward(self.x, self.y)
        if self.with_update:
            with _by_tensors(self.optimizer.param_groups, self.rates, capturable):
                update()
        return loss

    def is_current(self) -> bool:
        return self.with_update == takes_update(self.optimizer) and self.fingerprint == fingerprint(
            self.model, self.loss_fn, self.optimizer, self.with_update
        )

    def __call__(self, x: Tensor, y: Tensor, update: Update) -> Tensor:
        assert self.graph is not None
        renew(self.rates, self.values, self.optimizer)
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        torch.autograd.graph.increment_version(self.written)
        for parameter, grad in self.grads:  # the caller may have set others, or None
            parameter.grad = grad
        if not self.with_update:
            update()
        elif "step" in vars(self.optimizer):  # a learning rate scheduler checks this flag
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
        return self.loss.clone()


@contextlib.contextmanager
def _by_tensors(groups: list[dict[str, Any]], rates: list[Tensor], capturable: bool) -> Iterator[None]:
    """Inside, numeric learning rates are these tensors and, if asked, Adam is marked as capturable.

    Adam's fused form may be captured as well, but PyTorch checks only ``capturable``.
    """
    before = [dict(group) for group in groups]
    tensors = iter(rates)
    try:
        for group in groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = next(tensors)
            if capturable and "capturable" in group:
                group["capturable"] = True
        yield
    finally:
        for group, was in zip(groups, before, strict=True):
            group.update({name: was[name] for name in ("lr", "capturable") if name in was})


def _numeric_rates(optimizer: Optimizer) -> list[float]:
    """The learning rates of all groups, without those that are tensors."""
    return [group["lr"] for group in optimizer.param_groups if not isinstance(group["lr"], Tensor)]


def renew(rates: list[Tensor], values: list[float], optimizer: Optimizer) -> None:
    """Write numeric learning rates that have changed into ``rates``, the tensors that a graph reads.

    values: the learning rates written last, which this updates.
    """
    for i, number in enumerate(_numeric_rates(optimizer) if rates else []):
        if number != values[i]:
            rates[i].fill_(number)
            values[i] = number


class Graphs:
    """The graphs of one model, loss and optimizer."""

    def __init__(self, model: torch.nn.Module, loss_fn: Any, optimizer: Optimizer) -> None:
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.failure: str | None = None
        self.graphs: dict[Any, Graph] = {}
        self.seen: dict[Any, int] = {}
        self.stream: torch.cuda.Stream | None = None

    def __call__(self, x: Tensor, y: Tensor, forward_backward: ForwardBackward, update: Update) -> Tensor:
        """Do a step on this batch and return its loss.

        The two callables are methods of the caller. Keeping them here would make a reference cycle.
        """
        key = x.shape, x.dtype, x.device, y.shape, y.dtype
        graph = self.graphs.get(key)
        if graph is not None and not graph.is_current():
            del self.graphs[key], self.seen[key]
            graph = None
        if graph is None:
            self.seen[key] = self.seen.get(key, 0) + 1
            if self.seen[key] < _WARM_UP or len(self.graphs) >= _MOST:
                return self._on_side_stream(self._without_graph, x, y, forward_backward, update)
            graph = Graph(self, x, y)
            loss = self._on_side_stream(graph.rehearse, x, y, forward_backward, update)
            self.graphs[key] = graph
            if not graph.is_current():
                self._give_up("Forward or backward changes attributes of the model, unlike a replay.")
            return loss
        if graph.graph is None:
            try:
                graph.capture(self._stream(x.device), forward_backward, update)
            except cuda_graph.CaptureFailed as failure:
                self._give_up(f"Capturing it raised {failure}.")
        if self.failure is not None:
            del graph  # here, outside of the except block, this frees its memory
            return self._on_side_stream(self._without_graph, x, y, forward_backward, update)
        with torch.cuda.device(x.device):
            return graph(x, y, update)

    def _give_up(self, reason: str) -> None:
        """Run the step without a graph from now on, and warn."""
        self.failure = reason
        self.graphs.clear()
        warn(f"The training step runs without a CUDA graph from now on. {reason}")

    def _without_graph(
        self, x: Tensor, y: Tensor, forward_backward: ForwardBackward, update: Update
    ) -> Tensor:
        self.optimizer.zero_grad()
        loss = forward_backward(x, y)
        update()
        return loss

    def _on_side_stream(
        self, step: Callable[..., Tensor], x: Tensor, y: Tensor, *parts: Callable[..., Any]
    ) -> Tensor:
        """Do a step on the stream of the captures, because autograd's nodes remember their stream."""
        with torch.cuda.device(x.device):
            with cuda_graph.beside(self._stream(x.device), x, y):
                loss = step(x, y, *parts)
            loss.record_stream(torch.cuda.current_stream())
        return loss

    def _stream(self, device: torch.device) -> "torch.cuda.Stream":
        if self.stream is None or self.stream.device != device:
            self.stream = torch.cuda.Stream(device)
        return self.stream


def _modules(model: torch.nn.Module, loss_fn: Any) -> Iterator[torch.nn.Module]:
    yield from model.modules()
    if isinstance(loss_fn, torch.nn.Module):
        yield from loss_fn.modules()


def _value(it: Any) -> Any:
    """``it`` if it cannot change in place; for a tensor its id, memory and layout; otherwise its id."""
    if it is None or isinstance(it, (bool, int, float, str, torch.dtype, torch.device)):
        return it
    if isinstance(it, (tuple, list)):
        return tuple(map(_value, it))
    if isinstance(it, Tensor):
        return id(it), it.data_ptr(), it.shape, it.stride(), it.dtype, it.requires_grad
    return id(it)


def _settings() -> tuple[Any, ...]:
    """The settings of PyTorch and of this package that decide which kernels run."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        backend_choice.chosen.backend,
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        cuda.matmul.fp32_precision,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )
