"""``explain(model, x)``: report what ran for each chain of layers, why, and how many bytes it moved."""

import collections
import contextlib
import dataclasses
import itertools
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch

from fusedmlp import nn
from fusedmlp.convert.pending_relu import LinearBeforeReLU
from fusedmlp.dispatch import backend_choice, predicate
from fusedmlp.dispatch.backend_choice import Run
from fusedmlp.inspection.traffic import Chain, Figures, Launch
from fusedmlp.torch_tools import text
from fusedmlp.torch_tools.model_state import left_as_it_was

_KERNELS, _OPERATORS, _COMPILER = "Triton kernels", "PyTorch's operators", "torch.compile's own code"


@dataclasses.dataclass(frozen=True)
class Pass:
    """The forward or the backward of a chain: its implementation, its launches, and the bytes they move.

    backend is "Triton kernels", "PyTorch's operators" or "torch.compile's own code". launches are the names
    of kernels or operators, in order. bytes count each tensor that a launch reads or writes once. Both are
    None for compiled code. The unfused fields are the same for PyTorch's eager operators ``linear``, ``relu``
    and their gradients.
    """

    backend: str
    launches: tuple[str, ...] | None
    bytes: int | None
    unfused_launches: tuple[str, ...]
    unfused_bytes: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One chain of layers that ran as one operation.

    layers are their names in the model; rows is M, the rows of the input; widths are K of the first layer and
    N of each. reason says why the chain did not run on the kernels, and is None if it did. basis says why it
    did, and is None if it did not. backward is None if nothing in the chain requires grad or grad mode was
    off. measured has the times by which a kernel was chosen for each product, if this device has any.
    """

    layers: tuple[str, ...]
    rows: int
    widths: tuple[int, ...]
    final_relu: bool
    dtype: str
    device: str
    reason: str | None
    basis: str | None
    forward: Pass
    backward: Pass | None
    measured: tuple[Figures, ...]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The result of :func:`explain`: ``str()`` makes a table for a terminal, ``to_dict()`` plain data.

    rows are in the order in which they ran. layers_not_fused names the plain ``torch.nn.Linear`` layers
    outside a fused Sequential, layers_not_run the fused layers that this call did not run. compiled says
    whether ``torch.compile`` compiled anything in the model.
    """

    rows: tuple[Row, ...]
    layers_not_fused: tuple[str, ...]
    layers_not_run: tuple[str, ...]
    compiled: bool

    def to_dict(self) -> dict[str, Any]:
        """Return dicts, tuples, strings and numbers, fit for ``json.dumps``."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        parts = [text.paragraph(self._headline())]
        if self.rows:
            alike: dict[Any, list[Row]] = collections.defaultdict(list)
            for row in self.rows:  # the equal blocks of a transformer, for example, are shown as one
                alike[text.pattern(_joined(row.layers)), dataclasses.replace(row, layers=())].append(row)
            parts.append(_HEAD + "\n" + "\n\n".join(map(_lines_of, alike.values())))
        if self.layers_not_fused:
            count = text.count(len(self.layers_not_fused), "plain torch.nn.Linear layer")
            some = _some(self.layers_not_fused)
            parts.append(text.paragraph(f"{count}, which fusedmlp.fuse(model) changes: {some}."))
        if self.layers_not_run:
            count = text.count(len(self.layers_not_run), "fused layer")
            parts.append(text.paragraph(f"{count} did not run in this call: {_some(self.layers_not_run)}."))
        return "\n\n".join(parts)

    def _headline(self) -> str:
        if not self.rows:
            return "No fused layer ran."
        layers = text.count(sum(len(row.layers) for row in self.rows), "layer")
        where = ", ".join(dict.fromkeys(row.device for row in self.rows))
        what = f"{layers} in {text.count(len(self.rows), 'chain')} on {where}"
        passes = [p for row in self.rows for p in (row.forward, row.backward) if p is not None]
        known = [p for p in passes if p.launches is not None]
        if not known:
            return f"{what}: {_COMPILER}."
        launches, moved = (sum(len(p.launches or ()) for p in known), sum(p.bytes or 0 for p in known))
        unfused_launches = sum(len(p.unfused_launches) for p in known)
        unfused = sum(p.unfused_bytes for p in known)
        return (
            f"{what}: {text.count(launches, 'launch', 'launches')} (unfused {unfused_launches}), "
            f"{_size(moved)} moved (unfused {_size(unfused)}, {_saved(moved, unfused)} saved)"
            f"{', not counting the code that torch.compile makes' if len(known) < len(passes) else ''}."
        )


def explain(model: torch.nn.Module, /, *args: Any, **kwargs: Any) -> Explanation:
    """Run ``model(*args, **kwargs)`` once and report what ran for each chain of fused layers, and why.

    The forward runs under the caller's settings and grad mode. The backward is not run: it is described for
    the contiguous gradient that ``.backward()`` of a loss passes in. The model is left as it was: attributes
    (and containers among them, one level deep), buffers, gradients, training mode and the global random
    states; only lazy modules are initialized. Raises TypeError unless model is a ``torch.nn.Module``, and
    whatever the model raises.

    A compiled model runs uncompiled here, since compiled code reports nothing. The same rule decides whether
    its layers use the kernels; all else in it is shown as "torch.compile's own code".

    ``bytes`` count each tensor that a launch reads or writes once, in the dtype of x. For a layer of K to N
    features and M rows, PyTorch's operators move this many values:

    - ``linear`` M*K + N*K + N (the bias) + M*N; ``relu`` 2*M*N;
    - ``threshold_backward`` 3*M*N; ``sum`` (the bias gradient) M*N + N;
    - ``mm`` M*N + N*K + M*K, once for the gradient of the input and once for that of the weight.

    On the kernels, ``linear_forward`` moves as many values as linear, and applies the ReLU too.
    ``grad_input`` is an mm that also reads the mask (M*K) and writes the bias gradient of the layer below.
    ``grad_weights`` computes the weight gradients of all layers, and the bias gradient of a last layer
    without ReLU.
    ``relu_backward`` is threshold_backward and sum of a final ReLU. For narrow layers, ``narrow_forward`` is
    every linear_forward in one launch, and ``narrow_backward`` every grad_input and relu_backward. ``add_up``
    adds float32 partial sums of the other kernels. ``linear by oneDNN`` is PyTorch's other float32 product,
    which runs without a gradient on AMD CPUs from Zen 5 on, where it is faster.

    >>> print(fusedmlp.explain(fusedmlp.MLP(784, [256, 128], 10), torch.randn(128, 784)))
    3 layers in 1 chain on cpu: 15 launches (unfused 15), 5.07 MB moved ...
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"explain takes a torch.nn.Module, not {type(model).__name__}")
    recorder = _Recorder(model)
    with left_as_it_was(model, (args, kwargs)), uncompiled(), backend_choice.recorded(recorder.record):
        model(*args, **kwargs)
    unseen = {
        shown_name(name): module
        for name, module in model.named_modules()
        if shown_name(name) not in recorder.ran and "_orig_mod" not in module._modules
    }
    return Explanation(
        tuple(recorder.rows),
        tuple(name for name, module in unseen.items() if type(module) is torch.nn.Linear),
        tuple(
            name
            for name, module in unseen.items()
            # A parametrized weight is no parameter of the layer, so the layer has run under no name.
            if nn.Linear in type(module).__mro__ and "weight" in module._parameters
        ),
        bool(recorder.compiled),
    )


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Inside, compiled modules and functions run as the Python code that they were compiled from."""
    compiles = "torch._dynamo" in sys.modules  # otherwise nothing is compiled, and importing it takes seconds
    return torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext()


def shown_name(name: str) -> str:
    """A module's or parameter's name without the ``_orig_mod`` that torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod") or "(the model)"


