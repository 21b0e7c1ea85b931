"""The ordinary step in CUDA graphs: one for each shape of a batch, captured after a few steps as they are.

The steps before a capture are the user's own, on a side stream, so nothing has to be saved and put back; a
capture itself runs no kernel. The last of those steps, the rehearsal, computes exactly what is captured next,
in the same memory: what a library chooses, compiles or allocates in its first call has been done by then.
Forward and backward are captured, and the optimizer's step too where it is made for that (``fused=True`` or
``capturable=True``); else that runs after each replay, as itself.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook

from fusedmlp.dispatch import backend_choice
from fusedmlp.torch_tools import cuda_graph
from fusedmlp.torch_tools.patched import why_step_patched
from fusedmlp.torch_tools.warn import warn
from fusedmlp.train.recipe import NODE_IS_HELD, has_node, why_update_unknown

_WARM_UP = 3  # steps of a shape before it is captured, of which the last is the rehearsal
_MOST = 16  # graphs, each with memory of its own

ForwardBackward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # a batch to its loss, .grad filled
Update = Callable[[], None]  # by what is in .grad


def why_not(
    model: torch.nn.Module, loss_fn: Any, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> str | None:
    """None if a step with this batch can be replayed without anybody missing anything, else the reason."""
    if type(x) is not torch.Tensor or type(y) is not torch.Tensor or y.device != x.device:
        return "x and y are not plain tensors on one device"
    if x.requires_grad or y.requires_grad:
        return "x or y requires grad"
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a graph is being captured"
    if (reason := cuda_graph.why_not_capture() or why_step_patched()) is not None:
        return reason
    if _has_any_global_hook():
        return "a global hook of modules is registered"
    for module in _modules(model, loss_fn):
        if (wrapper := _parallel_wrapper(module)) is not None:
            return f"the model is parallel by {wrapper}, whose communication no replay would repeat"
        own = module.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
        ):
            return f"a {type(module).__name__} has a hook"
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for parameter in model.parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return "a parameter has a hook"
        if parameter.requires_grad and parameter.is_leaf and has_node(parameter):
            return NODE_IS_HELD
        if parameter.requires_grad and id(parameter) not in updated:
            return "a parameter of the model is not in the optimizer"
        if parameter.device != x.device:
            return "a parameter is on another device than x"
    return None


def takes_update(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step can be captured, its learning rates being tensors."""
    return why_update_unknown(optimizer) is None and all(
        group.get("fused") or group.get("capturable") for group in optimizer.param_groups
    )


