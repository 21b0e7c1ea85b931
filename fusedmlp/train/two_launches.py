"""An MLP's training step in two launches, from a recipe: the optimizer's own state, kept current.

Parameters, state and hyper-parameters are read anew at every call.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fusedmlp.dispatch import backend_choice, predicate
from fusedmlp.torch_tools import cuda_graph
from fusedmlp.torch_tools.warn import warn
from fusedmlp.train import wrong_labels
from fusedmlp.train.recipe import SHARES_MEMORY, Recipe


def why_not(
    recipe: Recipe, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype | None, rows: int | None = None
) -> str | None:
    """None if a step on x and y, or on so many ``rows`` of them, is right, else the reason.

    dtype: of the products; None is the model's. With ``rows``, x may be uint8, which stands for 0 to 1.
    """
    if (reason := predicate.why_no_kernels(x)) is not None:
        return reason
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, whose replay would read no hyper-parameters"
    weight = recipe.weights[0]
    if type(y) is not torch.Tensor or y.device != x.device or weight.device != x.device:
        return "x, y and the model are not all on one device"
    if weight.dtype is not torch.float32:
        return f"the parameters are {weight.dtype}, and the two-launch step keeps them in float32"
    if x.dtype is not torch.float32 and (rows is None or x.dtype is not torch.uint8):
        return f"x is {x.dtype}; the two-launch step reads float32"
    if x.requires_grad or y.requires_grad:
        return "x or y requires grad"
    count, columns = x.shape[0] if x.dim() else 0, x.shape[1:].numel()
    if columns != weight.shape[1] or not (recipe.flatten or x.dim() == 2):
        return f"x {tuple(x.shape)} is not a batch of rows of {weight.shape[1]} columns"
    if recipe.loss == "cross_entropy":
        if y.dtype is not torch.int64 or y.shape != (count,):
            return f"y is {tuple(y.shape)} of {y.dtype}; class numbers are known, int64, one for each row"
    elif y.dtype is not torch.float32 or y.shape != (count, recipe.weights[-1].shape[0]):
        return f"y is {tuple(y.shape)} of {y.dtype}, not like the output of the model"
    if any(bias is None for bias in recipe.biases):
        return "a layer has no bias"
    if y.layout is not torch.strided or y.is_neg():
        return "y is sparse, or a lazy negative"
    if recipe.memory.touch(x) or recipe.memory.touch(y):
        return SHARES_MEMORY
    tensors = [*recipe.parameters, *(t for state in recipe.states for t in _moments_of(state))]
    if any(tensor.data_ptr() % 16 for tensor in tensors):
        return "a parameter or its state does not begin at a multiple of 16 bytes"
    rows = count if rows is None else rows
    return _why_not_update(recipe) or _kernels().why_no_step(_widths_of(recipe), rows, dtype or weight.dtype)


def _why_not_update(recipe: Recipe) -> str | None:
    groups = recipe.groups
    if any(isinstance(group[name], torch.Tensor) for group in groups for name in ("lr", "weight_decay")):
        return "a learning rate or weight decay is a tensor"
    if recipe.update == "sgd":
        if len({(group["momentum"] != 0, group["nesterov"]) for group in groups}) > 1:
            return "groups of parameters differ in whether they have momentum, or Nesterov's"
    elif any(not state["step"].is_cpu for state in recipe.states):
        return "the optimizer counts its steps on the GPU, as with fused=True, and to read that would wait"
    elif any(isinstance(beta, torch.Tensor) for group in groups for beta in group["betas"]):
        return "a beta is a tensor"
    return None


class TwoLaunches:
    """The memory that the steps of one TrainStep share, and the CUDA graph of its last epoch."""

    def __init__(self) -> None:
        self.failure: str | None = None  # why this route is closed, if it is
        self._made: Any = None  # for which network the memory is
        self._workspace: Any = None
        self._order = self._losses = torch.empty(0)
        # By the number of steps: what the updates multiply by, on the device and as it was sent there.
        self._numbers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._ran: Any = None  # what an epoch has run, launch by launch
        self._captured: Any = None  # what the graph holds
        self._graph: torch.cuda.CUDAGraph | None = None
        self._no_graph: str | None = None  # why a capture failed, if one has
        self._labels = wrong_labels.Labels()

    def why_no_replay(self) -> str | None:
        """None if an epoch may become a CUDA graph, else the reason."""
        return self._no_graph or cuda_graph.why_not_capture()

    def step(
        self, recipe: Recipe, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype | None, number: int
    ) -> torch.Tensor | None:
        """The mean loss, after which parameters and state are those of the next step.

        None if a kernel has failed: then nothing has changed, and this route is closed. number: of the step,
        for an error. IndexError if a label is no class: on a GPU not by this call, but by one of the next
        that come after the GPU has met it; until then steps change nothing, and their losses are NaN.
        """
        self._look(wait=False)
        rows = x.shape[0]
        losses = torch.empty(1, device=x.device)
        run = self._prepared(recipe, x, y, dtype, rows, 1)
        _kernels().refresh_copies(run.parameters)
        try:
            run.launch(None, 0, rows, losses, 0, number)
        except predicate.kernels().KernelFailed as failure:
            self._close(failure)
            return None
        _advance(recipe, 1)
        if recipe.loss == "cross_entropy":
            self._labels.wait_for(number, _counts_of(recipe))
            if not x.is_cuda:
                self.settle()
        return losses[0]

    def settle(self) -> None:
        """Wait for the labels of all steps so far: another route is taken, which would train on."""
        self._look(wait=True)

    def _look(self, wait: bool) -> None:
        """At the labels of the steps so far."""
        if self._made is not None:
            self._labels.look(self._workspace.wrong, self._made[0][-1], wait)

    def epoch(
        self,
        recipe: Recipe,
        images: torch.Tensor,
        labels: torch.Tensor,
        order: torch.Tensor,
        batch_size: int,
        dtype: torch.dtype | None,
        before: int,
    ) -> torch.Tensor:
        """A step for each ``batch_size`` of the rows ``order``, the last on what is left; all losses.

        On a GPU the first epoch goes launch by launch; the second is captured in a CUDA graph, and replayed
        as long as it reads and writes the same memory in the same way. Before the first step the kernels for
        both lengths of batch are built. If one fails all the same, this route is closed, and the losses are
        those of the steps before it, which are done. IndexError if a label is no class: the steps before it
        are done. before: so many steps of this epoch were done in another way, for that error.
        """
        self.settle()
        steps = -(-len(order) // batch_size)
        run = self._prepared(recipe, images, labels, dtype, batch_size, steps)
        if self._order.shape != order.shape or len(self._losses) != steps:
            self._order, self._losses = torch.empty_like(order), torch.empty(steps, device=order.device)
        self._order.copy_(order)
        lengths = [min(batch_size, len(order) - first) for first in range(0, len(order), batch_size)]
        compiled = (run.identity(), batch_size, len(order) % batch_size)
        rest = (run.numbers, self._order, self._losses)
        whole = (compiled, len(order), *(tensor.data_ptr() for tensor in rest))
        done = 0  # steps, launch by launch

        def launch_all() -> None:
            nonlocal done
            _kernels().refresh_copies(run.parameters)
            for done, rows in enumerate(lengths):
                run.launch(self._order, done * batch_size, rows, self._losses, done, done)
            done = steps

        replay = images.is_cuda and compiled == self._ran and self.why_no_replay() is None
        if replay and whole != self._captured:
            replay = self._capture(launch_all, images.device)
            self._captured = whole if replay else None
        if replay and self._graph is not None:
            with torch.cuda.device(images.device):
                self._graph.replay()
            done = steps
        else:
            done = 0
            try:
                for rows in {lengths[0], lengths[-1]}:
                    run.build(self._order, rows, self._losses)
                launch_all()
                self._ran = compiled
            except predicate.kernels().KernelFailed as failure:
                self._end(recipe, done, before)
                self._close(failure)
                return self._losses[:done].clone()
        self._end(recipe, done, before)
        return self._losses.clone()

    def _end(self, recipe: Recipe, done: int, before: int) -> None:
        """So many steps of an epoch are done, unless a label was no class."""
        record = self._workspace.wrong
        wrong = wrong_labels.wrong_label(record) if recipe.loss == "cross_entropy" and done > 0 else None
        if wrong is None:
            _advance(recipe, done)
            return
        _advance(recipe, wrong[0])
        wrong_labels.forget(record)
        step = f"step {before + wrong[0]} of this epoch"
        raise IndexError(wrong_labels.no_class(wrong[1], self._made[0][-1], step))

    def _close(self, failure: Exception) -> None:
        """Take this route no more; where ``backend("triton")`` insists on it, raise the failure instead."""
        if backend_choice.forced():
            raise failure
        self.failure = str(failure)
        self._captured = self._graph = None
        warn(f"training goes on without the two-launch step: {failure}. {predicate.HOW_TO_REPORT}")

    def _capture(self, run: Callable[[], None], device: torch.device) -> bool:
        """Whether the graph holds now what ``run`` launches."""
        self._graph = None  # the memory of the one before is free for this
        try:
            self._graph, _ = cuda_graph.capture(run, device)
        except cuda_graph.CaptureFailed as failure:
            self._no_graph = f"capturing it raised {failure}"
            warn(f"an epoch goes launch by launch, not as a CUDA graph: {self._no_graph}")
        return self._graph is not None

    def _prepared(
        self,
        recipe: Recipe,
        x: torch.Tensor,
        y: torch.Tensor,
        dtype: torch.dtype | None,
        rows: int,
        steps: int,
    ) -> "_Run":
        """What a step launches, with its hyper-parameters on the device."""
        kernels, device = _kernels(), x.device
        dtype, widths = dtype or torch.float32, _widths_of(recipe)
        if self._made != (widths, dtype, device) or self._workspace.rows < rows:
            self.settle()  # as the record of their labels goes
            self._workspace = kernels.workspace_for(widths, rows, dtype, device)
            self._made, self._ran, self._captured, self._graph = (widths, dtype, device), None, None, None
            self._order = self._losses = torch.empty(0)
            self._numbers.clear()
        numbers = _numbers_of(recipe, steps)
        there, sent = self._numbers.get(steps, (None, None))
        if there is None or sent is None or not torch.equal(sent, numbers):
            if there is None:
                there = torch.empty_like(numbers, device=device)
            # From memory that the copy need not wait for, and that is not written to again.
            there.copy_(numbers.pin_memory() if x.is_cuda else numbers, non_blocking=True)
            self._numbers[steps] = there, numbers
        nesterov = bool(recipe.groups[0].get("nesterov", False))
        network = kernels.Network(widths, recipe.loss, recipe.update, nesterov)
        x = x.detach().flatten(1).contiguous()
        parameters = _parameters_of(recipe, self._workspace.copies)
        return _Run(x, y.detach().contiguous(), parameters, network, there, self._workspace)


class _Run(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    parameters: Any
    network: Any
    numbers: torch.Tensor
    workspace: Any

    def launch(
        self, index: torch.Tensor | None, first: int, rows: int, losses: torch.Tensor, i: int, number: int
    ) -> None:
        _kernels().train_step(
            self.x, index, first, rows, self.y, self.parameters, self.network, self.numbers, losses, i,
            self.workspace, self.scale, number=number,
        )  # fmt: skip

    def build(self, index: torch.Tensor, rows: int, losses: torch.Tensor) -> None:
        """Compile and load what a step on so many rows launches."""
        _kernels().build_step(
            self.x, index, rows, self.y, self.parameters, self.network, self.numbers, losses, self.workspace,
            self.scale,
        )  # fmt: skip

    @property
    def scale(self) -> float:
        return 1.0 if self.x.is_floating_point() else 1 / 255

    def identity(self) -> tuple[Any, ...]:
        """What has to be the same for a replay to be right: the caller's memory, and what is compiled in."""
        tensors = [self.x, self.y, *(t for group in self.parameters for t in group)]
        addresses = tuple(None if t is None else (t.data_ptr(), t.shape, t.dtype) for t in tensors)
        return addresses, self.network, predicate.kernels().arithmetic(torch.float32)