class _Recorder:
    """Makes a Row of each chain right before it runs, in the grad mode of the layers. It keeps no tensor."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.rows: list[Row] = []
        self.ran: set[str] = set()  # names of layers
        self.names: dict[int, list[str]] = collections.defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names[id(parameter)].append(shown_name(re.sub(r"(^|\.)(weight|bias)$", "", name)))
        self.compiled: set[str] = set()  # names of modules that are compiled or inside a compiled one
        self.before_relu: set[str] = set()  # names of fused layers whose ReLU the user's forward calls
        for name, module in model.named_modules():
            if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
                self.compiled.update(shown_name(inside) for inside, _ in module.named_modules(prefix=name))
            if isinstance(module, LinearBeforeReLU):
                self.before_relu.add(shown_name(name))

    def record(self, run: Run) -> None:
        layers = tuple(map(self._name, run.weights, run.biases))
        compiled = not self.compiled.isdisjoint(layers)
        if compiled:
            run = predicate.as_compiled(run)
            if not self.before_relu.isdisjoint(layers):
                if backend_choice.forced():
                    run = run._replace(final_relu=False)
                else:
                    sees = "torch.compile sees the ReLU in the forward that calls this layer."
                    run = run._replace(reason=sees, basis=None)
        self.rows.append(_row(run, layers, compiled))

    def _name(self, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
        # A shared weight has several names, and a parametrized one has none: the bias tells the layer.
        of_weight, of_bias = (self.names.get(id(tensor), []) for tensor in (weight, bias))
        names = [name for name in of_weight if name in of_bias] or of_weight or of_bias
        self.ran.update(names)
        return names[0] if names else "(unnamed)"


def _row(run: Run, layers: tuple[str, ...], compiled: bool) -> Row:
    chain = Chain(run)
    unfused = chain.unfused()
    here: tuple[Any, Any]
    if run.reason is None:
        backend, here = _KERNELS, chain.launched()
    elif compiled:
        backend, here = _COMPILER, (None, None)
    else:
        backend, here = _OPERATORS, (chain.with_onednn(unfused[0]), unfused[1])
    forward, backward = (
        Pass(backend, *_names_and_bytes(ours), *_names_and_bytes(torchs))
        for ours, torchs in zip(here, unfused, strict=True)
    )
    dtype, widths = str(chain.run.x.dtype), (chain.shapes[0][0], *(N for _, N in chain.shapes))
    return Row(
        layers, chain.rows, widths, run.final_relu, dtype.removeprefix("torch."), str(run.x.device),
        run.reason, run.basis, forward, backward if chain.needs else None, chain.measured(),
    )  # fmt: skip


def _names_and_bytes(launches: list[Launch] | None) -> tuple[Any, Any]:
    if launches is None:
        return None, None
    return tuple(name for name, _ in launches), sum(moved for _, moved in launches)


_HEAD = (
    f"{'':40}{'launches':>14}{'bytes moved':>19}\n"
    f"{'':40}{'here':>6}{'unfused':>8}{'here':>10}{'unfused':>9}{'saved':>7}"
)


def _lines_of(rows: list[Row]) -> str:
    """The table's lines for rows that differ only in numbers in the names of their layers."""
    row, times = rows[0], len(rows)
    names = [_joined(row.layers) for row in rows]
    many = f"  x {times}, all together" if times > 1 else ""
    title = "; ".join(names) + many
    if times > 1 and len(title) > text.WIDTH:
        title = text.common_name(names) + many
    relu = ("no ReLU", "ReLU") if len(row.layers) == 1 else ("ReLU between", "ReLU after each")
    shape = " -> ".join(map(str, row.widths))
    details = f"{text.count(row.rows, 'row')}, {shape}, {relu[row.final_relu]}, {row.dtype} on {row.device}"
    lines = [text.paragraph(title), text.paragraph(details)]
    for what, one in (("forward", row.forward), ("backward", row.backward)):
        if one is None:
            lines.append(_labelled(what, "none: nothing requires grad, or grad mode is off"))
        elif one.launches is None or one.bytes is None:
            lines.append(_labelled(what, one.backend))
        else:
            here, unfused = times * len(one.launches), times * len(one.unfused_launches)
            moved = times * one.bytes, times * one.unfused_bytes
            lines.append(
                f"  {what:<10}{one.backend:<28}{here:>6}{unfused:>8}"
                f"{_size(moved[0]):>10}{_size(moved[1]):>9}{_saved(*moved):>7}"
            )
            counts = collections.Counter(times * one.launches)
            lines.append(_labelled("", ", ".join(f"{n} {name}" for name, n in counts.items())))
    lines.append(_labelled("why", row.reason or row.basis or ""))
    for layer, of_layer in itertools.groupby(row.measured, lambda figures: figures.layer):
        figures = ", ".join(f"{f.operation} {f.us:.4g} us (PyTorch {f.torch_us:.4g})" for f in of_layer)
        lines.append(_labelled("measured", f"layer {layer}: {figures}"))
    return "\n".join(lines)


def _labelled(label: str, words: str) -> str:
    return text.paragraph(words, f"  {label:<10}")


def _joined(layers: Sequence[str]) -> str:
    """``0, 2, 4`` or, if one module holds them all, ``encoder.mlp: 0, 2, 4``."""
    modules = {layer.rpartition(".")[0] for layer in layers}
    if len(layers) == 1 or len(modules) > 1 or modules == {""}:
        return ", ".join(layers)
    return f"{modules.pop()}: " + ", ".join(layer.rpartition(".")[2] for layer in layers)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" and so on" if len(names) > 3 else "")


def _size(count: int) -> str:
    """Three digits and a unit, in powers of 1000."""
    number, units = float(count), iter(("B", "kB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    while number >= 999.5:
        number, unit = number / 1000, next(units)
    return f"{number:.3g} {unit}"


def _saved(moved: int, unfused: int) -> str:
    return f"{round(100 * (1 - moved / unfused))}%" if unfused else "0%"