def written_by(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Parameters with a gradient, and their state: what the optimizer's step writes to."""
    found: list[torch.Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                state = optimizer.state.get(parameter, {}).values()
                found += [
                    t for t in (parameter, *state) if isinstance(t, torch.Tensor) and not t.is_inference()
                ]
    return found


def fingerprint(
    model: torch.nn.Module, loss_fn: Any, optimizer: torch.optim.Optimizer, with_update: bool
) -> tuple[Any, ...]:
    """All that a graph has in it besides the values in memory: where it is another, the graph is wrong.

    Learning rates that are numbers are not in it; :func:`renew` brings those to the graph.
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
    """A step to be captured: rehearsed once, then captured, then replayed for batches of the same shapes."""

    def __init__(self, steps: "Graphs", x: torch.Tensor, y: torch.Tensor) -> None:
        self.model, self.loss_fn, self.optimizer = steps.model, steps.loss_fn, steps.optimizer
        self.with_update = takes_update(self.optimizer)
        self.fingerprint = fingerprint(self.model, self.loss_fn, self.optimizer, self.with_update)
        # What the fingerprint names by its id has to stay.
        self.kept = [vars(module).copy() for module in _modules(self.model, self.loss_fn)]
        self.x, self.y = torch.empty_like(x), torch.empty_like(y)
        groups = self.optimizer.param_groups
        numbers = [group["lr"] for group in groups if not isinstance(group["lr"], torch.Tensor)]
        self.values: list[float] = numbers if self.with_update else []
        self.rates = [torch.full((), lr, dtype=torch.float32, device=x.device) for lr in self.values]
        self.graph: torch.cuda.CUDAGraph | None = None

    def rehearse(
        self, x: torch.Tensor, y: torch.Tensor, forward_backward: ForwardBackward, update: Update
    ) -> torch.Tensor:
        """A step on this batch as it will be captured, but run: its loss."""
        self.x.copy_(x)
        self.y.copy_(y)
        self.optimizer.zero_grad()
        loss = self._step(forward_backward, update, capturable=False)
        if not self.with_update:
            update()
        return loss

    def capture(self, stream: "torch.cuda.Stream", forward_backward: ForwardBackward, update: Update) -> None:
        """Raises CaptureFailed with the reason; then no parameter has a gradient, all else is as it was."""
        self.optimizer.zero_grad(set_to_none=True)  # so that the gradients come to lie in the graph's memory
        known = [(tensor, tensor._version) for tensor in self._tensors()]
        try:
            self.graph, self.loss = cuda_graph.capture(
                lambda: self._step(forward_backward, update, capturable=True), self.x.device, stream
            )
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)  # those that backward has reached lie in no memory now
            raise
        self.grads = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        # What a replay writes to. A fused optimizer does not count what it writes, in a capture either.
        self.written = [tensor for tensor, version in known if tensor._version != version]
        self.written += [grad for _, grad in self.grads if not grad.is_inference()]
        if self.with_update:
            self.written += written_by(self.optimizer)

    def _tensors(self) -> Iterator[torch.Tensor]:
        """Those of model and loss that have a version."""
        for module in _modules(self.model, self.loss_fn):
            for it in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
                if isinstance(it, torch.Tensor) and not it.is_inference():
                    yield it

    def _step(self, forward_backward: ForwardBackward, update: Update, capturable: bool) -> torch.Tensor:
        """What is captured, on the batch in the graph's memory."""
        loss = forward_backward(self.x, self.y)
        if self.with_update:
            with _by_tensors(self.optimizer.param_groups, self.rates, capturable):
                update()
        return loss

    def is_current(self) -> bool:
        return self.with_update == takes_update(self.optimizer) and self.fingerprint == fingerprint(
            self.model, self.loss_fn, self.optimizer, self.with_update
        )

    def __call__(self, x: torch.Tensor, y: torch.Tensor, update: Update) -> torch.Tensor:
        assert self.graph is not None
        renew(self.rates, self.values, self.optimizer)
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        torch.autograd.graph.increment_version(self.written)
        for parameter, grad in self.grads:  # somebody may have set others, or None
            parameter.grad = grad
        if not self.with_update:
            update()
        elif "step" in vars(self.optimizer):  # a scheduler asks whether the optimizer has stepped
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
        return self.loss.clone()


@contextlib.contextmanager
def _by_tensors(groups: list[dict[str, Any]], rates: list[torch.Tensor], capturable: bool) -> Iterator[None]:
    """Learning rates that are numbers are these tensors; and if asked, Adam says that it may be captured.

    Its fused form may be, but only ``capturable=True`` is believed.
    """
    before = [dict(group) for group in groups]
    tensors = iter(rates)
    try:
        for group in groups:
            if not isinstance(group["lr"], torch.Tensor):
                group["lr"] = next(tensors)
            if capturable and "capturable" in group:
                group["capturable"] = True
        yield
    finally:
        for group, was in zip(groups, before, strict=True):
            group.update({name: was[name] for name in ("lr", "capturable") if name in was})


def renew(rates: list[torch.Tensor], values: list[float], optimizer: torch.optim.Optimizer) -> None:
    """Write the groups' learning rates, where they are numbers, into the tensors that a graph reads.

    values: what was written last, which is changed with it.
    """
    if not rates:
        return
    numbers = [group["lr"] for group in optimizer.param_groups if not isinstance(group["lr"], torch.Tensor)]
    for i, number in enumerate(numbers):
        if number != values[i]:
            rates[i].fill_(number)
            values[i] = number


class Graphs:
    """The graphs of one model, loss and optimizer."""

    def __init__(self, model: torch.nn.Module, loss_fn: Any, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.failure: str | None = None
        self.graphs: dict[Any, Graph] = {}
        self.seen: dict[Any, int] = {}
        self.stream: torch.cuda.Stream | None = None

    def __call__(
        self, x: torch.Tensor, y: torch.Tensor, forward_backward: ForwardBackward, update: Update
    ) -> torch.Tensor:
        """A step. What it consists of is given each time: kept, it would lead from its owner back to that."""
        key = x.shape, x.dtype, x.device, y.shape, y.dtype
        graph = self.graphs.get(key)
        if graph is not None and not graph.is_current():
            del self.graphs[key], self.seen[key]
            graph = None
        if graph is None:
            self.seen[key] = self.seen.get(key, 0) + 1
            if self.seen[key] < _WARM_UP or len(self.graphs) >= _MOST:
                return self._aside(self._as_it_is, x, y, forward_backward, update)
            graph = Graph(self, x, y)
            loss = self._aside(graph.rehearse, x, y, forward_backward, update)
            self.graphs[key] = graph
            if not graph.is_current():
                self._give_up("forward or backward changes attributes of the model, which no replay would do")
            return loss
        if graph.graph is None:
            try:
                graph.capture(self._stream(x.device), forward_backward, update)
            except cuda_graph.CaptureFailed as failure:
                self._give_up(f"capturing it raised {failure}")
        if self.failure is not None:
            # Outside of the except block, and without the graph, whose memory is free for this.
            del graph
            return self._aside(self._as_it_is, x, y, forward_backward, update)
        with torch.cuda.device(x.device):
            return graph(x, y, update)

    def _give_up(self, reason: str) -> None:
        """From now on the step runs without a graph."""
        self.failure = reason
        self.graphs.clear()
        warn(f"the step runs eagerly: {reason}")

    def _as_it_is(
        self, x: torch.Tensor, y: torch.Tensor, forward_backward: ForwardBackward, update: Update
    ) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = forward_backward(x, y)
        update()
        return loss

    def _aside(
        self,
        step: Callable[[torch.Tensor, torch.Tensor, ForwardBackward, Update], torch.Tensor],
        x: torch.Tensor,
        y: torch.Tensor,
        forward_backward: ForwardBackward,
        update: Update,
    ) -> torch.Tensor:
        """On the stream of the captures, as nodes of autograd remember the stream."""
        with torch.cuda.device(x.device):
            with cuda_graph.beside(self._stream(x.device), x, y):
                loss = step(x, y, forward_backward, update)
            loss.record_stream(torch.cuda.current_stream())
        return loss

    def _stream(self, device: torch.device) -> "torch.cuda.Stream":
        if self.stream is None or self.stream.device != device:
            self.stream = torch.cuda.Stream(device)
        return self.stream


def _parallel_wrapper(module: torch.nn.Module) -> str | None:
    """What makes the module work together with others, as DistributedDataParallel does; None if nothing."""
    for kind in type(module).__mro__:
        if kind.__name__ in _PARALLEL and kind.__module__.startswith("torch."):
            return kind.__name__
    return None


# By name: to import some of them takes a second, and what was never imported wraps nothing.
_PARALLEL = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def _modules(model: torch.nn.Module, loss_fn: Any) -> Iterator[torch.nn.Module]:
    yield from model.modules()
    if isinstance(loss_fn, torch.nn.Module):
        yield from loss_fn.modules()


def _value(it: Any) -> Any:
    """By its value where that cannot change in place, of a tensor its place, else who it is."""
    if it is None or isinstance(it, (bool, int, float, str, torch.dtype, torch.device)):
        return it
    if isinstance(it, (tuple, list)):
        return tuple(map(_value, it))
    if isinstance(it, torch.Tensor):
        return id(it), it.data_ptr(), it.shape, it.stride(), it.dtype, it.requires_grad
    return id(it)


def _settings() -> tuple[Any, ...]:
    """Of PyTorch and of this package: what decides which kernels run."""
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
