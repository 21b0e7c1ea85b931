"""Host code that the launchers share: device limits, launching, failures, arithmetic and alignment."""

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton

from .tiles import ITEMSIZE, Tile
from .tuning_table import Table, table_of

# Passed to every launch. Fused multiply-add is Triton's default up to 3.9; it is set here so that a release
# with another default does not change the results. 255 registers are the most that a thread can have: without
# this limit, ptxas aims at a number of resident programs and spills a few bytes to reach it.
COMPILE_OPTIONS = {"enable_fp_fusion": True, "maxnreg": 255}


def options_for(kind: str) -> dict[str, Any]:
    """The launch options of every kernel that multiplies in this arithmetic."""
    return COMPILE_OPTIONS | {"INPUT_PRECISION": "tf32" if kind == "tf32" else "ieee"}


class Device(NamedTuple):
    num_sms: int
    shared_memory: int  # bytes one program may use


@functools.cache
def device_limits(index: int | None) -> Device:
    """Limits of CUDA device ``index``, or of Triton's interpreter for None."""
    if index is None:
        # The interpreter's time depends on the number of iterations, not on the tile: few programs and large
        # tiles are fast. With three programs, tests still run the persistent loops more than once.
        return Device(num_sms=3, shared_memory=232448)
    properties = torch.cuda.get_device_properties(index)
    optin = properties.shared_memory_per_block_optin  # type: ignore[attr-defined, unused-ignore]  # not in 2.14's
    return Device(properties.multi_processor_count, optin)


