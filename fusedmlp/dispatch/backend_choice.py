"""What the caller has chosen: which implementation is to run in this thread, and who is told of it."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch

Backend = Literal["auto", "triton", "torch"]

_BACKENDS = ("auto", "triton", "torch")
MEASURING = "measuring"  # the kernels' path, each product of it where it was measured to be faster


class Run(NamedTuple):
    """A stretch of layers as it ran: what explain() is told."""

    x: torch.Tensor
    weights: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor | None]
    final_relu: bool
    reason: str | None  # why not on the kernels
    basis: str | None  # why on the kernels


class _Chosen(threading.local):
    """What holds in this thread. torch.compile cannot trace a ContextVar in torch 2.11."""

    def __init__(self) -> None:  # in every thread; with defaults in the class torch 2.11 would trace those
        self.backend: str = "auto"
        self.note: Callable[[Run], None] | None = None  # who is told of every stretch
        self.quiet = True  # neither forced nor recorded: what a call on the CPU looks at


chosen = _Chosen()


def _choose(backend: str, note: Callable[[Run], None] | None) -> None:
    chosen.backend, chosen.note = backend, note
    chosen.quiet = backend in ("auto", "torch") and note is None


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose what runs inside the ``with`` block, in this thread.

    - ``"auto"``, the default: the Triton kernels where they can run and were measured to win, and where
      nothing was measured, where they should; else PyTorch's operators;
    - ``"triton"``: the kernels throughout, or a RuntimeError with the reason why they cannot run;
    - ``"torch"``: PyTorch's operators.

    The backward of a layer runs on what its forward ran on. Activation checkpointing runs the forward again
    during the backward, on a GPU in another thread: give it this context by its ``context_fn``. Under
    ``torch.compile`` the kernels are operators in the compiler's graph, and PyTorch's operators are the
    compiler's to fuse. Raises ValueError for any other name.

    >>> with fusedmlp.backend("torch"):
    ...     y = model(x)
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {name!r}")
    before = chosen.backend
    _choose(name, chosen.note)
    try:
        yield
    finally:
        _choose(before, chosen.note)


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Inside, in this thread, the kernels' path is taken as "auto" takes it, worth it or not."""
    before = chosen.backend
    _choose(MEASURING, chosen.note)
    try:
        yield
    finally:
        _choose(before, chosen.note)


@contextlib.contextmanager
def recorded(note: Callable[[Run], None]) -> Iterator[None]:
    """Inside, in this thread, ``note`` is told of every stretch of fused layers right before it runs."""
    before = chosen.note
    _choose(chosen.backend, note)
    try:
        yield
    finally:
        _choose(chosen.backend, before)


def forced() -> bool:
    """Whether ``backend("triton")`` is in force."""
    return chosen.backend == "triton"


def insists() -> bool:
    """Whether a kernel that fails is to raise, and nothing else may run in its place."""
    return chosen.backend in ("triton", MEASURING)


def plain_torch() -> bool:
    """Whether ``backend("torch")`` is in force."""
    return chosen.backend == "torch"


def quiet() -> bool:
    """Whether a call with nothing to fuse may go straight to PyTorch: neither forced nor recorded."""
    return chosen.quiet
