"""``TrainStep``: forward, loss, backward and update as one call, on the fastest route that is right."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from fusedmlp.dispatch import backend_choice
from fusedmlp.torch_tools.warn import warn
from fusedmlp.train import arguments, cpu_step, graph_step, two_launches
from fusedmlp.train.recipe import NO_STATE, Recipe, memory_of, recipe_of, why_watched

LossFunction = Callable[[Any, torch.Tensor], torch.Tensor]

_DIRECT = "Direct: forward, loss, backward and update in ATen calls, without autograd."
_ORDINARY = "Ordinary: zero_grad, forward, loss, backward, step."


class TrainStep:
    """One step of training: ``zero_grad``, ``model(x)``, ``loss_fn``, ``backward`` and ``optimizer.step``.

    Any model, loss and torch optimizer; what is known well enough takes a faster route, with the same
    results and the same state of model and optimizer. :meth:`explain` says which, and why not another. An
    optimizer that computes the loss several times a step, as LBFGS does, is given a closure for it, and the
    first of its losses is returned.

    loss_fn: called as ``loss_fn(model(x), y)``, a scalar; x and y are tensors, or what model and loss take.
    clip_grad_norm: the largest norm of all gradients together, as of ``torch.nn.utils.clip_grad_norm_``.
    accumulate: the optimizer steps at every n-th call, with the mean of the gradients. scaler: a
    ``torch.amp.GradScaler``. compute_dtype: ``torch.bfloat16`` computes the products in bfloat16, as under
    ``torch.autocast``; parameters stay float32; on a CPU without units for it, float32 and a warning, and
    for few rows float32 where that is faster, as :meth:`explain` says.

    Everything is read anew at each call: learning rates that a scheduler sets, values that are loaded, layers
    that are frozen. On a GPU the step is replayed from a CUDA graph, so Python code in the model runs only
    in the first steps of a shape and whenever an attribute, a parameter or a setting has changed.

    What is done to one tensor may show in another, or be seen by a hook: where parameters, the optimizer's
    state, x or y share memory, where somebody holds a parameter's AccumulateGrad node, and where one of
    PyTorch's own functions was replaced for all, the step is the ordinary one, and :meth:`explain` says so.

    A label that is no class is an IndexError. A step in two launches on a GPU does not wait for that: it and
    the steps after it change nothing and return NaN, and one of the next calls raises, with the step's number
    among the calls so far, from 0; :meth:`epoch` raises at its end.

    Do not rely on the ``.grad`` of parameters after a step: some routes leave None there, as
    ``zero_grad`` does. The loss is not looked at, which would wait for a GPU: a step whose loss is NaN
    returns NaN. :meth:`epoch` warns and names the step.

    >>> step = TrainStep(model, torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    >>> loss = step(x, y)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss_fn: LossFunction,
        optimizer: torch.optim.Optimizer,
        *,
        clip_grad_norm: float | None = None,
        accumulate: int = 1,
        scaler: torch.amp.GradScaler | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        arguments.check_step(model, loss_fn, optimizer)
        accumulate = arguments.count("accumulate", accumulate)
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm is a norm above 0, or None, got {clip_grad_norm!r}")
        if compute_dtype not in (None, torch.bfloat16):
            raise ValueError(f"compute_dtype is torch.bfloat16 or None, got {compute_dtype!r}")
        self._by_closure = arguments.needs_closure(optimizer)
        if self._by_closure and (scaler is not None or accumulate > 1):
            what = "accumulate" if accumulate > 1 else "a GradScaler"
            raise ValueError(
                f"{type(optimizer).__name__} computes the loss several times a step, "
                f"which cannot go with {what}"
            )
        self._model, self._loss_fn, self._optimizer = model, loss_fn, optimizer
        self._clip_grad_norm, self._accumulate = clip_grad_norm, accumulate
        self._scaler, self._asked_dtype = scaler, compute_dtype
        self._graphs = graph_step.Graphs(model, loss_fn, optimizer)
        self._two_launches = two_launches.TwoLaunches()
        self._warned = False
        self._calls = 0
        self._accumulated = 0  # calls whose gradients wait in .grad

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The loss of this batch, detached, after which the model is trained by it."""
        number, self._calls = self._calls, self._calls + 1
        recipe = self._recipe_for_two_launches(x, y)
        if not isinstance(recipe, str):
            loss = self._two_launches.step(recipe, x, y, self._asked_dtype, number)
            if loss is not None:
                self._tell_scheduler()
                return loss
        self._two_launches.settle()
        if _is_on(x, "cuda") and self._why_not_graph(x, y) is None:
            return self._graphs(x, y, self._forward_backward, self._update)
        recipe = self._recipe_for_direct(x, y)
        if isinstance(recipe, str):
            return self._ordinary(x, y)
        compute_dtype = self._compute_dtype(x)
        if compute_dtype is not None and cpu_step.why_too_few_for_bfloat16(x) is not None:
            compute_dtype = None
        first = self._accumulated == 0
        last = self._accumulated + 1 == self._accumulate
        loss = cpu_step.run(
            recipe,
            x,
            y,
            first=first,
            last=last,
            accumulate=self._accumulate,
            clip_grad_norm=self._clip_grad_norm,
            compute_dtype=compute_dtype,
        )
        self._accumulated = 0 if last else self._accumulated + 1
        if last:
            self._tell_scheduler()
        return loss

    def _tell_scheduler(self) -> None:
        """It asks whether the optimizer has stepped."""
        if "step" in vars(self._optimizer):
            self._optimizer._opt_called = True  # type: ignore[attr-defined]

    def explain(self, x: torch.Tensor, y: torch.Tensor) -> str:
        """Which route a step with this batch takes, and why no faster one: sentences. Nothing is run."""
        recipe = self._recipe_for_two_launches(x, y)
        if not isinstance(recipe, str):
            parts = ["Two launches: all rows forward and backward, then all weights with their update."]
            if (reason := self._two_launches.why_no_replay()) is not None:
                parts.append(f"An epoch goes launch by launch, not as a CUDA graph: {reason}.")
        else:
            on_cuda = _is_on(x, "cuda")
            parts = self._explained_on_cuda(x, y) if on_cuda else self._explained_on_cpu(x, y)
            if on_cuda or backend_choice.forced():
                parts.append(f"Not in two launches: {recipe}.")
                if recipe is NO_STATE:
                    parts.append("In two launches from the next step on.")
        if self._asked_dtype is not None:
            reason = self._why_not_compute_dtype(x) if isinstance(recipe, str) else None
            if reason is None and parts[0] is _DIRECT:
                reason = cpu_step.why_too_few_for_bfloat16(x)
            parts.append("Products in bfloat16." if reason is None else f"Not in bfloat16: {reason}.")
        return "\n".join(parts)

    def _explained_on_cpu(self, x: torch.Tensor, y: torch.Tensor) -> list[str]:
        recipe = self._recipe_for_direct(x, y)
        if not isinstance(recipe, str):
            parts = [_DIRECT]
            if cpu_step.by_onednn(x, self._asked_dtype):
                parts.append("Large products are oneDNN's, which takes half of MKL's time on this CPU.")
            return parts
        parts = [_ORDINARY, f"Not direct: {recipe}."]
        return [*parts, "Direct from the next step on."] if recipe is NO_STATE else parts

    def _explained_on_cuda(self, x: torch.Tensor, y: torch.Tensor) -> list[str]:
        reason = self._why_not_graph(x, y)
        if reason is not None:
            return [_ORDINARY, f"Not a CUDA graph: {reason}."]
        what = "forward, loss and backward in one replay"
        if graph_step.takes_update(self._optimizer):
            return [f"Graph: {what}, with the optimizer's step, once a few steps of this shape have run."]
        return [
            f"Graph: {what}, then the optimizer's step, once a few steps of this shape have run.",
            "With fused=True the optimizer's step is in the replay too.",
        ]

    def _why_not_graph(self, x: torch.Tensor, y: torch.Tensor) -> str | None:
        if self._scaler is not None:
            return "a GradScaler is given, which looks at its results"
        if self._accumulate > 1:
            return "gradients are accumulated"
        if self._by_closure:
            return f"{type(self._optimizer).__name__} computes the loss as often as it finds it needs"
        if self._graphs.failure is not None:
            return self._graphs.failure
        reason = why_watched(x.device.type)
        return reason or graph_step.why_not(self._model, self._loss_fn, self._optimizer, x, y)

    def _recipe_for_two_launches(
        self, x: torch.Tensor, y: torch.Tensor, rows: int | None = None
    ) -> Recipe | str:
        """What the step in two launches needs, or why not that. rows: of a batch out of x and y."""
        if not (_is_on(x, "cuda") or (backend_choice.forced() and _is_on(x, "cpu"))):
            return "x is not on a CUDA device"
        if self._scaler is not None:
            return "a GradScaler is given"
        if self._clip_grad_norm is not None or self._accumulate > 1:
            return "gradients are clipped or accumulated"
        if self._two_launches.failure is not None and not backend_choice.forced():
            return self._two_launches.failure
        if (reason := why_watched(x.device.type, forced=True)) is not None:
            return reason
        recipe = recipe_of(self._model, self._loss_fn, self._optimizer)
        if isinstance(recipe, str):
            return recipe
        return two_launches.why_not(recipe, x, y, self._asked_dtype, rows) or recipe

    def _recipe_for_direct(self, x: torch.Tensor, y: torch.Tensor) -> Recipe | str:
        """What the step without autograd needs, or why not that."""
        if not _is_on(x, "cpu"):
            return "x is not a tensor on the CPU"
        if self._scaler is not None:
            return "a GradScaler is given"
        if (reason := why_watched("cpu")) is not None:
            return reason
        recipe = recipe_of(self._model, self._loss_fn, self._optimizer)
        if isinstance(recipe, str):
            return recipe
        if self._asked_dtype is not None and recipe.weights[0].dtype is not torch.float32:
            return f"compute_dtype is given, and the model is {recipe.weights[0].dtype}"
        if self._accumulated > 0:
            grads = [p.grad for p in recipe.parameters if p.grad is not None]
            if any(grad.layout is not torch.strided or not grad.is_contiguous() for grad in grads):
                return "a gradient that waits in .grad is not contiguous"
            memory = memory_of([*recipe.written, *grads])
            if memory is None or memory.touch(x):  # y is read before anything is added to them
                return "a gradient that waits in .grad shares memory with something else"
        return cpu_step.why_not(recipe, x, y) or recipe

    def _compute_dtype(self, x: torch.Tensor) -> torch.dtype | None:
        """In which the products are computed, if not the model's."""
        if self._asked_dtype is None:
            return None
        reason = self._why_not_compute_dtype(x)
        if reason is None:
            return self._asked_dtype
        if not self._warned:
            self._warned = True
            warn(f"computed in the model's dtype: {reason}", UserWarning)
        return None

    def _why_not_compute_dtype(self, x: torch.Tensor) -> str | None:
        return cpu_step.why_not_bfloat16() if self._device_type(x) == "cpu" else None

    def _device_type(self, x: Any) -> str:
        """Of x, or of the model if x is not a tensor but many."""
        tensor = x if isinstance(x, torch.Tensor) else next(self._model.parameters(), torch.empty(0))
        return tensor.device.type

    def epoch(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
    ) -> torch.Tensor:
        """Train on all rows once, in random order; the losses of the steps, detached, in their order.

        images ``(n, ...)``: uint8, which become 0 to 1 in the model's dtype, anything else taken as it is;
        flattened to ``(batch, features)`` if the model begins with a Linear that takes so many features.
        labels ``(n, ...)``. The order is ``torch.randperm(n, generator=generator)`` on the images' device.
        Every batch lies in the same memory: a model that keeps its input finds the next batch in it. Warns
        of the first loss that is not finite, once the epoch is over.

        >>> losses = step.epoch(images, labels, batch_size=64)
        """
        batch_size = arguments.count("batch_size", batch_size)
        arguments.check_epoch(images, labels, batch_size, drop_last)
        count = len(images)
        order = torch.randperm(count, generator=generator, device=images.device)
        images = images.flatten(1) if _wants_flat(self._model, images.shape) else images
        dtype = images.dtype
        if dtype is torch.uint8:
            dtypes = (p.dtype for p in self._model.parameters() if p.is_floating_point())
            dtype = next(dtypes, torch.get_default_dtype())
        size = min(batch_size, count)
        batch = torch.empty((size, *images.shape[1:]), dtype=dtype, device=images.device)
        pixels = batch if dtype is images.dtype else torch.empty_like(batch, dtype=images.dtype)
        targets = labels.new_empty((size, *labels.shape[1:]))
        losses: list[torch.Tensor] = []
        stop = count - count % batch_size if drop_last else count
        start = 0
        while start < stop:
            if len(losses) < 2:  # the first step makes the optimizer's state, which the others count on
                recipe = self._recipe_for_two_launches(images, labels, size)
                if not isinstance(recipe, str):
                    done = self._two_launches.epoch(
                        recipe, images, labels, order[start:stop], size, self._asked_dtype, len(losses)
                    )
                    losses.append(done)
                    start += size * len(done)
                    if len(done) > 0:
                        self._tell_scheduler()
                    continue  # where a kernel has failed, with what is left
            rows = order[start : start + batch_size]
            x, y = batch[: len(rows)], targets[: len(rows)]
            with torch.no_grad():
                torch.index_select(images, 0, rows, out=pixels[: len(rows)])
                torch.index_select(labels, 0, rows, out=y)
                if pixels is not batch:
                    x.copy_(pixels[: len(rows)]).div_(255)
            losses.append(self(x, y).reshape(1))
            start += batch_size
        if not losses:
            return torch.empty(0, device=images.device)
        together = torch.cat(losses)
        _warn_of_not_finite(together)
        return together

    def _ordinary(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self._by_closure:
            return self._by_its_closure(x, y)
        if self._accumulated == 0:
            self._optimizer.zero_grad()
        loss = self._forward_backward(x, y)
        self._accumulated = (self._accumulated + 1) % self._accumulate
        if self._accumulated == 0:
            self._update()
        return loss

    def _by_its_closure(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The optimizer calls what computes loss and gradients, as often as it likes: the first loss."""
        losses: list[torch.Tensor] = []

        def closure() -> torch.Tensor:
            self._optimizer.zero_grad()
            loss = self._forward_backward(x, y)
            self._clip()
            losses.append(loss)
            return loss

        self._optimizer.step(closure)  # type: ignore[arg-type]  # typed as a float, documented as a tensor
        if not losses:
            raise RuntimeError(f"the step of {type(self._optimizer).__name__} did not compute the loss")
        return losses[0]

    def _forward_backward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with self._autocast(x):
            loss = self._loss_fn(self._model(x), y)
        scaled = loss / self._accumulate if self._accumulate > 1 else loss
        if self._scaler is not None:
            scaled = self._scaler.scale(scaled)
        scaled.backward()
        return loss.detach()

    def _autocast(self, x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
        dtype = self._compute_dtype(x)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self._device_type(x), dtype)

    def _update(self) -> None:
        """By the gradients in .grad."""
        self._clip()
        groups = self._optimizer.param_groups
        if all(p.grad is None for group in groups for p in group["params"]) and not arguments.has_some_of(
            self._optimizer, self._model, self._loss_fn
        ):
            raise RuntimeError(arguments.NOTHING_TRAINED)
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        if any(group.get("fused") for group in groups):  # which do not count what they write to
            torch.autograd.graph.increment_version(graph_step.written_by(self._optimizer))

    def _clip(self) -> None:
        if self._clip_grad_norm is not None:
            if self._scaler is not None:
                self._scaler.unscale_(self._optimizer)
            parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self._clip_grad_norm)


def _is_on(x: Any, device_type: str) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_cuda if device_type == "cuda" else x.is_cpu)


def _wants_flat(model: torch.nn.Module, shape: torch.Size) -> bool:
    first = next((module for module in model.modules() if not list(module.children())), None)
    return (
        isinstance(first, torch.nn.Linear)
        and len(shape) > 2
        and first.in_features != shape[-1]
        and first.in_features == shape[1:].numel()
    )


def _warn_of_not_finite(losses: torch.Tensor) -> None:
    finite = losses.isfinite()
    if not finite.all():
        step = int(finite.int().argmin())
        text = f"the loss is {losses[step].item()} at step {step} of this epoch, of 0 to {len(losses) - 1}"
        warn(text)
