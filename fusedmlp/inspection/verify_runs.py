"""The runs of one model that ``verify`` compares: fused, on torch.nn, in float64, and on nearby values."""

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only

from fusedmlp import nn
from fusedmlp.convert.module_classes import TORCHS
from fusedmlp.dispatch import backend_choice
from fusedmlp.inspection.explain import shown_name, uncompiled
from fusedmlp.inspection.float64 import InFloat64, to_float64
from fusedmlp.torch_tools import accuracy
from fusedmlp.torch_tools.model_state import copy_with, left_as_it_was
from fusedmlp.torch_tools.warn import first_line

# A run takes the gradients of the loss; of the output, with an incoming gradient of stride 0 or one whose
# memory is transposed; of the loss twice; or of the norm of the loss's gradient.
Ask = Literal["loss", "stride-0 gradient", "transposed gradient", "backward twice", "double backward"]
Value = torch.Tensor | None
Results = dict[str, Value]  # by name: outputs, the loss, "gradient of ..."

_NEARBY = 8  # runs on inputs and parameters that are one rounding away


class Outcome(NamedTuple):
    """The results of a run, and the names of the caller's tensors that it wrote to."""

    results: Results
    written: set[str]


class Way(NamedTuple):
    """How to run: the model, the context, and the function that makes the inputs from the caller's."""

    model: torch.nn.Module
    context: Callable[[], contextlib.AbstractContextManager[Any]]
    change: Callable[[torch.Tensor], torch.Tensor]


