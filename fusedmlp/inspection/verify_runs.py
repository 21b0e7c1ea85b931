"""What verify compares: a model run fused, as torch.nn runs it, in float64, and from a rounding away."""

import contextlib
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from fusedmlp import nn
from fusedmlp.convert.pending_relu import LinearBeforeClamp, LinearBeforeReLU
from fusedmlp.dispatch import backend_choice
from fusedmlp.torch_tools import accuracy
from fusedmlp.torch_tools.model_copy import Draws, InFloat64, random_states, twin, up
from fusedmlp.torch_tools.restore import left_as_it_was

# How gradients are asked for: of the loss, of the output's sum, from a gradient with transposed memory, of
# the loss twice, and of the norm of the loss's gradient.
Ask = Literal["loss", "stride 0", "transposed", "twice", "double"]
Results = dict[str, torch.Tensor | None]  # by name: outputs, the loss, "gradient of ..."

_NEARBY = 8  # runs on inputs and parameters one rounding away


class Run(NamedTuple):
    results: Results
    written: frozenset[str]  # of what is not the model's to write to


class _Way(NamedTuple):
    model: torch.nn.Module
    context: Callable[[], contextlib.AbstractContextManager[Any]]
    change: Callable[[torch.Tensor], torch.Tensor]  # makes its inputs of the user's


