"""What the launchers share on the host: the device's limits, the right current device, the arithmetic."""

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton

from .tiles import GROUP, ITEMSIZE, Tile
from .tuning_table import Table, table_of

# Passed to every launch. Fused multiply-add is Triton's default up to 3.9; said here so that a release
# that changes the default does not change the results. Left without a limit on registers, ptxas aims at a
# number of resident programs and spills a few bytes for it; 255 is the most that a thread can have.
COMPILE_OPTIONS = {"enable_fp_fusion": True, "maxnreg": 255}


class Device(NamedTuple):
    num_sms: int
    shared_memory: int  # bytes one program may use


@functools.cache
def device_limits(index: int | None) -> Device:
    """Limits of CUDA device ``index``; None is Triton's interpreter."""
    if index is None:
        # Few programs and large tiles: the interpreter pays per iteration, whatever the tile, and three
        # programs make the persistent loops go round.
        return Device(num_sms=3, shared_memory=232448)
    properties = torch.cuda.get_device_properties(index)
    optin = properties.shared_memory_per_block_optin  # type: ignore[attr-defined, unused-ignore]  # not in 2.14's
    return Device(properties.multi_processor_count, optin)


@functools.cache  # Triton decided it when it decorated the kernels
def interpreting() -> bool:
    """Whether these kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors too."""
    return bool(triton.knobs.runtime.interpret)


class _DryRun(threading.local):
    note: Callable[[str, tuple[Any, ...]], None] | None = None


_dry_run = _DryRun()


@contextlib.contextmanager
def dry_run(note: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Inside, in this thread, nothing is launched: ``note`` is told the kernel's name and its arguments."""
    before = _dry_run.note
    _dry_run.note = note
    try:
        yield
    finally:
        _dry_run.note = before


def listener() -> Callable[[str, tuple[Any, ...]], None] | None:
    """Who is to be told of one of PyTorch's operators instead of running it, if this is a dry run."""
    return _dry_run.note


# Triton's interpreter keeps what it works on in globals of triton.language: one thread at a time, and no fork
# in the middle.
_one_at_a_time = threading.Lock() if interpreting() else None
if _one_at_a_time is not None and hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_one_at_a_time.acquire,
        after_in_parent=_one_at_a_time.release,
        after_in_child=_one_at_a_time.release,
    )


class KernelFailed(RuntimeError):
    """A kernel could not be compiled, loaded or launched; the message names it and says why.

    What Triton raises (OutOfResources, CompilationError, PTXASError, RuntimeError, AssertionError, ...) has
    no base class in common but Exception. Whoever has another implementation to choose catches this one.
    """


def launch(
    kernel: Any, grid: tuple[int, ...], x: torch.Tensor, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Run ``kernel`` on x's device, which need not be the current one.

    Raises KernelFailed where Triton cannot build or launch it, and torch.OutOfMemoryError where the device
    has no memory for it.
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
    """Compile ``kernel`` for these arguments and load it on x's device, as launch would, but run nothing.

    Raises what launch raises.
    """
    if interpreting():  # which runs the kernel's source
        return
    try:
        with torch.cuda.device(x.device):
            compiled = kernel.run(*args, grid=grid, warmup=True, **options)
            if compiled is not None:  # as it may be where somebody's hook has taken the compilation over
                compiled._init_handles()  # loads it, or raises, each time, if the device cannot hold it
    except Exception as error:
        raise _failure(kernel, error) from error


def _name(kernel: Any) -> str:
    name: str = kernel.__name__
    return name.strip("_").removesuffix("_kernel")


def _failure(kernel: Any, error: Exception) -> Exception:
    """What to raise in place of what Triton raised."""
    said = f"the Triton kernel {_name(kernel)} failed with {first_line(error).rstrip('.')}"
    # Triton hands on the driver's own words, in a RuntimeError.
    if isinstance(error, torch.OutOfMemoryError) or "CUDA]: out of memory" in str(error):
        return torch.OutOfMemoryError(said)
    return KernelFailed(said)


def first_line(error: Exception) -> str:
    """The error's type and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")


# Compared by identity, which is quick: setting_of makes one of each.
@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What is the same for all launches of a chain, and with their sizes decides how they are launched."""

    kind: str  # which row of the tile table
    upcast: bool  # Triton's interpreter computes bfloat16 products wrongly
    device: Device
    table: Table  # what was measured on this device
    forced: bool  # the kernels throughout, also where PyTorch's operator was measured to be faster

    def measured(
        self, operation: str, M: int, N: int, K: int, regular: bool, tile: Tile | None
    ) -> tuple[Tile | None, bool]:
        """The tile that was fastest for a product of a layer's, None where that is not known, and whether
        PyTorch's operator was faster still. tile: that one, whatever was measured."""
        if tile is not None:
            return tile, False
        product = self.table.product(operation, self.kind, M, N, K)
        if product is None or regular != (is_aligned(N) and is_aligned(K)):
            return None, False
        return product.tile, product.torch_us < product.us and not self.forced

    def product_options(self, tile: Tile) -> dict[str, Any]:
        """The options of every product: how the tile is compiled and which arithmetic it uses."""
        return COMPILE_OPTIONS | {
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "GROUP": GROUP,
            "INPUT_PRECISION": "tf32" if self.kind == "tf32" else "ieee",
            "UPCAST": self.upcast,
        }

    def programs(self, work: int, tile: Tile) -> tuple[int]:
        """A persistent grid for ``work`` tiles: what the multiprocessors hold at one time, or less.

        16 warps a multiprocessor leave each thread 128 registers, about what these kernels use.
        """
        by_memory = self.device.shared_memory // tile.shared_memory(ITEMSIZE[self.kind])
        return (min(work, self.device.num_sms * max(1, min(16 // tile.num_warps, by_memory))),)


_setting = functools.cache(Setting)


def setting_of(x: torch.Tensor, forced: bool = False) -> Setting:
    """The setting of a chain that starts with x, or ends with the gradient x."""
    upcast = x.dtype == torch.bfloat16 and interpreting()
    index = x.device.index if x.is_cuda else None
    return _setting(arithmetic(x.dtype), upcast, device_limits(index), table_of(index), forced)


# Choosing a tile and a grid costs as much time on the CPU as launching: each launcher remembers its choices
# for so many sizes.
PLANS = 4096


_MATMUL = torch.backends.cuda.matmul  # looked up once: each step of the way costs, in every call


def arithmetic(dtype: torch.dtype) -> str:
    """Which row of the tile table computes this dtype, following torch's float32 precision setting."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if _MATMUL.fp32_precision == "tf32" else "ieee"


def is_aligned(columns: int) -> bool:
    """Whether a new contiguous tensor of so many columns is regular."""
    return columns % 16 == 0 and columns < 2**22


def is_regular(x: torch.Tensor) -> bool:
    """Whether a product may read x (2-D) in 16-byte pieces and count in 32 bits within a tile.

    Its rows are contiguous, and what Triton asks of an argument to know its alignment holds: the address, the
    number of columns and the pitch are multiples of 16. 256 rows are less than 2**31 elements.
    """
    pitch, step = x.stride()
    return (
        is_aligned(x.shape[1]) and step == 1 and pitch % 16 == 0 and pitch < 2**22 and x.data_ptr() % 16 == 0
    )