class Runs:
    """Runs a model in several ways. Each run leaves the model in the state in which it found it.

    leaves names the tensors that get gradients: floating-point inputs, and parameters that require grad.
    """

    def __init__(self, model: torch.nn.Module, x: Any, loss_fn: Callable[[Any], torch.Tensor] | None) -> None:
        # Without DDP's communication, as perhaps only one of several processes calls verify.
        model = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
        self.model, self.x, self.loss_fn = model, x, loss_fn
        x_name = "the input x" if hasattr(model, "x") else "x"
        self._given = {
            x_name + keystr(path): leaf
            for path, leaf in tree_flatten_with_path(x)[0]
            if isinstance(leaf, torch.Tensor)
        }
        if any(map(torch.nn.parameter.is_lazy, model.parameters())):
            with left_as_it_was(model, x), _on_torch_nn(model):
                args, kwargs, _ = self.arguments(_clone, ())
                model(*args, **kwargs)
        parameters = dict(model.named_parameters())
        self._values = {name: _clone(parameter) for name, parameter in parameters.items()}
        self._trained = [n for n, p in parameters.items() if p.requires_grad and not p.is_inference()]
        inputs = {name: tensor for name, tensor in self._given.items() if _floating(tensor)}
        self.leaves = [*inputs, *self._trained]
        self.as_given = frozenset(self.leaves) - {n for n, t in inputs.items() if not t.requires_grad}
        self.plain = Way(model, functools.partial(_on_torch_nn, model), _clone)
        self.fused = Way(model, contextlib.nullcontext, _clone)
        self.exact_problems: dict[Ask, str] = {}
        self._exact_results: dict[Ask, Results] = {}
        self._errors_nearby: dict[Ask, dict[str, tuple[float, float]]] = {}
        self._random = self._by_backward = False

    def first(self) -> tuple[Outcome, list[str]]:
        """Run on torch.nn, and return the outcome and notes on it. Raises what the model raises."""
        notes = []
        self.run(self.plain, "loss", self.as_given)
        try:
            outcome = self.run(self.plain, "loss", self.leaves)
        except Exception as error:
            notes.append(f"No gradient of the input, with which the plain model raises {first_line(error)}")
            self.leaves = [name for name in self.leaves if name in self.as_given]
            outcome = self.run(self.plain, "loss", self.leaves)
        again = self.run(self.plain, "loss", self.leaves).results
        if any(not _same(value, again.get(name)) for name, value in outcome.results.items()):
            notes.append("Two runs of the plain model differ: something in it is not deterministic.")
        return outcome, notes

    def exact(self, ask: Ask) -> Results:
        """All results in float64. If they cannot be computed: none, with the reason in exact_problems."""
        if self._random:  # with the same seed, PyTorch draws other numbers in float64
            self.exact_problems[ask] = (
                "Not compared with float64, because the model draws random numbers: call model.eval() first."
            )
            return {}
        if ask not in self._exact_results:
            self._exact_results[ask] = {}
            try:
                self._exact_results[ask] = self.run(self._exact, ask, self.leaves).results
            except Exception as error:
                self.exact_problems[ask] = f"Not compared with float64, which raises {first_line(error)}"
        return self._exact_results[ask]

    @functools.cached_property
    def _exact(self) -> Way:
        model, _ = copy_with(self.model, _clone_in_float64)
        for name, parameter in model.named_parameters():
            if to_float64(parameter.detach()).dtype is not parameter.dtype:
                raise TypeError(f"parameter {name} cannot be copied in float64")

        @contextlib.contextmanager
        def context() -> Iterator[None]:
            with _on_torch_nn(model), torch._C._DisableAutocast(), InFloat64():  # type: ignore[no-untyped-call]
                yield

        return Way(model, context, _clone_in_float64)

    def errors_nearby(self, ask: Ask) -> dict[str, tuple[float, float]]:
        """The largest maximum and RMS errors of torch.nn on inputs and parameters one rounding away."""
        if ask not in self._errors_nearby:
            worst = self._errors_nearby[ask] = {}
            for number in range(_NEARBY):
                change = functools.partial(_nudged, generator=torch.Generator().manual_seed(number))
                try:
                    model, _ = copy_with(self.model, change)
                    way = Way(model, functools.partial(_on_torch_nn, model), change)
                    results = self.run(way, ask, self.leaves).results
                except Exception:  # the model cannot be copied, for example
                    break
                for name, exact in self.exact(ask).items():
                    value = results.get(name)
                    if value is not None and exact is not None and value.numel():
                        errors = accuracy.errors_of(value, exact)
                        if all(map(math.isfinite, errors)):
                            before = worst.get(name, errors)
                            worst[name] = max(before[0], errors[0]), max(before[1], errors[1])
        return self._errors_nearby[ask]

    def arguments(
        self, change: Callable[[torch.Tensor], torch.Tensor], needs: Collection[str]
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, torch.Tensor]]:
        """Copies of the input as args and kwargs, and its tensors by name. ``needs`` is as in :meth:`run`."""
        inputs = {
            name: change(leaf.detach()).requires_grad_(name in needs) for name, leaf in self._given.items()
        }
        tensors = iter(inputs.values())
        x = tree_map_only(torch.Tensor, lambda _: next(tensors), self.x)
        if isinstance(x, Mapping):
            return (), dict(x), inputs
        return (x if isinstance(x, tuple) else (x,)), {}, inputs

    def run(self, way: Way, ask: Ask, needs: Collection[str]) -> Outcome:
        """Run in this way, with gradients of the leaves in ``needs``. Raises what the model raises."""
        try:
            return self._run(way, ask, needs)
        except RuntimeError as error:
            # Checkpointing with use_reentrant=True raises this: it works with backward() only.
            if self._by_backward or "heckpoint" not in str(error) or ".grad()" not in str(error):
                raise
        self._by_backward = True
        return self._run(way, ask, needs)

    def _run(self, way: Way, ask: Ask, needs: Collection[str]) -> Outcome:
        parameters = dict(way.model.named_parameters())
        changed: set[str] = set()
        with left_as_it_was(way.model, self.x):
            args, kwargs, inputs = self.arguments(way.change, needs)
            values = {name: _clone(tensor) for name, tensor in inputs.items()}
            before = _random_states()
            try:
                for name in self._trained:
                    parameters[name].requires_grad_(name in needs)
                with way.context():
                    output = way.model(*args, **kwargs)
                    leaves = {n: t for n, t in (*inputs.items(), *parameters.items()) if n in needs}
                    results, written = self._results(ask, output, leaves)
            finally:
                for name in self._trained:
                    parameters[name].requires_grad_()
                if way.model is self.model:
                    changed = self.put_parameters_back()
            changed |= {name for name, tensor in inputs.items() if not _same(tensor, values[name])}
            self._random |= not all(map(torch.equal, before, _random_states()))
        return Outcome(results, written | changed)

    def put_parameters_back(self) -> set[str]:
        """Restore the values of the model's parameters, and return the names of those that had changed."""
        changed = set()
        for name, parameter in self.model.named_parameters():
            if not _same(parameter, self._values[name]):
                changed.add(name)
                parameter.data.copy_(self._values[name])
        return changed

    def _results(self, ask: Ask, output: Any, needing: dict[str, torch.Tensor]) -> tuple[Results, set[str]]:
        """The output, the loss and the gradients, and the names of tensors that the backward wrote to."""
        outputs = {
            "output" + keystr(path): leaf
            for path, leaf in tree_flatten_with_path(output)[0]
            if isinstance(leaf, torch.Tensor) and _floating(leaf)
        }
        results: Results = {name: _comparable(tensor).clone() for name, tensor in outputs.items()}
        if self.loss_fn is not None and ask not in ("stride-0 gradient", "transposed gradient"):
            loss = self.loss_fn(output)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                what = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
                raise ValueError(f"loss_fn must return a scalar tensor, got {what}")
            results["loss"] = _comparable(loss)
            outputs = {"loss": loss}
        targets = [tensor for tensor in outputs.values() if tensor.requires_grad]
        names = [name for name, leaf in needing.items() if leaf.requires_grad]
        if not targets or not names:
            return results, set()
        leaves = [needing[name] for name in names]
        incoming = [
            torch.ones_like(target) if "loss" in results else _incoming(ask, number, target)
            for number, target in enumerate(targets)
        ]
        values, written = [_clone(tensor) for tensor in incoming], set()
        gradients = self._gradients(targets, leaves, incoming, ask)
        if ask == "backward twice":
            first, kept = gradients, [None if g is None else _clone(g) for g in gradients]
            gradients = self._gradients(targets, leaves, incoming, "loss")
            results |= _named("first gradient of", names, kept)
            if not all(map(_same, first, kept)):
                written.add("the gradients of an earlier backward")
        if ask == "double backward":
            gradients = _gradients_of_norm(gradients, leaves)
        if not all(map(_same, incoming, values)):
            written.add("the incoming gradient")
        if any(not _same(tensor, results[name]) for name, tensor in outputs.items()):
            written.add("the output")
        return results | _named("gradient of", names, gradients), written

    def _gradients(
        self, targets: list[torch.Tensor], leaves: list[torch.Tensor], incoming: list[torch.Tensor], ask: Ask
    ) -> Sequence[Value]:
        keep, create = ask in ("backward twice", "double backward"), ask == "double backward"
        if not self._by_backward:  # backward() would call hooks of the parameters, an optimizer's for example
            return torch.autograd.grad(targets, leaves, incoming, keep, create, allow_unused=True)
        torch.autograd.backward(targets, incoming, keep, create)
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return gradients