def _kernels() -> Any:
    return predicate.kernels().step


def _widths_of(recipe: Recipe) -> tuple[int, ...]:
    return (recipe.weights[0].shape[1], *(weight.shape[0] for weight in recipe.weights))


def _moments_of(state: dict[str, Any]) -> list[torch.Tensor]:
    return [
        state[name] for name in ("momentum_buffer", "exp_avg", "exp_avg_sq") if state.get(name) is not None
    ]


def _parameters_of(recipe: Recipe, copies: tuple[torch.Tensor | None, ...]) -> Any:
    """The parameters and what the optimizer keeps of them, which all have biases, for the kernels."""
    moments: list[torch.Tensor | None] = [None] * len(recipe.parameters)
    squares = list(moments)
    for i, (group, state) in enumerate(zip(recipe.groups, recipe.states, strict=True)):
        if recipe.update != "sgd":
            moments[i], squares[i] = state["exp_avg"], state["exp_avg_sq"]
        elif group["momentum"] != 0:
            moments[i] = state["momentum_buffer"]
    # Detached: Triton and CUDA graphs have nothing to do with autograd.
    weights = tuple(weight.detach() for weight in recipe.weights)
    biases = tuple(bias.detach() for bias in recipe.biases if bias is not None)
    pairs = (tuple(part) for part in (moments[::2], moments[1::2], squares[::2], squares[1::2]))
    return _kernels().Parameters(weights, biases, copies, *pairs)