class Runs:
    """Makes the runs; each begins in the state in which the model is, and leaves it so.

    leaves: the names of what gets a gradient: floating-point inputs, and parameters that require grad.
    """

    def __init__(self, model: torch.nn.Module, x: Any, loss_fn: Callable[[Any], torch.Tensor] | None) -> None:
        # Without its communication: one of several processes may ask alone.
        self.model: torch.nn.Module = (
            model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
        )
        self.x, self.loss_fn = x, loss_fn
        self.exact_problems: dict[Ask, str] = {}
        self._plain = _Way(self.model, lambda: _plainly(self.model), _clone)
        self._fused = _Way(self.model, contextlib.nullcontext, _clone)
        self._exacts: dict[Ask, Results] = {}
        self._exact_model: torch.nn.Module | None = None
        self._draws = False
        self._by_backward = False

    @contextlib.contextmanager
    def put_back(self) -> Iterator["Runs"]:
        """Around everything; lazy modules become what they shall be first."""
        if any(map(torch.nn.parameter.is_lazy, self.model.parameters())):
            with left_as_it_was(self.model, self.x), _plainly(self.model):
                args, kwargs, _ = self._arguments(_clone, ())
                self.model(*args, **kwargs)
        parameters = dict(self.model.named_parameters())
        self._values = {name: _clone(parameter) for name, parameter in parameters.items()}
        self._flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
        given = self._named_inputs()
        self._inputs = [name for name, tensor in given.items() if _floating(tensor)]
        self.trained = [n for n, p in parameters.items() if p.requires_grad and not p.is_inference()]
        self.as_given = frozenset([*(n for n in self._inputs if given[n].requires_grad), *self.trained])
        try:
            with left_as_it_was(self.model, self.x):
                yield self
        finally:
            self._put_parameters_back()

    def _put_parameters_back(self) -> set[str]:
        """And the names of those that were written to."""
        written = set()
        for name, parameter in self.model.named_parameters():
            if not _same(parameter, self._values[name]):
                written.add(name)
                parameter.data.copy_(self._values[name])
        return written

    @property
    def leaves(self) -> list[str]:
        return [*self._inputs, *self.trained]

    def probe(self) -> tuple[Run, list[str]]:
        """The plain run, and notes on it. What the plain model raises comes through."""
        notes = []
        self._first(self.as_given)
        try:
            run = self._first(self.leaves)
        except Exception as error:
            notes.append(f"No gradient of the input, with which the plain model raises {in_words(error)}")
            self._inputs = [name for name in self._inputs if name in self.as_given]
            run = self.plain("loss", self.leaves)
        again = self._run(self._plain, "loss", self.leaves).results
        if any(not _same(value, again.get(name)) for name, value in run.results.items()):
            notes.append("Two runs of the plain model differ: something in it is not deterministic.")
        return run, notes

    def _first(self, needs: Collection[str]) -> Run:
        try:
            return self.plain("loss", needs)
        except RuntimeError as error:
            if self._by_backward or "heckpoint" not in str(error) or ".grad()" not in str(error):
                raise
            self._by_backward = True  # which checkpointing with use_reentrant=True asks for
            return self.plain("loss", needs)

    def plain(self, ask: Ask, needs: Collection[str]) -> Run:
        """As torch.nn runs it."""
        return self._run(self._plain, ask, needs)

    def fused(self, ask: Ask, needs: Collection[str]) -> Run:
        """As it runs under the settings of the caller."""
        return self._run(self._fused, ask, needs)

    def exact(self, ask: Ask) -> Results:
        """With all gradients; nothing, and a sentence in exact_problems, if it cannot be had in float64."""
        if ask not in self._exacts:
            try:
                self._exacts[ask] = self._run_exact(ask)
            except Exception as error:
                self._exacts[ask] = {}
                self.exact_problems[ask] = f"Not compared with float64, where it raises {in_words(error)}"
        return self._exacts[ask]

    def _run_exact(self, ask: Ask) -> Results:
        if self._exact_model is None:
            model, _ = twin(self.model, lambda data: _clone(up(data)))
            for name, parameter in model.named_parameters():
                if up(parameter.detach()).dtype is not parameter.dtype:
                    raise TypeError(f"parameter {name} cannot be copied in float64")
            self._exact_model = model
        exact, draws = self._exact_model, Draws()
        if self._draws:
            noting = self._plain._replace(context=lambda: _all_of(_plainly(self.model), draws))
            self._run(noting, ask, self.leaves)
            if draws.unknown:
                names = ", ".join(sorted(draws.unknown))
                raise RuntimeError(f"the numbers that {names} draws are not known; model.eval() may help")
        kinds = {t.device.type for t in (*exact.parameters(), *self._named_inputs().values())}
        no_autocast = [torch.autocast(kind, enabled=False) for kind in kinds & {"cpu", "cuda"}]

        def context() -> contextlib.AbstractContextManager[Any]:
            return _all_of(_plainly(exact), *no_autocast, InFloat64(draws))

        return self._run(_Way(exact, context, lambda t: _clone(up(t))), ask, self.leaves).results

    def nearby(self, ask: Ask) -> Iterator[Results]:
        """Plain runs on inputs and parameters one rounding away: what PyTorch's own error can be as well."""
        with contextlib.suppress(Exception):  # the model cannot be copied, for one
            for number in range(_NEARBY):
                yield self._run_nearby(number, ask)

    def _run_nearby(self, number: int, ask: Ask) -> Results:
        generator = torch.Generator().manual_seed(number)

        def nudged(tensor: torch.Tensor) -> torch.Tensor:
            return accuracy.nudged(tensor, generator) if _floating(tensor) else _clone(tensor)

        model, _ = twin(self.model, nudged)
        return self._run(_Way(model, lambda: _plainly(model), nudged), ask, self.leaves).results

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies of the input as the model takes it, requiring grad as it was given."""
        args, kwargs, _ = self._arguments(_clone, self.as_given)
        return args, kwargs

    def _named_inputs(self) -> dict[str, torch.Tensor]:
        flat, _ = tree_flatten_with_path(self.x)
        taken = any(name.split(".")[0] == "x" for name, _ in self.model.named_parameters())
        name = "the input x" if taken else "x"
        return {name + keystr(path): leaf for path, leaf in flat if isinstance(leaf, torch.Tensor)}

    def _arguments(
        self, change: Callable[[torch.Tensor], torch.Tensor], needs: Collection[str]
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, torch.Tensor]]:
        flat, spec = tree_flatten_with_path(self.x)
        inputs = {
            name: change(leaf.detach()).requires_grad_(name in needs)
            for name, leaf in self._named_inputs().items()
        }
        tensors = iter(inputs.values())
        x = tree_unflatten([next(tensors) if isinstance(t, torch.Tensor) else t for _, t in flat], spec)
        if isinstance(x, Mapping):
            return (), dict(x), inputs
        return (x if isinstance(x, tuple) else (x,)), {}, inputs

    def _run(self, way: _Way, ask: Ask, needs: Collection[str]) -> Run:
        parameters = dict(way.model.named_parameters())
        written: set[str] = set()
        with left_as_it_was(way.model, self.x):
            args, kwargs, inputs = self._arguments(way.change, needs)
            values = {name: _clone(tensor) for name, tensor in inputs.items()}
            before = random_states((parameters, inputs))
            try:
                for name in self.trained:
                    parameters[name].requires_grad_(name in needs)
                with way.context():
                    output = way.model(*args, **kwargs)
                    leaves = {n: t for n, t in (*inputs.items(), *parameters.items()) if n in needs}
                    results = self._results(ask, output, leaves, written)
            finally:
                for name in self.trained:
                    parameters[name].requires_grad_(self._flags[name])
                if way.model is self.model:
                    written |= self._put_parameters_back()
            written |= {name for name, tensor in inputs.items() if not _same(tensor, values[name])}
            self._draws |= not all(map(torch.equal, before, random_states((parameters, inputs))))
        return Run(results, frozenset(written))

    def _results(self, ask: Ask, output: Any, leaves: dict[str, torch.Tensor], written: set[str]) -> Results:
        outputs = {
            "output" + keystr(path): leaf
            for path, leaf in tree_flatten_with_path(output)[0]
            if isinstance(leaf, torch.Tensor) and _floating(leaf)
        }
        results: Results = {name: _comparable(tensor).clone() for name, tensor in outputs.items()}
        if self.loss_fn is not None and ask not in ("stride 0", "transposed"):
            loss = self.loss_fn(output)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                what = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
                raise ValueError(f"loss_fn must return a scalar tensor, got {what}")
            results["loss"] = _comparable(loss)
            outputs = {"loss": loss}
        targets = [tensor for tensor in outputs.values() if tensor.requires_grad]
        leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        if not targets or not leaves:
            return results
        incoming = [
            torch.ones_like(target) if "loss" in results else _incoming(ask, number, target)
            for number, target in enumerate(targets)
        ]
        values = [_clone(tensor) for tensor in incoming]
        names = list(leaves)
        gradients = self._gradients(targets, list(leaves.values()), incoming, ask == "twice", ask == "double")
        if ask == "twice":
            first, kept = gradients, [None if g is None else _clone(g) for g in gradients]
            gradients = self._gradients(targets, list(leaves.values()), incoming)
            results |= _named("first gradient of", names, kept)
            if not all(map(_same, first, kept)):
                written.add("the gradients of an earlier backward")
        if ask == "double":
            gradients = _of_norm(gradients, list(leaves.values()))
        if not all(map(_same, incoming, values)):
            written.add("the incoming gradient")
        if any(not _same(tensor, results[name]) for name, tensor in outputs.items()):
            written.add("the output")
        return results | _named("gradient of", names, gradients)

    def _gradients(
        self,
        targets: list[torch.Tensor],
        leaves: list[torch.Tensor],
        incoming: list[torch.Tensor],
        keep: bool = False,
        create: bool = False,
    ) -> list[torch.Tensor | None]:
        # Not by backward(), which calls hooks of the parameters: an optimizer's, for one.
        if not self._by_backward:
            return list(
                torch.autograd.grad(targets, leaves, incoming, keep or create, create, allow_unused=True)
            )
        torch.autograd.backward(targets, incoming, keep or create, create)
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return gradients


def in_words(error: BaseException) -> str:
    """Its type and the first of its words."""
    text = " ".join(str(error).split())
    return textwrap.shorten(f"{type(error).__name__}: {text}".rstrip(": "), 240, placeholder=" ...")


def _named(what: str, names: list[str], gradients: list[torch.Tensor | None]) -> Results:
    names = [f"{what} {name.replace('_orig_mod.', '')}" for name in names]  # without what torch.compile adds
    return {n: None if g is None else _comparable(g) for n, g in zip(names, gradients, strict=True)}


def _of_norm(gradients: list[torch.Tensor | None], leaves: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """The gradient of the gradients' norm; 0 for what does not depend on them."""
    norms = [
        # In float32 at least, as the squares of 16-bit numbers would overflow. Where the norm is 0 it has a
        # gradient, as a square root has not.
        torch.linalg.vector_norm(_dense(g).to(torch.promote_types(g.dtype, torch.float32))).to(
            leaves[0].device
        )
        for g in gradients
        if g is not None and g.requires_grad
    ]
    if not norms:
        return [torch.zeros_like(leaf) for leaf in leaves]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return [
        torch.zeros_like(leaf) if g is None else g
        for g, leaf in zip(torch.autograd.grad(norm, leaves, allow_unused=True), leaves, strict=True)
    ]