def _random_states() -> list[torch.Tensor]:
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_gpus]


def _named(what: str, names: list[str], gradients: Sequence[Value]) -> Results:
    return {
        f"{what} {shown_name(name)}": None if gradient is None else _comparable(gradient)
        for name, gradient in zip(names, gradients, strict=True)
    }


def _gradients_of_norm(gradients: Sequence[Value], leaves: list[torch.Tensor]) -> Sequence[Value]:
    """The gradients of the norm of all gradients together; 0 for leaves on which it does not depend."""
    norms = []
    for g in gradients:
        if g is not None and g.requires_grad:
            # Squares of 16-bit numbers overflow. At 0, vector_norm has a gradient and a square root has none.
            wide = _dense(g).to(torch.promote_types(g.dtype, torch.float32))
            norms.append(torch.linalg.vector_norm(wide).to(leaves[0].device))
    if not norms:
        return [torch.zeros_like(leaf) for leaf in leaves]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return torch.autograd.grad(norm, leaves, allow_unused=True, materialize_grads=True)


def _incoming(ask: Ask, number: int, target: torch.Tensor) -> torch.Tensor:
    """The incoming gradient: the same numbers on every device and in every dtype."""
    with _disable_current_modes():
        if ask == "stride-0 gradient":
            return torch.ones((), dtype=target.dtype, device=target.device).expand(target.shape)
        generator = torch.Generator().manual_seed(number)
        # Rounded to bfloat16, so that no dtype rounds them.
        random = torch.randn(target.shape, generator=generator, device="cpu").bfloat16().to(target)
        if ask == "transposed gradient" and target.dim() > 1:
            return random.transpose(-1, -2).contiguous().transpose(-1, -2)
        return random


class _LinearReLU(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.relu(F.linear(input, self.weight, self.bias))


# A lazy layer keeps its class, as its first call changes that.
_PLAIN = TORCHS | {nn.LinearReLU: _LinearReLU, nn.LazyLinear: nn.LazyLinear}


@contextlib.contextmanager
def _on_torch_nn(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every layer of this package is the torch.nn layer that it replaces, and nothing is compiled."""
    changed = []
    try:
        for module in model.modules():
            kind = type(module)
            plain = kind.__dict__.get("_came_from") or _PLAIN.get(kind)
            if plain is not None:
                changed.append((module, kind))
                object.__setattr__(module, "__class__", plain)
        with backend_choice.backend("torch"), uncompiled():
            yield
    finally:
        for module, kind in changed:
            object.__setattr__(module, "__class__", kind)


def _floating(tensor: torch.Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_nested


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def _clone_in_float64(tensor: torch.Tensor) -> torch.Tensor:
    return _clone(to_float64(tensor))


def _nudged(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return accuracy.nudged(tensor, generator) if _floating(tensor) else _clone(tensor)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    tensor = _dense(tensor.detach())
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _same(one: Value, other: Value) -> bool:
    """True if both have the same values. NaN is the same as NaN."""
    if one is None or other is None:
        return one is other
    one, other = _comparable(one), _comparable(other)
    return one.shape == other.shape and torch.allclose(one, other, 0, 0, equal_nan=True)
