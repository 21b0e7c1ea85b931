"""``explain(model, x)``: what ran for each stretch of layers, why, and how much memory traffic it made."""

import collections
import contextlib
import dataclasses
import itertools
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from fusedmlp import nn
from fusedmlp.convert.pending_relu import LinearBeforeReLU
from fusedmlp.dispatch import backend_choice, predicate
from fusedmlp.dispatch.backend_choice import Run
from fusedmlp.inspection.traffic import Figures, Launch, launched, measured, needs_of, unfused, with_onednn
from fusedmlp.torch_tools.restore import left_as_it_was

_KERNELS, _OPERATORS, _COMPILER = "Triton kernels", "PyTorch's operators", "torch.compile's own code"
_WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Pass:
    """The forward or the backward of a stretch: on what it ran, by which launches, how much they move.

    backend is "Triton kernels", "PyTorch's operators" or "torch.compile's own code"; launches are names of
    kernels or operators, in order; bytes count each tensor that a launch reads or writes once; of a
    compiler's code both are None. unfused: the same for PyTorch's eager operators, ``linear`` and ``relu``
    and their gradients.
    """

    backend: str
    launches: tuple[str, ...] | None
    bytes: int | None
    unfused_launches: tuple[str, ...]
    unfused_bytes: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One stretch of layers that ran as one operation.

    layers: their names in the model; rows (M) and widths (K of the first layer, then each layer's N) of what
    went through; reason: why not on the kernels, or None if on them; basis: why on the kernels, or None if
    not; backward: None if nothing in the stretch requires grad or grad mode was off; measured: of a stretch
    on the kernels, what the choice of each product rests on, if it was measured on this device.
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
    """What :func:`explain` found: ``str()`` of it is a table for a terminal, ``to_dict()`` is plain data.

    rows in the order in which they ran; layers_not_fused: names of the layers that are plain
    ``torch.nn.Linear`` and not in a fused Sequential; layers_not_run: of fused layers that this call did not
    run; compiled: whether something in the model is ``torch.compile``'s.
    """

    rows: tuple[Row, ...]
    layers_not_fused: tuple[str, ...]
    layers_not_run: tuple[str, ...]
    compiled: bool

    def to_dict(self) -> dict[str, Any]:
        """Dicts, tuples, strings and numbers, fit for ``json.dumps``."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        parts = [_paragraph(self._headline())]
        if self.rows:
            parts += [_HEAD + "\n" + "\n\n".join(_lines_of(alike) for alike in _alike(self.rows))]
        return "\n\n".join(parts + [_paragraph(note) for note in self._notes()])

    def _headline(self) -> str:
        if not self.rows:
            return "No fused layer ran."
        layers = _count(sum(len(row.layers) for row in self.rows), "layer")
        where = ", ".join(dict.fromkeys(row.device for row in self.rows))
        what = f"{layers} in {_count(len(self.rows), 'stretch', 'es')} on {where}"
        passes = [p for row in self.rows for p in (row.forward, row.backward) if p is not None]
        known = [p for p in passes if p.launches is not None]
        if not known:
            return f"{what}: {_COMPILER}."
        launches, moved = (sum(len(p.launches or ()) for p in known), sum(p.bytes or 0 for p in known))
        unfused_launches = sum(len(p.unfused_launches) for p in known)
        unfused = sum(p.unfused_bytes for p in known)
        return (
            f"{what}: "
            f"{_count(launches, 'launch', 'es')} (unfused {unfused_launches}), "
            f"{_size(moved)} moved (unfused {_size(unfused)}, {_saved(moved, unfused)} saved)"
            f"{', what torch.compile makes itself not counted' if len(known) < len(passes) else ''}."
        )

    def _notes(self) -> Iterator[str]:
        if self.layers_not_fused:
            count = _count(len(self.layers_not_fused), "plain torch.nn.Linear layer")
            yield f"{count}, which fusedmlp.fuse(model) changes: {_some(self.layers_not_fused)}."
        if self.layers_not_run:
            count = _count(len(self.layers_not_run), "fused layer")
            yield f"{count} did not run in this call: {_some(self.layers_not_run)}."


def explain(model: torch.nn.Module, /, *args: Any, **kwargs: Any) -> Explanation:
    """Run ``model(*args, **kwargs)`` once, and tell what ran for each stretch of fused layers, and why.

    Under the settings and the grad mode of the caller; a backward is told of, not run, and is the one that
    ``.backward()`` of a contiguous gradient would run. Attributes and the containers among them, one level
    deep, buffers, gradients, training mode and the global random states are put back as they were (lazy
    modules become what they shall be), and what the model raises comes through. Raises TypeError unless model
    is a ``torch.nn.Module``.

    What is compiled runs as it was before, uncompiled, for ``torch.compile`` leaves nothing to see: the same
    rule decides there, and what is not on the kernels is the compiler's own code.

    ``bytes`` count what each launch reads and writes, every tensor once, in the dtype of x. Unfused, for a
    layer of K to N features and M rows:

    - ``linear`` M*K + N*K + N (the bias) + M*N; ``relu`` 2*M*N;
    - ``threshold_backward`` 3*M*N; ``sum`` (the bias gradient) M*N + N;
    - ``mm``, twice: the gradients of input and weight, M*N + N*K + M*K each.

    On the kernels ``linear_forward`` is linear without a relu; ``grad_input`` is mm that reads the mask, M*K
    more, and writes the bias gradient of the layer below; ``grad_weights`` is the other mm of all layers and,
    without a final ReLU, the last layer's sum; ``relu_backward`` is threshold_backward and sum of a final
    ReLU. Of narrow layers ``narrow_forward`` is all linear_forward in one, and ``narrow_backward`` all
    grad_input and relu_backward. ``add_up`` adds the partial sums that the others wrote, in float32. ``linear
    by oneDNN`` is linear by PyTorch's other float32 product, taken without a gradient where it is faster: on
    AMD's CPUs from Zen 5 on.

    >>> print(fusedmlp.explain(fusedmlp.MLP(784, [256, 128], 10), torch.randn(128, 784)))
    3 layers in 1 stretch on cpu: 15 launches (unfused 15), 5.07 MB moved ...
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"explain takes a torch.nn.Module, not {type(model).__name__}")
    rows = _Rows(model)
    with left_as_it_was(model, (args, kwargs)), _uncompiled(), backend_choice.recorded(rows.note):
        model(*args, **kwargs)
    unseen = {
        _shown(name) or "(the model)": module
        for name, module in model.named_modules()
        if _shown(name) not in rows.ran and "_orig_mod" not in module._modules
    }
    return Explanation(
        tuple(rows.rows),
        tuple(name for name, module in unseen.items() if type(module) is torch.nn.Linear),
        tuple(
            name
            for name, module in unseen.items()
            if nn.Linear in type(module).__mro__ and "weight" in module._parameters  # else it has no name
        ),
        bool(rows.compiled),
    )


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Inside, what torch.compile has compiled runs as the code that it was."""
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it is large
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _shown(name: str) -> str:
    """A module's name without what torch.compile puts in between."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


