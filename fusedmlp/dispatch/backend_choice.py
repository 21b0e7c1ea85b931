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
MEASURING = "measuring"  # tune's own: the kernels run even where they may not be faster


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
        self.note: Callable[[Run], None] | None = None  # explain()'s: called before each chain runs
        self.quiet = True  # no backend is forced and nothing records, so that nobody needs a reason


chosen = _Chosen()


def _choose(backend: str, note: Callable[[Run], None] | None) -> None:
    chosen.backend, chosen.note = backend, note
    chosen.quiet = backend in ("auto", "torch") and note is None


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose what runs inside the ``with`` block, in this thread.

    - ``"auto"``, the default: the Triton kernels where they can run and were measured to be faster, or where
      nothing was measured, where they should be faster; else PyTorch's operators;
    - ``"triton"``: the kernels throughout, or a RuntimeError with the reason why they cannot run;
    - ``"torch"``: PyTorch's operators.

    The backward of a layer runs on what its forward ran on. Activation checkpointing runs the forward again
    during the backward, on a GPU in another thread: give it this context by its ``context_fn``. Under
    ``torch.compile`` the kernels are operators in the compiler's graph, and the compiler fuses PyTorch's
    operators itself. Raises ValueError for any other name.

    >>> with fusedmlp.backend("torch"):
    ...     y = model(x)
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {name!r}")
    with _using(name):
        yield


@contextlib.contextmanager
def _using(name: str) -> Iterator[None]:
    before = chosen.backend
    _choose(name, chosen.note)
    try:
        yield
    finally:
        _choose(before, chosen.note)


def measuring() -> contextlib.AbstractContextManager[None]:
    """Inside, in this thread, chains run as under "auto" where the kernels are known to be faster."""
    return _using(MEASURING)


@contextlib.contextmanager
def recorded(note: Callable[[Run], None]) -> Iterator[None]:
    """Inside, in this thread, ``note`` is called for every chain of layers right before it runs."""
    before = chosen.note
    _choose(chosen.backend, note)
    try:
        yield
    finally:
        _choose(chosen.backend, before)


def forced() -> bool:
    """True under ``backend("triton")``."""
    return chosen.backend == "triton"


def insists() -> bool:
    """True if a kernel that fails must raise, so that nothing else runs in its place."""
    return chosen.backend in ("triton", MEASURING)


def quiet() -> bool:
    """True if no backend is forced and nothing records, so that nobody needs a reason in words."""
    return chosen.quiet
