"""The contestants of a case, PyTorch's and ours, and the check that their results are accurate.

All contestants of a case share its inputs and weights; in a training step each changes its own copy. A
contestant is prepared only when its turn comes, and raises an exception if it cannot run.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import fusedmlp
from benchmarks.cases import DTYPES, LAYER_FORWARD, STEP, Case, arithmetic, network
from benchmarks.timing import warm_up_on_a_side_stream
from fusedmlp.torch_tools import cuda_graph
from fusedmlp.torch_tools.accuracy import compare

Results = tuple[torch.Tensor, ...]

# The input whose results are checked. Graphs are captured with input 0, and one that ignored new inputs
# would be found with another.
CHECKED = 1


class Work:
    """The tensors of one case: the weights, and ``copies`` inputs in rotation, too many for the cache."""

    def __init__(self, case: Case, device: torch.device, copies: int) -> None:
        self.case, self.dtype = case, DTYPES[case.dtype]
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=self.dtype)

        with device:
            self.model = network(case.widths, case.final_relu).to(self.dtype)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(random(*parameter.shape) / parameter.shape[-1] ** 0.5)
        N = case.widths[-1]
        self.xs = [random(case.rows, case.widths[0]).requires_grad_(case.need_x) for _ in range(copies)]
        self.grad_output = random(case.rows, N)
        self.labels = torch.randint(N, (case.rows,), generator=generator, device=device)

    def own_model(self) -> nn.Sequential:
        """A torch.nn model. It shares the parameters, except in a training step, which changes them."""
        shared = {} if self.case.what == STEP else {id(p): p for p in self.model.parameters()}
        return copy.deepcopy(self.model, shared)

    def fused_model(self, per_layer: bool = False) -> nn.Module:
        """The same model with fusedmlp's modules, which run it as one chain or, if asked, layer by layer."""
        if not per_layer:
            return fusedmlp.fuse(self.own_model())
        modules: list[nn.Module] = []
        plain = [module for module in self.own_model() if isinstance(module, nn.Linear)]
        for i, layer in enumerate(plain):
            relu = self.case.final_relu or i < len(plain) - 1
            with torch.device("meta"):
                kind = fusedmlp.LinearReLU if relu else fusedmlp.Linear
                module = kind(layer.in_features, layer.out_features)
            module.weight, module.bias = layer.weight, layer.bias
            modules.append(module)
        return nn.Sequential(*modules)