class _Rows:
    """Makes a Row of each Run as it comes: the grad mode is that of the layers, and no tensor is kept."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.rows: list[Row] = []
        self.ran: set[str] = set()
        self.names: dict[int, list[str]] = collections.defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names[id(parameter)].append(_shown(re.sub(r"(^|\.)(weight|bias)$", "", name)))
        self.compiled: set[str] = set()  # names of modules that are, or are in one that is
        self.waiting: set[str] = set()  # of Linears whose ReLU is called by somebody else's forward
        within: list[str] = []
        for name, module in model.named_modules():
            if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
                within.append(f"{name}." if name else "")
            if any(name.startswith(start) or f"{name}." == start for start in within):
                self.compiled.add(_shown(name))
            if isinstance(module, LinearBeforeReLU):
                self.waiting.add(_shown(name))

    def note(self, run: Run) -> None:
        layers = tuple(map(self.name, run.weights, run.biases))
        compiled = not self.compiled.isdisjoint(("" if name == "(the model)" else name) for name in layers)
        if compiled:
            run = predicate.as_compiled(run)
        if compiled and not self.waiting.isdisjoint(layers):
            if backend_choice.forced():
                run = run._replace(final_relu=False)
            else:
                sees = "torch.compile sees the ReLU in the forward that calls this layer"
                run = run._replace(reason=sees, basis=None)
        self.rows.append(_row(run, layers, compiled))

    def name(self, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
        # A shared weight has several names. A parametrized one has none, and its bias tells the layer.
        of_weight, of_bias = (self.names.get(id(tensor), []) for tensor in (weight, bias))
        names = [name for name in of_weight if name in of_bias] or of_weight or of_bias
        self.ran.update(names)
        return (names[0] or "(the model)") if names else "(unnamed)"


def _row(run: Run, layers: tuple[str, ...], compiled: bool) -> Row:
    # Before the layers have run, so without an error where shapes do not fit: that is theirs to raise.
    # What autocast casts is cast before, here and unfused alike, and does not count.
    kind = run.x.device.type
    dtype = predicate.autocast_dtype(kind) if torch.amp.is_autocast_available(kind) else None
    run = run._replace(
        x=predicate.cast(run.x, dtype),
        weights=[predicate.cast(weight, dtype) for weight in run.weights],
        biases=[None if bias is None else predicate.cast(bias, dtype) for bias in run.biases],
    )
    shapes = [(weight.shape[-1:].numel(), weight.shape[:-1].numel()) for weight in run.weights]
    K = shapes[0][0]
    M = run.x.numel() // K if K else run.x.shape[:-1].numel()
    needs = needs_of(run)
    launches = unfused(M, shapes, run, needs)
    eager = [_names_and_bytes(one) for one in launches]
    backend: str
    here: Sequence[tuple[Any, Any]]
    if run.reason is None:
        backend, here = _KERNELS, [_names_and_bytes(one) for one in launched(run, needs)]
    elif compiled:
        backend, here = _COMPILER, [(None, None)] * 2
    else:
        backend, here = _OPERATORS, [_names_and_bytes(with_onednn(launches[0], run)), eager[1]]
    forward, backward = (Pass(backend, *one, *other) for one, other in zip(here, eager, strict=True))
    name, widths = str(run.x.dtype).removeprefix("torch."), (K, *(N for _, N in shapes))
    return Row(
        layers, M, widths, run.final_relu, name, str(run.x.device), run.reason, run.basis,
        forward, backward if needs else None, measured(run, M, shapes, needs),
    )  # fmt: skip


def _names_and_bytes(launches: Sequence[Launch]) -> tuple[tuple[str, ...], int]:
    return tuple(name for name, _ in launches), sum(moved for _, moved in launches)


_HEAD = (
    f"{'':40}{'launches':>14}{'bytes moved':>19}\n"
    f"{'':40}{'here':>6}{'unfused':>8}{'here':>10}{'unfused':>9}{'saved':>7}"
)


def _alike(rows: Iterable[Row]) -> Iterable[list[Row]]:
    """Rows that differ in the numbers in their layers' names only, as a transformer's do, are one."""
    groups: dict[Any, list[Row]] = collections.defaultdict(list)
    for row in rows:
        pattern = re.sub(r"\d+", "*", _joined(row.layers))
        groups[pattern, dataclasses.replace(row, layers=())].append(row)
    return groups.values()


def _lines_of(rows: list[Row]) -> str:
    row, times = rows[0], len(rows)
    names = [_joined(row.layers) for row in rows]
    many = f"  x {times}, all together" if times > 1 else ""
    title = "; ".join(names) + many
    if times > 1 and len(title) > _WIDTH:
        split = [re.split(r"(\d+)", name) for name in names]
        same = [part[0] if len(set(part)) == 1 else "*" for part in zip(*split, strict=True)]
        title = "".join(same) + many
    relu = ("no ReLU", "ReLU") if len(row.layers) == 1 else ("ReLU between", "ReLU after each")
    shape = " -> ".join(map(str, row.widths))
    details = f"{_count(row.rows, 'row')}, {shape}, {relu[row.final_relu]}, {row.dtype} on {row.device}"
    lines = [_paragraph(title), _paragraph(details)]
    for what, one in (("forward", row.forward), ("backward", row.backward)):
        if one is None:
            lines.append(_paragraph("none: nothing requires grad, or grad mode is off", what))
            continue
        if one.launches is None or one.bytes is None:
            lines.append(f"  {what:<10}{one.backend}")
            continue
        here, unfused = times * len(one.launches), times * len(one.unfused_launches)
        moved = times * one.bytes, times * one.unfused_bytes
        lines.append(
            f"  {what:<10}{one.backend:<28}{here:>6}{unfused:>8}"
            f"{_size(moved[0]):>10}{_size(moved[1]):>9}{_saved(*moved):>7}"
        )
        counts = collections.Counter(times * one.launches)
        lines.append(_paragraph(", ".join(f"{n} {name}" for name, n in counts.items()), " "))
    lines.append(_paragraph(row.reason or row.basis or "", "why"))
    for layer, of_layer in itertools.groupby(row.measured, lambda figures: figures.layer):
        figures = ", ".join(f"{f.operation} {f.us:.4g} us (PyTorch {f.torch_us:.4g})" for f in of_layer)
        lines.append(_paragraph(f"layer {layer}: {figures}", "measured"))
    return "\n".join(lines)


def _paragraph(text: str, label: str = "") -> str:
    start = f"  {label:<10}" if label else ""
    return textwrap.fill(
        text, _WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
    )


def _joined(layers: Sequence[str]) -> str:
    """``0, 2, 4`` or, of one module's members, ``encoder.mlp: 0, 2, 4``."""
    modules = {layer.rpartition(".")[0] for layer in layers}
    if len(layers) == 1 or len(modules) > 1 or modules == {""}:
        return ", ".join(layers)
    return f"{modules.pop()}: " + ", ".join(layer.rpartition(".")[2] for layer in layers)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" and so on" if len(names) > 3 else "")


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def _size(count: int) -> str:
    """Three digits and a unit: powers of 1000."""
    number, units = float(count), iter(("B", "kB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    while number >= 999.5:
        number, unit = number / 1000, next(units)
    return f"{number:.3g} {unit}"


def _saved(moved: int, unfused: int) -> str:
    return f"{round(100 * (1 - moved / unfused))}%" if unfused else "0%"