def _incoming(ask: Ask, number: int, target: torch.Tensor) -> torch.Tensor:
    """The gradient that comes in: the same numbers on every device and in every dtype."""
    with _disable_current_modes():
        if ask == "stride 0":
            return torch.ones((), dtype=target.dtype, device=target.device).expand(target.shape)
        generator = torch.Generator().manual_seed(number)
        # Numbers that bfloat16 holds, so that no dtype rounds them.
        random = (
            torch.randn(target.shape, generator=generator, device="cpu")
            .bfloat16()
            .to(target.device, target.dtype)
        )
        if ask == "transposed" and target.dim() > 1:
            return random.transpose(-1, -2).contiguous().transpose(-1, -2)
        return random


class _LinearReLU(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.relu(F.linear(input, self.weight, self.bias))


_PLAIN: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    nn.Linear: torch.nn.Linear,
    nn.LinearReLU: _LinearReLU,
    LinearBeforeReLU: torch.nn.Linear,
    LinearBeforeClamp: torch.nn.Linear,
    nn.Sequential: torch.nn.Sequential,
    nn.MLP: torch.nn.Sequential,
}


@contextlib.contextmanager
def _plainly(model: torch.nn.Module) -> Iterator[None]:
    """Every layer of this package is one of torch.nn, and nothing is compiled."""
    kinds = {}
    for module in model.modules():
        kind = type(module)
        plain = kind.__dict__.get("_came_from") or _PLAIN.get(kind)
        if plain is not None:
            kinds[module] = kind, plain
    # Compiled code runs only once this is imported; to import it for nothing would take seconds.
    compiled = "torch._dynamo" in sys.modules
    try:
        for module, (_, plain) in kinds.items():
            object.__setattr__(module, "__class__", plain)
        with (
            backend_choice.backend("torch"),
            torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext(),
        ):
            yield
    finally:
        for module, (kind, _) in kinds.items():
            object.__setattr__(module, "__class__", kind)


@contextlib.contextmanager
def _all_of(*contexts: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _floating(tensor: torch.Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_nested


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    tensor = _dense(tensor.detach())
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """The same values, NaN for NaN."""
    if one is None or other is None:
        return one is other
    one, other = _comparable(one), _comparable(other)
    return torch.equal(one, other) or (
        one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
    )
