"""``TrainStep``: forward, loss, backward and update as one call, by the fastest route with equal results."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedmlp.dispatch import backend_choice
from fusedmlp.torch_tools.warn import warn
from fusedmlp.train import arguments, cpu_step, graph_step, two_launches
from fusedmlp.train.recipe import NO_STATE, Recipe, recipe_of, why_watched

LossFunction = Callable[[Any, Tensor], Tensor]

# The routes of a step, named as in explain()'s reason why a route was not taken: "Not direct: ...".
_TWO_LAUNCHES, _GRAPH, _DIRECT, _ORDINARY = "in two launches", "a CUDA graph", "direct", "ordinary"
_DESCRIPTIONS = {
    _TWO_LAUNCHES: "Two launches: all rows forward and backward, then all weights with their update.",
    _GRAPH: "Graph: forward, loss and backward in one replay, once a few steps of this shape have run.",
    _DIRECT: "Direct: forward, loss, backward and update in ATen calls, without autograd.",
    _ORDINARY: "Ordinary: zero_grad, forward, loss, backward, step.",
}


class TrainStep:
    """One step of training: zero_grad, ``model(x)``, ``loss_fn``, backward, clip and ``optimizer.step``.

    It takes any model, loss and torch optimizer. Well-known ones take a faster route, with the same results
    and the same state of model and optimizer; :meth:`explain` says which route, and why no faster one.

    loss_fn: called as ``loss_fn(model(x), y)``, returns a scalar; x and y are whatever model and loss take.
    optimizer: if its step requires a closure, as that of LBFGS does, it gets one, and the first loss of the
    closure is returned. clip_grad_norm: the largest norm of all gradients together, as in
    ``torch.nn.utils.clip_grad_norm_``. accumulate: the optimizer steps at every n-th call, with the mean of
    the gradients. scaler: a ``torch.amp.GradScaler``. compute_dtype: ``torch.bfloat16`` computes the products
    in bfloat16, as under ``torch.autocast``; parameters stay float32. A CPU without units for bfloat16
    computes in float32 and warns.

    Everything is read anew at each call: learning rates, loaded values, frozen layers. On a GPU the step is
    replayed from a CUDA graph: Python code in the model runs only in the first steps of a shape, and after an
    attribute, a parameter or a setting has changed. The step is the ordinary one if parameters, state, x or y
    share memory, if a hook may be watching, or if one of PyTorch's own functions was replaced.

    A label that is no class raises IndexError. A step in two launches on a GPU does not wait to find out: it
    and the steps after it change nothing and return NaN, and one of the next calls raises, with the number of
    the wrong call, from 0; :meth:`epoch` raises at its end. A loss that is NaN is returned unchecked, because
    a check would wait for the GPU; :meth:`epoch` warns of it. After a step, ``.grad`` may be None.

    >>> step = TrainStep(model, torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    >>> loss = step(x, y)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss_fn: LossFunction,
        optimizer: Optimizer,
        *,
        clip_grad_norm: float | None = None,
        accumulate: int = 1,
        scaler: torch.amp.GradScaler | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        arguments.check_step(model, loss_fn, optimizer)
        accumulate = arguments.count("accumulate", accumulate)
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm must be a norm above 0, or None, got {clip_grad_norm!r}")
        if compute_dtype not in (None, torch.bfloat16):
            raise ValueError(f"compute_dtype must be torch.bfloat16 or None, got {compute_dtype!r}")
        self._by_closure = arguments.needs_closure(optimizer)
        if self._by_closure and (scaler is not None or accumulate > 1):
            what = "accumulate" if accumulate > 1 else "a GradScaler"
            name = type(optimizer).__name__
            raise ValueError(f"{name} computes the loss several times a step, which cannot go with {what}")
        self._model, self._loss_fn, self._optimizer = model, loss_fn, optimizer
        self._clip_grad_norm, self._accumulate = clip_grad_norm, accumulate
        self._scaler, self._asked_dtype = scaler, compute_dtype
        self._graphs = graph_step.Graphs(model, loss_fn, optimizer)
        self._two_launches = two_launches.TwoLaunches(compute_dtype)
        self._warned = False
        self._calls = 0
        self._accumulated = 0  # calls whose gradients wait in .grad

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Train the model on this batch, and return the loss before the update, a detached scalar."""
        number, self._calls = self._calls, self._calls + 1
        route, recipe, _ = self._route(x, y)
        if route is _TWO_LAUNCHES:
            loss = self._two_launches.step(recipe, x, y, number)  # type: ignore[arg-type]
            if loss is not None:
                self._tell_scheduler()
                return loss
            route, recipe, _ = self._route(x, y)  # a kernel has failed, so two launches are ruled out now
        self._two_launches.settle()
        if route is _GRAPH:
            return self._graphs(x, y, self._forward_backward, self._update)
        if recipe is None:
            return self._ordinary(x, y)
        compute_dtype = self._compute_dtype(x)
        if compute_dtype is not None and cpu_step.why_too_few_for_bfloat16(x) is not None:
            compute_dtype = None
        done, every = self._accumulated, self._accumulate
        loss = cpu_step.run(recipe, x, y, done, every, self._clip_grad_norm, compute_dtype)
        self._accumulated = (done + 1) % every
        if self._accumulated == 0:
            self._tell_scheduler()
        return loss

    def explain(self, x: Tensor, y: Tensor) -> str:
        """Say which route a step with this batch takes, and why it takes no faster one. Nothing is run.

        >>> print(step.explain(x, y))
        Direct: forward, loss, backward and update in ATen calls, without autograd.
        """
        route, _, refused = self._route(x, y)
        parts = [_DESCRIPTIONS[route]]
        if route is _TWO_LAUNCHES and (reason := self._two_launches.why_no_replay()) is not None:
            parts.append(f"An epoch goes launch by launch, not as a CUDA graph: {reason.removesuffix('.')}.")
        if route is _GRAPH:
            if graph_step.takes_update(self._optimizer):
                parts.append("The optimizer's step is in the replay.")
            else:
                parts.append("The optimizer's step runs after each replay; with fused=True it is in it.")
        if route is _DIRECT and cpu_step.by_onednn(x, self._asked_dtype):
            parts.append("Large products are oneDNN's, which takes half of MKL's time on this CPU.")
        for name, reason in reversed(refused.items()):
            # The text of an error may have no period.
            parts.append(f"Not {name}: {reason.removesuffix('.')}.")
            if reason is NO_STATE:
                parts.append(f"{name.capitalize()} from the next step on.")
        if self._asked_dtype is not None:
            reason = None if route is _TWO_LAUNCHES else self._why_not_compute_dtype(x)
            if reason is None and route is _DIRECT:
                reason = cpu_step.why_too_few_for_bfloat16(x)
            parts.append("Products in bfloat16." if reason is None else f"Not in bfloat16: {reason}")
        return "\n".join(parts)

    def _route(
        self, x: Tensor, y: Tensor, rows: int | None = None
    ) -> tuple[str, Recipe | None, dict[str, str]]:
        """The fastest route for this batch, its recipe, and the reason against each faster route.

        rows: of a batch, if x and y are the data of an epoch.
        """
        refused: dict[str, str] = {}
        on_cuda = _is_on(x, "cuda")
        if on_cuda or (backend_choice.forced() and _is_on(x, "cpu")):
            recipe = self._recipe_for_two_launches(x, y, rows)
            if not isinstance(recipe, str):
                return _TWO_LAUNCHES, recipe, refused
            refused[_TWO_LAUNCHES] = recipe
        if on_cuda:
            reason = self._why_not_graph(x, y)
            if reason is None:
                return _GRAPH, None, refused
            refused[_GRAPH] = reason
        else:
            recipe = self._recipe_for_direct(x, y)
            if not isinstance(recipe, str):
                return _DIRECT, recipe, refused
            refused[_DIRECT] = recipe
        return _ORDINARY, None, refused

    def _recipe_for_two_launches(self, x: Tensor, y: Tensor, rows: int | None) -> Recipe | str:
        if self._scaler is not None:
            return "A GradScaler is given."
        if self._clip_grad_norm is not None or self._accumulate > 1:
            return "Gradients are clipped or accumulated."
        if self._two_launches.failure is not None and not backend_choice.forced():
            return self._two_launches.failure
        watched = why_watched(x.device.type, forced=True)
        recipe = watched or recipe_of(self._model, self._loss_fn, self._optimizer)
        if isinstance(recipe, str):
            return recipe
        return two_launches.why_not(recipe, x, y, self._asked_dtype, rows) or recipe

    def _why_not_graph(self, x: Tensor, y: Tensor) -> str | None:
        if self._scaler is not None:
            return "A GradScaler is given, which looks at its results."
        if self._accumulate > 1:
            return "Gradients are accumulated."
        if self._by_closure:
            return f"The step of {type(self._optimizer).__name__} computes the loss as often as it needs."
        if self._graphs.failure is not None:
            return self._graphs.failure
        watched = why_watched(x.device.type)
        return watched or graph_step.why_not(self._model, self._loss_fn, self._optimizer, x, y)

    def _recipe_for_direct(self, x: Tensor, y: Tensor) -> Recipe | str:
        if not _is_on(x, "cpu"):
            return "The input x is not a tensor on the CPU."
        if self._scaler is not None:
            return "A GradScaler is given."
        recipe = why_watched("cpu") or recipe_of(self._model, self._loss_fn, self._optimizer)
        if isinstance(recipe, str):
            return recipe
        if self._asked_dtype is not None and recipe.weights[0].dtype is not torch.float32:
            return f"A compute_dtype is given, and the model is {recipe.weights[0].dtype}."
        return cpu_step.why_not(recipe, x, y, self._accumulated > 0) or recipe

    def _tell_scheduler(self) -> None:
        """Set the flag by which a learning rate scheduler sees that the optimizer has stepped."""
        if "step" in vars(self._optimizer):
            self._optimizer._opt_called = True  # type: ignore[attr-defined]

    def _compute_dtype(self, x: Tensor) -> torch.dtype | None:
        """The dtype of the products, or None if it is the model's."""
        if self._asked_dtype is None or (reason := self._why_not_compute_dtype(x)) is None:
            return self._asked_dtype
        if not self._warned:
            self._warned = True
            warn(f"Products are computed in the model's dtype: {reason}", UserWarning)
        return None

    def _why_not_compute_dtype(self, x: Tensor) -> str | None:
        return cpu_step.why_not_bfloat16() if self._device_type(x) == "cpu" else None

    def _device_type(self, x: Any) -> str:
        """The device type of x, or the model's if x is not a tensor."""
        tensor = x if isinstance(x, Tensor) else next(self._model.parameters(), torch.empty(0))
        return tensor.device.type

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
    ) -> Tensor:
        """Train on all rows once, in random order, and return the losses of the steps, detached.

        images ``(n, ...)``: uint8 becomes 0 to 1 in the model's dtype, other dtypes stay. Each image is
        flattened if the model begins with a Linear that takes as many features. labels ``(n, ...)``. The
        order is ``torch.randperm(n, generator=generator)`` on the images' device. All batches use the same
        memory, so a model that keeps its input finds the next batch in it. The epoch ends with a warning if a
        loss is not finite.

        >>> losses = step.epoch(images, labels, batch_size=64)
        """
        batch_size = arguments.count("batch_size", batch_size)
        arguments.check_epoch(images, labels, batch_size, drop_last)
        count = len(images)
        order = torch.randperm(count, generator=generator, device=images.device)
        if drop_last:
            order = order[: count - count % batch_size]
        images = images.flatten(1) if _wants_flat(self._model, images.shape) else images
        dtype = images.dtype
        if dtype is torch.uint8:
            dtypes = (p.dtype for p in self._model.parameters() if p.is_floating_point())
            dtype = next(dtypes, torch.get_default_dtype())
        size = min(batch_size, count)
        batch = torch.empty((size, *images.shape[1:]), dtype=dtype, device=images.device)
        pixels = batch if dtype is images.dtype else torch.empty_like(batch, dtype=images.dtype)
        targets = labels.new_empty((size, *labels.shape[1:]))

        def train_on(rows: Tensor) -> Tensor:
            x, y = batch[: len(rows)], targets[: len(rows)]
            with torch.no_grad():
                torch.index_select(images, 0, rows, out=pixels[: len(rows)])
                torch.index_select(labels, 0, rows, out=y)
                if pixels is not batch:
                    x.copy_(pixels[: len(rows)]).div_(255)
            return self(x, y).reshape(1)

        if len(order) == 0:
            return torch.empty(0, device=images.device)
        losses = self._in_two_launches(images, labels, order, size, 0)
        if sum(map(len, losses)) == 0:  # the first step makes the optimizer's state, which two launches need
            losses = [train_on(order[:size]), *self._in_two_launches(images, labels, order[size:], size, 1)]
        done = sum(map(len, losses))
        losses += [train_on(order[start : start + size]) for start in range(done * size, len(order), size)]
        together = torch.cat(losses)
        finite = together.isfinite()
        if not finite.all():
            step = int(finite.int().argmin())
            value = together[step].item()
            warn(f"The loss is {value} at step {step} of this epoch, of 0 to {len(finite) - 1}.")
        return together

    def _in_two_launches(
        self, images: Tensor, labels: Tensor, order: Tensor, size: int, before: int
    ) -> list[Tensor]:
        """Train in two launches on the rows ``order`` as far as that works, and return the losses.

        before: the number of steps of this epoch that went another way.
        """
        route, recipe, _ = self._route(images, labels, size)
        if len(order) == 0 or route is not _TWO_LAUNCHES:
            return []
        losses = self._two_launches.epoch(recipe, images, labels, order, size, before)  # type: ignore[arg-type]
        if len(losses) > 0:
            self._tell_scheduler()
        return [losses]

    def _ordinary(self, x: Tensor, y: Tensor) -> Tensor:
        if self._by_closure:
            return self._by_its_closure(x, y)
        if self._accumulated == 0:
            self._optimizer.zero_grad()
        loss = self._forward_backward(x, y)
        self._accumulated = (self._accumulated + 1) % self._accumulate
        if self._accumulated == 0:
            self._update()
        return loss

    def _by_its_closure(self, x: Tensor, y: Tensor) -> Tensor:
        """Give the optimizer a closure, which it may call several times; return the closure's first loss."""
        losses: list[Tensor] = []

        def closure() -> Tensor:
            self._optimizer.zero_grad()
            loss = self._forward_backward(x, y)
            self._clip()
            losses.append(loss)
            return loss

        self._optimizer.step(closure)  # type: ignore[arg-type]  # typed as a float, documented as a tensor
        if not losses:
            raise RuntimeError(f"the step of {type(self._optimizer).__name__} did not compute the loss")
        return losses[0]

    def _forward_backward(self, x: Tensor, y: Tensor) -> Tensor:
        dtype = self._compute_dtype(x)
        with contextlib.nullcontext() if dtype is None else torch.autocast(self._device_type(x), dtype):
            loss = self._loss_fn(self._model(x), y)
        scaled = loss / self._accumulate if self._accumulate > 1 else loss
        if self._scaler is not None:
            scaled = self._scaler.scale(scaled)
        scaled.backward()
        return loss.detach()

    def _update(self) -> None:
        """Clip the gradients in .grad and do the optimizer's step."""
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
        if any(group.get("fused") for group in groups):  # fused optimizers do not raise autograd's versions
            torch.autograd.graph.increment_version(graph_step.written_by(self._optimizer))

    def _clip(self) -> None:
        if self._clip_grad_norm is not None:
            if self._scaler is not None:
                self._scaler.unscale_(self._optimizer)
            parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self._clip_grad_norm)


def _is_on(x: Any, device_type: str) -> bool:
    return isinstance(x, Tensor) and (x.is_cuda if device_type == "cuda" else x.is_cpu)


def _wants_flat(model: torch.nn.Module, shape: torch.Size) -> bool:
    first = next((module for module in model.modules() if not list(module.children())), None)
    return (
        isinstance(first, torch.nn.Linear)
        and len(shape) > 2
        and first.in_features != shape[-1]
        and first.in_features == shape[1:].numel()
    )