class Runner:
    """Runs the work with one model: call it with the number of an input.

    forward: takes an input, and in a training step the labels as well.
    """

    def __init__(self, work: Work, model: nn.Module, fused_optimizer: bool = True) -> None:
        self.case, self.xs, self.labels, self.grad_output = work.case, work.xs, work.labels, work.grad_output
        self.parameters = list(model.parameters())
        self.forward: Callable[..., torch.Tensor] = model
        self.optimizer: torch.optim.Optimizer | None = None
        if work.case.what == STEP:
            self.forward = lambda x, labels: F.cross_entropy(model(x), labels)
            self.start = [p.detach().clone() for p in self.parameters]
            how = {"fused": True} if fused_optimizer else {}
            self.optimizer = torch.optim.SGD(self.parameters, lr=0.01, momentum=0.9, **how)

    def __call__(self, i: int) -> Results:
        x = self.xs[i % len(self.xs)]
        if self.case.forward_only:
            with torch.no_grad():
                return (self.forward(x),)
        if self.optimizer is None:
            y = self.forward(x)
            inputs = [*([x] if self.case.need_x else []), *self.parameters]
            return (y.detach(), *torch.autograd.grad(y, inputs, self.grad_output))
        loss = self.forward(x, self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return (loss.detach(),)

    def restore(self) -> None:
        """Reset the training in place, because a CUDA graph may use this memory."""
        if self.optimizer is not None:
            for parameter, start in zip(self.parameters, self.start, strict=True):
                parameter.detach().copy_(start)
                for value in self.optimizer.state.get(parameter, {}).values():
                    if isinstance(value, torch.Tensor):
                        value.zero_()

    def results(self, run: Callable[[int], Results]) -> Results:
        """The results to check. Those of a step are the loss and the change of each parameter."""
        self.restore()
        found = tuple(result.clone() for result in run(CHECKED))
        if self.optimizer is not None:
            found += tuple(p.detach() - q for p, q in zip(self.parameters, self.start, strict=True))
            self.restore()
        return found


Prepared = tuple[Runner, Callable[[int], Results]]  # the runner, and the function to time


class Contestant(NamedTuple):
    """One way to do the work.

    family: "torch", "fusedmlp" or "other", which is no baseline because it computes something else;
    graph: whether it runs in a CUDA graph.
    """

    name: str
    family: str
    graph: bool
    prepare: Callable[[Work], Prepared]
    note: str | None = None


def _plain(work: Work, fused_optimizer: bool = False) -> Prepared:
    runner = Runner(work, work.own_model(), fused_optimizer)
    return runner, runner


_fused_optimizer = functools.partial(_plain, fused_optimizer=True)


def _in_tf32(work: Work) -> Prepared:
    runner = Runner(work, work.own_model())

    def run(i: int) -> Results:
        with arithmetic("tf32"):
            return runner(i)

    return runner, run


def _addmm_activation(work: Work) -> Prepared:
    layer: Any = work.model[0]
    runner = Runner(work, work.model)
    runner.forward = lambda x: torch._addmm_activation(layer.bias, x, layer.weight.t())
    return runner, runner


def _compiled(mode: str) -> Callable[[Work], Prepared]:
    def prepare(work: Work) -> Prepared:
        runner = Runner(work, work.own_model())
        runner.forward = torch.compile(runner.forward, mode=mode, dynamic=False)
        if mode == "default":
            return runner, runner

        def run(i: int) -> Results:
            torch.compiler.cudagraph_mark_step_begin()
            return runner(i)

        for _ in range(3):  # records its CUDA graphs, so that these are checked
            run(0)
        return runner, run

    return prepare


def _in_a_graph(prepare: Callable[[Work], Prepared]) -> Callable[[Work], Prepared]:
    """The same in a CUDA graph. A call copies the input to the graph's memory and replays the graph."""

    def graphed(work: Work) -> Prepared:
        if work.xs[0].device.type != "cuda":
            raise RuntimeError("CUDA graphs need a GPU")
        runner, run = prepare(work)
        x = work.xs[0].detach().clone().requires_grad_(work.case.need_x)
        runner.xs = [x]
        warm_up_on_a_side_stream(run)
        graph, outputs = cuda_graph.capture(lambda: run(0), x.device)

        def replay(i: int) -> Results:
            x.detach().copy_(work.xs[i % len(work.xs)].detach())
            graph.replay()
            return outputs

        return runner, replay

    return graphed


def _train_step(work: Work) -> Prepared:
    """TrainStep. It captures graphs in its first steps, so it is checked and timed after eight."""
    model = work.fused_model()
    runner = Runner(work, model)
    assert runner.optimizer is not None
    step = fusedmlp.TrainStep(model, F.cross_entropy, runner.optimizer)

    def run(i: int) -> Results:
        return (step(work.xs[i % len(work.xs)], work.labels),)

    for i in range(8):
        run(i)
    return runner, run


def _fused(backend: Any, per_layer: bool = False) -> Callable[[Work], Prepared]:
    def prepare(work: Work) -> Prepared:
        runner = Runner(work, work.fused_model(per_layer))
        if backend == "auto":
            return runner, runner

        def run(i: int) -> Results:
            with fusedmlp.backend(backend):
                return runner(i)

        return runner, run

    return prepare


def contestants(case: Case, device: torch.device, few: bool, compiling: bool) -> list[Contestant]:
    """The contestants of a case, eager first.

    few: leave out those that take minutes to compile; compiling: include torch.compile.
    """
    cuda = device.type == "cuda"
    # In a training step all but the first use PyTorch's fused optimizer, so the layers make the difference.
    found = [Contestant("eager", "torch", False, _plain)]
    if case.what == STEP:
        found.append(Contestant("eager, fused optimizer", "torch", False, _fused_optimizer))
    if case.dtype == "float32" and cuda:
        note = "computes in TF32 instead of float32: no baseline, not checked"
        found.append(Contestant("eager TF32", "other", False, _in_tf32, note))
    if case.what == LAYER_FORWARD:
        note = "turns NaN into 0, and has no derivative"
        found.append(Contestant("addmm_activation", "torch", False, _addmm_activation, note))
    if compiling:
        found.append(Contestant("compile", "torch", False, _compiled("default")))
        if cuda and not few:
            modes = ("reduce-overhead", "max-autotune")
            found += [Contestant(f"compile {mode}", "torch", True, _compiled(mode)) for mode in modes]
    if cuda:
        found.append(Contestant("eager in a graph", "torch", True, _in_a_graph(_fused_optimizer)))
    found.append(Contestant("fusedmlp auto", "fusedmlp", False, _fused("auto")))
    found.append(Contestant("fusedmlp torch", "fusedmlp", False, _fused("torch")))
    if len(case.layers) > 1:
        found.append(Contestant("fusedmlp per layer", "fusedmlp", False, _fused("triton", per_layer=True)))
    found.append(Contestant("fusedmlp chain", "fusedmlp", False, _fused("triton")))
    if case.what == STEP:
        found.append(Contestant("fusedmlp TrainStep", "fusedmlp", cuda, _train_step))
    if cuda:
        found.append(Contestant("fusedmlp in a graph", "fusedmlp", True, _in_a_graph(_fused("triton"))))
    return found


MOST_AT_ONCE = 2**27  # how many values of the widest layer are computed in float64 at one time


def exactly(work: Work) -> Results:
    """The results of the checked input in float64, some rows at a time, to save memory."""
    case = work.case
    model = copy.deepcopy(work.model).double()
    parameters = list(model.parameters())
    grads = [torch.zeros_like(p) for p in parameters]
    ys, grad_xs, loss = [], [], torch.zeros((), dtype=torch.float64, device=work.labels.device)
    rows = max(1, MOST_AT_ONCE // max(case.widths))
    for first in range(0, case.rows, rows):
        part = slice(first, first + rows)
        x = work.xs[CHECKED][part].detach().double().requires_grad_(case.need_x)
        with torch.set_grad_enabled(not case.forward_only):
            y = model(x)
            if case.what == STEP:
                y = F.cross_entropy(y, work.labels[part], reduction="sum") / case.rows
        if case.what == STEP:
            loss += y.detach()
        else:
            ys.append(y.detach())
        if case.forward_only:
            continue
        grad_output = None if case.what == STEP else work.grad_output[part].double()
        inputs = [*([x] if case.need_x else []), *parameters]
        found = list(torch.autograd.grad(y, inputs, grad_output))
        if case.need_x:
            grad_xs.append(found.pop(0))
        for grad, one in zip(grads, found, strict=True):
            grad += one
    if case.what == STEP:
        return (loss, *(-0.01 * grad for grad in grads))  # in the first step the momentum is the gradient
    if case.forward_only:
        return (torch.cat(ys),)
    return (torch.cat(ys), *([torch.cat(grad_xs)] if case.need_x else []), *grads)


class Check(NamedTuple):
    """ratio: our error divided by PyTorch's, the largest of all results; problem: None if accurate."""

    ratio: float | None
    problem: str | None


def check(ours: Results, eagers: Results | None, exact: Results) -> Check:
    """Check that the error against float64 is at most twice eager PyTorch's, see accuracy.compare."""
    if eagers is None:
        return Check(None, "not checked: eager PyTorch, to whose error it is compared, did not run")
    if [t.shape for t in ours] != [t.shape for t in exact]:
        return Check(None, "wrong: other shapes")
    worst = 0.0
    for i, (one, its, true) in enumerate(zip(ours, eagers, exact, strict=True)):
        if one.dtype != its.dtype:
            return Check(None, f"wrong: result {i} is {one.dtype}")
        found = compare(one, its, true)
        if found.problem is not None:
            return Check(None, f"wrong: result {i}: {found.problem}")
        for error, torchs in zip(found.errors, found.torchs_errors, strict=True):
            if torchs > 0:
                worst = max(worst, error / torchs)
    return Check(worst, None)