@functools.cache  # it cannot change after Triton has decorated the kernels
def interpreting() -> bool:
    """True if these kernels run in Triton's interpreter (TRITON_INTERPRET=1), also on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


class _DryRun(threading.local):
    note: Callable[[str, tuple[Any, ...]], None] | None = None


_dry_run = _DryRun()


@contextlib.contextmanager
def dry_run(note: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """In this context and thread, launch nothing; call ``note(kernel's name, its arguments)`` instead."""
    before = _dry_run.note
    _dry_run.note = note
    try:
        yield
    finally:
        _dry_run.note = before


def dry_run_note() -> Callable[[str, tuple[Any, ...]], None] | None:
    """In a dry run, the function to call instead of a PyTorch operator; else None."""
    return _dry_run.note


def mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``torch.mm(a, b, out=out)``; in a dry run only noted."""
    if _dry_run.note is None:
        return torch.mm(a, b, out=out)
    _dry_run.note("mm", (a, b, out))
    return out


# Triton's interpreter keeps its state in globals of triton.language, so only one thread may run it at a time,
# and the process must not fork while it runs.
_one_at_a_time = threading.Lock() if interpreting() else None
if _one_at_a_time is not None and hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_one_at_a_time.acquire,
        after_in_parent=_one_at_a_time.release,
        after_in_child=_one_at_a_time.release,
    )


class KernelFailed(RuntimeError):
    """A kernel could not be compiled, loaded or launched; the message names it and says why.

    Triton's own errors (OutOfResources, CompilationError, PTXASError, RuntimeError, AssertionError, ...) have
    only Exception as a common base. Callers that can fall back to another implementation catch this one.
    """


def launch(
    kernel: Any, grid: tuple[int, ...], x: torch.Tensor, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Run ``kernel`` on x's device, which need not be the current one.

    Raises KernelFailed if Triton cannot build or launch it, and torch.OutOfMemoryError if the device has no
    memory for it.
    """
    if _dry_run.note is not None:
        _dry_run.note(_name(kernel), args)
        return
    try:
        if _one_at_a_time is not None:
            with _one_at_a_time:
                kernel[grid](*args, **options)
        elif x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                kernel[grid](*args, **options)
        else:
            kernel[grid](*args, **options)
    except Exception as error:
        raise _failure(kernel, error) from error


def build(
    kernel: Any, grid: tuple[int, ...], x: torch.Tensor, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Compile ``kernel`` for these arguments and load it on x's device, but do not run it.

    Raises the same errors as launch.
    """
    if interpreting():  # there is nothing to compile
        return
    try:
        with torch.cuda.device(x.device):
            compiled = kernel.run(*args, grid=grid, warmup=True, **options)
            if compiled is not None:  # None if a user's hook has replaced the compilation
                compiled._init_handles()  # loads it; raises, at every call, if the device cannot hold it
    except Exception as error:
        raise _failure(kernel, error) from error


def _name(kernel: Any) -> str:
    name: str = kernel.__name__
    return name.strip("_").removesuffix("_kernel")


def _failure(kernel: Any, error: Exception) -> Exception:
    """The error to raise in place of Triton's."""
    said = f"the Triton kernel {_name(kernel)} failed with {first_line(error).rstrip('.')}"
    # Triton passes on the driver's message in a RuntimeError.
    if isinstance(error, torch.OutOfMemoryError) or "CUDA]: out of memory" in str(error):
        return torch.OutOfMemoryError(said)
    return KernelFailed(said)


def first_line(error: Exception) -> str:
    """The error's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")


# Compared by identity, which is fast: setting_of creates only one for each combination of values.
@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What all launches of a chain have in common. With the sizes, it decides how they are launched."""

    kind: str  # the arithmetic, a row of the tile table: see arithmetic
    device: Device
    table: Table  # what was measured on this device
    forced: bool  # use the kernels even where PyTorch's operator was measured to be faster

    def measured(
        self, operation: str, M: int, N: int, K: int, aligned: bool, tile: Tile | None
    ) -> tuple[Tile | None, bool]:
        """``(the fastest tile for a layer's product, whether PyTorch's operator was faster still)``.

        The tile is None if nothing was measured. A ``tile`` that is given is returned unchanged.
        """
        if tile is not None:
            return tile, False
        product = self.table.product(operation, self.kind, M, N, K)
        if product is None or aligned != (is_aligned(N) and is_aligned(K)):
            return None, False
        return product.tile, product.torch_us < product.us and not self.forced

    def product_options(self, tile: Tile) -> dict[str, Any]:
        """The launch options of a product: how the tile is compiled and which arithmetic it uses."""
        return options_for(self.kind) | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}

    def programs(self, work: int, tile: Tile) -> tuple[int]:
        """A persistent grid for ``work`` tiles: at most as many programs as the SMs can run at one time.

        16 warps on each SM leave every thread 128 registers, about as many as these kernels use.
        """
        by_memory = self.device.shared_memory // tile.shared_memory(ITEMSIZE[self.kind])
        return (min(work, self.device.num_sms * max(1, min(16 // tile.num_warps, by_memory))),)


_setting = functools.cache(Setting)


def setting_of(x: torch.Tensor, forced: bool = False) -> Setting:
    """The setting of a chain whose input, or whose output's gradient, is x."""
    index = x.device.index if x.is_cuda else None
    return _setting(arithmetic(x.dtype), device_limits(index), table_of(index), forced)


# Choosing a tile and a grid takes as much time on the CPU as a launch, so each launcher caches its choices
# for this many sizes.
PLANS = 4096


_MATMUL = torch.backends.cuda.matmul  # looked up once, as every call reads it


def arithmetic(dtype: torch.dtype) -> str:
    """The arithmetic for a dtype: "half", or for float32 "tf32" or "ieee", as torch's settings allow."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if _MATMUL.fp32_precision == "tf32" else "ieee"


def is_aligned(columns: int) -> bool:
    """True if a new contiguous tensor with this many columns is aligned, see is_aligned_tensor."""
    return columns % 16 == 0 and columns < 2**22


def is_aligned_tensor(x: torch.Tensor) -> bool:
    """True if a product may read x (2-D) in 16-byte pieces and use 32-bit offsets within a tile.

    Rows must be contiguous, and the address, the number of columns and the pitch multiples of 16, which is
    how Triton recognises alignment. With a pitch below 2**22, the offsets in 256 rows are below 2**31.
    """
    pitch, step = x.stride()
    return (
        is_aligned(x.shape[1]) and step == 1 and pitch % 16 == 0 and pitch < 2**22 and x.data_ptr() % 16 == 0
    )
