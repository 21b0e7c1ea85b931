"""Which backend the caller chose in this thread, and whether ``explain()`` records the calls."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch

Backend = Literal["auto", "triton", "torch"]
Weights = Sequence[torch.Tensor]  # of a chain, one for each layer
Biases = Sequence[torch.Tensor | None]

_BACKENDS = ("auto", "triton", "torch")
MEASURING = "measuring"  # only tune chooses this: the kernels run even where they may not be faster


class Run(NamedTuple):
    """One call of a chain of layers, as ``explain()`` records it."""

    x: torch.Tensor
    weights: Weights
    biases: Biases
    final_relu: bool
    reason: str | None  # why it does not run on the kernels, or None if it does
    basis: str | None  # why it runs on the kernels, or None if it does not


class _Chosen(threading.local):
    """The choice in this thread. torch.compile cannot trace a ContextVar in torch 2.11."""

    def __init__(self) -> None:  # runs in every thread; torch 2.11 would trace defaults in the class
        self.backend: str = "auto"
        self.note: Callable[[Run], None] | None = None  # set by explain(): called before each chain runs
        self.quiet = True  # no backend is forced and nothing records, so that no reason in words is needed


chosen = _Chosen()


def _choose(backend: str, note: Callable[[Run], None] | None) -> None:
    chosen.backend, chosen.note = backend, note
    chosen.quiet = backend in ("auto", "torch") and note is None


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose what runs inside the ``with`` block, in this thread.

    - ``"auto"``, the default: the Triton kernels where they can run and are faster, by measurement or, if
      nothing was measured, by a rule; elsewhere PyTorch's operators;
    - ``"triton"``: the kernels throughout, or a RuntimeError with the reason why they cannot run;
    - ``"torch"``: PyTorch's operators.

    The backward of a layer uses the same implementation as its forward. Activation checkpointing runs the
    forward again during the backward, on a GPU in another thread: pass it this context as ``context_fn``.
    Under ``torch.compile`` the kernels are operators in the compiler's graph, and the compiler fuses
    PyTorch's operators itself. Raises ValueError for any other name.

    >>> with fusedmlp.backend("torch"):
    ...     y = model(x)
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {name!r}")
    with _using(name, chosen.note):
        yield


@contextlib.contextmanager
def _using(name: str, note: Callable[[Run], None] | None) -> Iterator[None]:
    before = chosen.backend, chosen.note
    _choose(name, note)
    try:
        yield
    finally:
        _choose(*before)


def measuring() -> contextlib.AbstractContextManager[None]:
    """Inside, in this thread, chains run as under "auto" where the kernels are known to be faster."""
    return _using(MEASURING, chosen.note)


def recorded(note: Callable[[Run], None] | None) -> contextlib.AbstractContextManager[None]:
    """Inside, in this thread, ``note`` (None: nothing) is called right before every chain of layers runs."""
    return _using(chosen.backend, note)


def forced() -> bool:
    """True under ``backend("triton")``."""
    return chosen.backend == "triton"


def insists() -> bool:
    """True if a failing kernel must raise, instead of PyTorch's operators running in its place."""
    return chosen.backend in ("triton", MEASURING)


def quiet() -> bool:
    """True if no backend is forced and nothing records, so that no reason in words is needed."""
    return chosen.quiet
