"""An MLP's training step in two kernel launches, which update the optimizer's own state.

    refresh   the low-precision weights, if the products are not float32
    launch 1  by rows: forward, loss and backward to the gradient of each layer's output
    launch 2  by weights: the gradients of weights and biases, and the optimizer's update
    after     the optimizer's counts of steps and autograd's versions go up; ``.grad`` becomes None

An epoch does this for each batch. From the second epoch on, one CUDA graph of all its steps is replayed.
Parameters, state and hyper-parameters are read anew at every call. The CPU computes coefficients from the
hyper-parameters, in double: eight numbers for each parameter, which the kernels read.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedmlp.dispatch import backend_choice, predicate
from fusedmlp.dispatch.operators import HOW_TO_REPORT
from fusedmlp.torch_tools import cuda_graph
from fusedmlp.torch_tools.warn import warn
from fusedmlp.train import wrong_labels
from fusedmlp.train.recipe import SHARES_MEMORY, Recipe, why_batch_unknown


def why_not(
    recipe: Recipe, x: Tensor, y: Tensor, dtype: torch.dtype | None, rows: int | None = None
) -> str | None:
    """Why a step on x and y cannot run in two launches, or None if it can.

    dtype: of the products; None means the model's. rows: of a batch, if x and y are the data of an epoch;
    then x may be uint8, which stands for 0 to 1.
    """
    if (reason := predicate.why_no_kernels(x)) is not None:
        return reason
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return "A CUDA graph is being captured; its replays would not read the hyper-parameters anew."
    weight = recipe.weights[0]
    if type(y) is not Tensor or y.device != x.device or weight.device != x.device:
        return "The batch and the model are not plain tensors on one device."
    if weight.dtype is not torch.float32:
        return f"The parameters are {weight.dtype}, and the two-launch step keeps them in float32."
    if x.dtype is not torch.float32 and (rows is None or x.dtype is not torch.uint8):
        return f"The input x is {x.dtype}, and the two-launch step reads float32."
    if (reason := why_batch_unknown(recipe, x, y)) is not None:
        return reason
    if any(bias is None for bias in recipe.biases):
        return "A layer has no bias."
    if y.is_neg():
        return "The target y is a lazy negative."
    if recipe.memory.touch(x) or recipe.memory.touch(y):
        return SHARES_MEMORY
    moved = recipe.written[: len(recipe.written) - len(recipe.counts)]  # parameters and moments
    if any(tensor.data_ptr() % 16 for tensor in moved):
        return "A parameter or its state does not begin at a multiple of 16 bytes."
    rows = len(x) if rows is None else rows
    return _why_not_update(recipe) or _kernels().why_no_step(_widths_of(recipe), rows, dtype or weight.dtype)


def _why_not_update(recipe: Recipe) -> str | None:
    groups = recipe.groups
    if any(isinstance(group[name], Tensor) for group in groups for name in ("lr", "weight_decay")):
        return "A learning rate or weight decay is a tensor."
    if recipe.update == "sgd":
        if len({(group["momentum"] != 0, group["nesterov"]) for group in groups}) > 1:
            return "Groups of parameters differ in whether they have momentum, or Nesterov's."
    elif any(not count.is_cpu for count in recipe.counts):
        return "The optimizer counts its steps on the GPU, as with fused=True; reading the count would wait."
    elif any(isinstance(beta, Tensor) for group in groups for beta in group["betas"]):
        return "A beta is a tensor."
    return None


class TwoLaunches:
    """The memory that the steps of one TrainStep share, and the CUDA graph of its last epoch."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype or torch.float32  # of the products
        self.failure: str | None = None  # the error of a kernel, after which no step goes in two launches
        self._made: Any = None  # widths and device of the workspace
        self._workspace: Any = None
        self._order = self._losses = torch.empty(0)
        # For each number of steps: coefficients on the device, and those on the CPU that were copied there.
        self._coefficients: dict[int, tuple[Tensor, Tensor]] = {}
        self._ran: Any = None  # what the last epoch that was launched had compiled; the same may be captured
        self._captured: tuple[Any, torch.cuda.CUDAGraph] | None = None  # an epoch's key and its graph
        self._no_graph: str | None = None  # why a capture failed, if one has
        self._labels = wrong_labels.Labels()

    def why_no_replay(self) -> str | None:
        """Why an epoch must not become a CUDA graph, or None."""
        return self._no_graph or cuda_graph.why_not_capture()

    def step(self, recipe: Recipe, x: Tensor, y: Tensor, number: int) -> Tensor | None:
        """Do one step and return its mean loss, or None if a kernel failed.

        After a failure nothing has changed, and no later step goes in two launches. number: of the step, for
        an error. IndexError if a label is no class: on a GPU one of the next calls raises it, and until then
        steps change nothing and their losses are NaN.
        """
        self.settle(wait=False)
        rows, losses = x.shape[0], torch.empty(1, device=x.device)
        job = self._job(recipe, x, None, y, losses, rows)
        _kernels().refresh_low_precision(job.parameters)
        try:
            _kernels().train_step(job, 0, rows, 0, number=number)
        except predicate.kernels().KernelFailed as failure:
            self._close(failure)
            return None
        _advance(recipe, 1)
        if recipe.loss == "cross_entropy":
            self._labels.wait_for(number, recipe.counts)
            if not x.is_cuda:
                self.settle()
        return losses[0]

    def settle(self, wait: bool = True) -> None:
        """Raise IndexError if a step so far met a label that is no class.

        This is called before another route trains on. Without wait, it raises only if the error is known
        already.
        """
        if self._made is not None:
            self._labels.look(self._workspace.wrong, self._made[0][-1], wait)

    def epoch(
        self, recipe: Recipe, images: Tensor, labels: Tensor, order: Tensor, batch_size: int, before: int
    ) -> Tensor:
        """Do a step for each ``batch_size`` of the rows ``order``, the last for the rest; return all losses.

        On a GPU the first epoch goes launch by launch. The second is captured in a CUDA graph, which is
        replayed as long as it reads and writes the same memory in the same way. The kernels for both lengths
        of batch are built before the first step. If a kernel fails all the same, the steps before it are
        done, and their losses are returned. IndexError if a label is no class: the steps before it are done.
        before: the number of steps of this epoch that went another way, for that error.
        """
        self.settle()
        lengths = [min(batch_size, len(order) - first) for first in range(0, len(order), batch_size)]
        if self._order.shape != order.shape or self._order.device != order.device:
            self._order, self._losses = torch.empty_like(order), torch.empty(len(order), device=order.device)
        self._order.copy_(order)
        losses = self._losses[: len(lengths)]
        job = self._job(recipe, images, self._order, labels, losses, batch_size)
        compiled = (_identity(job), batch_size, lengths[-1])
        memory = (job.coefficients, self._order, losses)
        key = (compiled, len(order), *(tensor.data_ptr() for tensor in memory))
        done = 0

        def launch_all() -> None:
            nonlocal done
            _kernels().refresh_low_precision(job.parameters)
            for done, rows in enumerate(lengths):
                _kernels().train_step(job, done * batch_size, rows, done)
            done = len(lengths)

        replay = images.is_cuda and compiled == self._ran and self.why_no_replay() is None
        if replay and (self._captured is None or self._captured[0] != key):
            self._captured = None  # frees the old graph's memory for the new one
            graph = self._capture(launch_all, images.device)
            self._captured = None if graph is None else (key, graph)
        if replay and self._captured is not None:
            with torch.cuda.device(images.device):
                self._captured[1].replay()
            done = len(lengths)
        else:
            done = 0
            try:
                for rows in {lengths[0], lengths[-1]}:
                    _kernels().build_step(job, rows)
                launch_all()
                self._ran = compiled
            except predicate.kernels().KernelFailed as failure:
                self._end(recipe, done, before)
                self._close(failure)
                return losses[:done].clone()
        self._end(recipe, done, before)
        return losses.clone()

    def _end(self, recipe: Recipe, done: int, before: int) -> None:
        """Count the ``done`` steps of an epoch. At a label that is no class, count those before and raise."""
        record = self._workspace.wrong
        wrong = wrong_labels.wrong_label(record) if recipe.loss == "cross_entropy" and done > 0 else None
        _advance(recipe, done if wrong is None else wrong[0])
        if wrong is not None:
            wrong_labels.forget(record)
            step = f"step {before + wrong[0]} of this epoch"
            raise IndexError(wrong_labels.no_class(wrong[1], self._made[0][-1], step))

    def _close(self, failure: Exception) -> None:
        """Do no later step in two launches; under ``backend("triton")`` raise the failure instead."""
        if backend_choice.forced():
            raise failure
        self.failure = str(failure)
        self._captured = None
        warn(f"Training goes on without the two-launch step: {failure}. {HOW_TO_REPORT}")

    def _capture(self, run: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph | None:
        """A CUDA graph of what ``run`` launches, or None with a warning if that failed."""
        try:
            return cuda_graph.capture(run, device)[0]
        except cuda_graph.CaptureFailed as failure:
            self._no_graph = f"Capturing it raised {failure}."
            warn(f"An epoch goes launch by launch, not as a CUDA graph. {self._no_graph}")
            return None

    def _job(
        self, recipe: Recipe, x: Tensor, order: Tensor | None, y: Tensor, losses: Tensor, rows: int
    ) -> Any:
        """The job of the kernels: a step of at most ``rows`` rows for each element of ``losses``."""
        kernels, device, widths, steps = _kernels(), x.device, _widths_of(recipe), len(losses)
        if self._made != (widths, device) or self._workspace.rows < rows:
            self.settle()  # before the record of wrong labels goes with the workspace
            self._workspace = kernels.workspace_for(widths, rows, self._dtype, device)
            self._made, self._ran, self._captured = (widths, device), None, None
            self._coefficients.clear()
        numbers = _coefficients_of(recipe, steps)
        there, sent = self._coefficients.get(steps) or (torch.empty_like(numbers, device=device), None)
        if sent is None or not torch.equal(sent, numbers):
            # From pinned memory that is not written to again, so the copy need not be waited for.
            there.copy_(numbers.pin_memory() if x.is_cuda else numbers, non_blocking=True)
            self._coefficients[steps] = there, numbers
        nesterov = bool(recipe.groups[0].get("nesterov", False))
        network = kernels.Network(widths, recipe.loss, recipe.update, nesterov)
        scale = 1.0 if x.is_floating_point() else 1 / 255
        # The second launch also updates the parameters and Adam's moments, in place: see update in
        # kernels/train_step/optimizers.py.
        parameters = _parameters_of(recipe, self._workspace.low_precision)
        x, y = x.detach().flatten(1).contiguous(), y.detach().contiguous()
        return kernels.Job(x, order, y, parameters, network, there, losses, self._workspace, scale)


def _identity(job: Any) -> tuple[Any, ...]:
    """All that a replay depends on: the caller's memory and compile-time constants."""
    tensors = [job.x, job.target, *(t for group in job.parameters for t in group)]
    addresses = tuple(None if t is None else (t.data_ptr(), t.shape, t.dtype) for t in tensors)
    return addresses, job.network, predicate.kernels().arithmetic(torch.float32)


def _kernels() -> Any:
    return predicate.kernels().step


def _widths_of(recipe: Recipe) -> tuple[int, ...]:
    return (recipe.weights[0].shape[1], *(weight.shape[0] for weight in recipe.weights))


def _parameters_of(recipe: Recipe, low_precision: tuple[Tensor | None, ...]) -> Any:
    """The parameters and their moments in the optimizer, as the kernels take them; each layer has a bias."""
    name = "momentum_buffer" if recipe.update == "sgd" else "exp_avg"
    moments = [state.get(name) for state in recipe.states]  # without momentum, the recipe has no state
    squares = [state.get("exp_avg_sq") for state in recipe.states]
    # Detached, so that autograd does not see the kernels' launches.
    weights = tuple(weight.detach() for weight in recipe.weights)
    biases = tuple(bias.detach() for bias in recipe.biases if bias is not None)
    pairs = (tuple(part) for part in (moments[::2], moments[1::2], squares[::2], squares[1::2]))
    return _kernels().Parameters(weights, biases, low_precision, *pairs)


def _coefficients_of(recipe: Recipe, steps: int) -> Tensor:
    """``(steps, parameters, 8)`` float32 on the CPU: the coefficients of each update."""
    kernels = predicate.kernels().optimizers
    known: dict[Any, Tensor] = {}  # (steps, 8) for each group and count of steps
    tables = []
    for i, group in enumerate(recipe.groups):
        done = recipe.counts[i].item() if recipe.counts else 0.0
        key = (id(group), done)
        if key not in known:
            lr, decay = group["lr"], group["weight_decay"]
            if recipe.update == "sgd":
                row = kernels.sgd_coefficients(lr, group["momentum"], group["dampening"], decay)
            else:
                step = done + 1.0 if steps == 1 else torch.arange(1, steps + 1, dtype=torch.float64) + done
                decoupled = recipe.update == "adamw"
                row = kernels.adam_coefficients(lr, group["betas"], group["eps"], decay, decoupled, step)
            if steps == 1:  # faster than the general way
                known[key] = torch.tensor([row], dtype=torch.float32)
            else:
                columns = [torch.as_tensor(number, dtype=torch.float64).expand(steps) for number in row]
                known[key] = torch.stack(columns, dim=1).float()
        tables.append(known[key])
    return torch.stack(tables, dim=1)


def _advance(recipe: Recipe, steps: int) -> None:
    """Clear ``.grad``, and raise the optimizer's counts and autograd's versions, after ``steps`` steps."""
    if steps == 0:
        return
    for parameter in recipe.parameters:
        parameter.grad = None
    torch.autograd.graph.increment_version(recipe.written)
    if recipe.counts:
        torch._foreach_add_(recipe.counts, float(steps))