def _numbers_of(recipe: Recipe, steps: int) -> torch.Tensor:
    """``(steps, parameters, 8)`` float32 on the CPU: what each update multiplies by."""
    kernels = _kernels()
    known: dict[Any, Any] = {}
    rows = []
    for group, state in zip(recipe.groups, recipe.states, strict=True):
        done = 0.0 if recipe.update == "sgd" else state["step"].item()
        key = (id(group), done)
        if key not in known:
            if recipe.update == "sgd":
                known[key] = kernels.sgd_numbers(
                    group["lr"], group["momentum"], group["dampening"], group["weight_decay"]
                )
            else:
                step = done + 1.0
                if steps > 1:
                    step = torch.arange(1, steps + 1, dtype=torch.float64) + done
                known[key] = kernels.adam_numbers(
                    group["lr"], group["betas"], group["eps"], group["weight_decay"],
                    recipe.update == "adamw", step,
                )  # fmt: skip
                if steps > 1:
                    numbers = [torch.as_tensor(n, dtype=torch.float64).expand(steps) for n in known[key]]
                    known[key] = torch.stack(numbers, dim=1).float()
        rows.append(known[key])
    if isinstance(rows[0], torch.Tensor):
        return torch.stack(rows, dim=1)
    return torch.tensor([rows], dtype=torch.float32).expand(steps, -1, -1).contiguous()


def _advance(recipe: Recipe, steps: int) -> None:
    """What else so many steps leave behind: no gradients, the optimizer's count, and for autograd's checks
    that the parameters have changed."""
    if steps == 0:
        return
    for parameter in recipe.parameters:
        parameter.grad = None
    torch.autograd.graph.increment_version(recipe.written)
    if recipe.update != "sgd":
        torch._foreach_add_(_counts_of(recipe), float(steps))


def _counts_of(recipe: Recipe) -> list[torch.Tensor]:
    """The optimizer's counts of steps."""
    return [] if recipe.update == "sgd" else [state["step"] for state in recipe.states]
