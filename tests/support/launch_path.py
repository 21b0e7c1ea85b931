"""Call every launcher of fusedmlp.kernels as the package does, for one chip, on a stub of the CUDA driver.

    python tests/support/launch_path.py record 90

tests/kernels/test_launch_path.py runs it, with libcuda_stub.c built and found as libcuda.so.1, in a process
of its own because kernels that Triton's interpreter has claimed cannot be compiled. What was built and
launched goes to stdout, one JSON object a line.
"""

import contextlib
import ctypes
import io
import itertools
import json
import pkgutil
import struct
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import launch_cases
import torch
import triton
from machine_code import SHARED_MEMORY, resources
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.runtime.jit import JITFunction

import fusedmlp.kernels
from fusedmlp.kernels import launch
from fusedmlp.kernels.layer import forward as forward_module
from fusedmlp.kernels.layer.forward import linear_forward
from fusedmlp.kernels.layer.relu_backward import SUM_N
from fusedmlp.kernels.partial_sums import _add_up_kernel
from fusedmlp.kernels.tiles import Tile, cdiv
from fusedmlp.kernels.train_step import persistent

MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
MOST_LAUNCHES, MOST_PARAMETERS = 1024, 512  # as in libcuda_stub.c


class Launch(ctypes.Structure):
    """What the stub records of a launch, as in libcuda_stub.c."""

    _fields_ = (
        ("name", ctypes.c_char * 256),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_memory", ctypes.c_uint),
        ("cooperative", ctypes.c_int),
        ("dependent", ctypes.c_int),
        ("other_attributes", ctypes.c_int),
        ("parameters", ctypes.c_int),
        ("values", ctypes.c_ulonglong * MOST_PARAMETERS),
    )


class Stub:
    """The stub of libcuda, which stands in for a chip."""

    def __init__(self, arch: int) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.chip(arch, SHARED_MEMORY[arch])
        self._launches = (Launch * MOST_LAUNCHES).in_dll(self.library, "stub_launches")

    def chip(self, arch: int, shared_memory: int) -> None:
        self.library.stub_chip(arch, MULTIPROCESSORS[arch], shared_memory)

    def refuse(self, error: int) -> None:
        """From now on refuse every launch with this error; 0: no longer."""
        self.library.stub_refuse(error)

    def refuse_modules(self, error: int) -> None:
        """From now on refuse to load any kernel with this error; 0: no longer."""
        self.library.stub_refuse_modules(error)

    def launches(self) -> list[Launch]:
        count = ctypes.c_int.in_dll(self.library, "stub_number_of_launches").value
        return list(self._launches[:count])


class Driver(CudaDriver):  # type: ignore[misc]
    """Triton's own driver without its calls of PyTorch, which sees no GPU here."""

    def __init__(self, arch: int) -> None:
        self.utils = CudaUtils()
        self.launcher_cls = CudaLauncher
        self.arch = arch

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def pretend(arch: int) -> Stub:
    """Make the kernels take tensors on the CPU for tensors on a GPU of this architecture."""
    stub = Stub(arch)
    triton.runtime.driver.set_active(Driver(arch))
    limits = launch.Device(MULTIPROCESSORS[arch], SHARED_MEMORY[arch])
    launch.device_limits = persistent.device_limits = lambda index: limits  # type: ignore[assignment]
    torch.cuda.current_device = lambda: None  # type: ignore[assignment,return-value]  # the index of "cpu"
    torch.cuda.device = contextlib.nullcontext  # type: ignore[assignment,misc]
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    return stub


def every_kernel() -> list[JITFunction]:
    """All kernels that can be launched: the JIT functions named so, and those that no other one calls."""
    found: dict[str, JITFunction] = {}
    for module in pkgutil.walk_packages(fusedmlp.kernels.__path__, "fusedmlp.kernels."):
        for value in vars(import_module(module.name)).values():
            if isinstance(value, JITFunction) and value.__module__.startswith("fusedmlp.kernels."):
                found[value.__name__] = value
    called = {name for kernel in found.values() for name in kernel.fn.__code__.co_names}
    return [kernel for name, kernel in found.items() if name.endswith("_kernel") or name not in called]


def passed_on(value: Any, type_: Any) -> Iterator[int]:
    """The parameters that a kernel gets for one argument, as numbers."""
    if isinstance(type_, tuple):
        for part, of_part in zip(value, type_, strict=True):
            yield from passed_on(part, of_part)
    elif type_ == "constexpr":  # None and 1 are compiled in as well
        return
    elif isinstance(value, torch.Tensor):
        yield value.data_ptr()
    elif type_ == "fp32":
        yield struct.unpack("<I", struct.pack("<f", value))[0]
    else:
        yield value % 2 ** {"i32": 32, "i64": 64}[type_]


def meant_grid(name: str, given: dict[str, Any]) -> int | tuple[int, int] | None:
    """The grid in which each program has one part of the work; None for kernels that work with any grid.

    given: the kernel's arguments and options by name. The other kernels' programs loop over the work.
    """
    if name == "_step_rows_kernel":
        return cdiv(given["rows"], given["BLOCK_M"])
    if name == "_step_weights_kernel":
        return sum(
            cdiv(outputs, given["BLOCK_N"]) * cdiv(inputs, given["BLOCK_K"])
            for inputs, outputs in itertools.pairwise(given["WIDTHS"])
        )
    if name == "relu_backward_kernel":
        return cdiv(given["N"], SUM_N.value), cdiv(given["M"], given["rows_per_chunk"])
    if name == "_add_up_kernel":
        return sum(cdiv(size, given["BLOCK"]) for size in given["sizes"])
    return None


class Recorder:
    """Records each launch through Triton's JIT: its arguments, what was built, what reached the driver."""

    def __init__(self, stub: Stub) -> None:
        self.stub = stub
        self.case = ""
        self.lines: list[dict[str, Any]] = []
        self.built: list[Any] = []
        self._run = JITFunction.run
        recorder = self

        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            return recorder.run(kernel, args, grid, warmup, options)

        JITFunction.run = run

    def run(
        self, kernel: JITFunction, args: tuple[Any, ...], grid: Any, warmup: bool, options: dict[str, Any]
    ) -> Any:
        before = len(self.stub.launches())
        log = io.StringIO()
        with contextlib.redirect_stdout(log):  # Triton prints ptxas's report to stdout
            compiled = self._run(kernel, *args, grid=grid, warmup=warmup, **options)
        if not any(compiled is one for one in self.built):
            used = resources(log.getvalue(), compiled.metadata)
            if used is None:
                raise SystemExit(
                    f"ptxas said nothing about {self.case}, {kernel.__name__}:\n{log.getvalue()}"
                )
            self.built.append(compiled)
            self.lines.append({"build": kernel.__name__, "case": self.case, "ahead": warmup} | used)
        seen = self.stub.launches()[before:]
        if not warmup:
            wrong = differences(seen, compiled, args, grid, options)
            meant = meant_grid(kernel.__name__, dict(zip(kernel.arg_names, args, strict=False)) | options)
            if meant is not None and grid not in (meant, (meant,)):
                wrong.append(f"the launcher asked for a grid of {grid}, and the work takes {meant}")
            self.lines.append(
                {
                    "launch": kernel.__name__,
                    "case": self.case,
                    "wrong": wrong,
                    "cooperative": bool(seen and seen[0].cooperative),
                    "dependent": bool(seen and seen[0].dependent),
                }
            )
        return compiled


def differences(
    seen: list[Launch], compiled: Any, args: tuple[Any, ...], grid: Any, options: dict[str, Any]
) -> list[str]:
    """How what reached the driver differs from what the launcher asked for, in words."""
    if len(seen) != 1:
        return [f"{len(seen)} launches reached the driver"]
    launch = seen[0]
    values = [
        number
        for value, type_ in zip(args, compiled.src.signature.values(), strict=False)  # options come last
        for number in passed_on(value, type_)
    ]
    scratch = [0, 0]  # two addresses of scratch memory that Triton adds; our kernels need none
    comparisons: dict[str, tuple[Any, Any]] = {
        "grid": (list(launch.grid), [*grid, 1, 1][:3]),
        "block": (list(launch.block), [32 * options["num_warps"], 1, 1]),
        "shared memory": (launch.shared_memory, compiled.metadata.shared),
        "cooperative": (bool(launch.cooperative), options.get("launch_cooperative_grid", False)),
        "dependent": (bool(launch.dependent), options.get("launch_pdl", False)),
        "other attributes": (launch.other_attributes, 0),
        "number of parameters": (launch.parameters, len(values) + 2),
    }
    wrong = [f"{what} {got}, not {asked}" for what, (got, asked) in comparisons.items() if got != asked]
    for i, (asked, got) in enumerate(zip([*values, *scratch], launch.values, strict=False)):
        if asked != got:
            wrong.append(f"parameter {i} is {got}, not {asked}")
    return wrong


def record(arch: int, stub: Stub) -> Iterator[dict[str, Any]]:
    """Yield what every case of this chip builds and launches, then which kernels there are."""
    recorder = Recorder(stub)
    for case in launch_cases.CASES:
        if arch in case.chips:
            recorder.case = case.name
            case.call()
    yield from recorder.lines
    yield {
        "kernels": [kernel.__name__ for kernel in every_kernel()],
        "reached the driver": len(stub.launches()),
        "triton": triton.__version__,
    }


def refusals(arch: int, stub: Stub) -> Iterator[dict[str, Any]]:
    """Yield what is raised where a kernel is refused, and whether a launch works afterwards."""
    x = torch.zeros(64, 64, dtype=torch.float16)
    setting = launch.setting_of(x)

    def forward(tile: Tile) -> None:
        linear_forward(x, x, None, True, True, setting, tile)

    right = Tile(64, 64, 64, 4, 4)
    too_large = Tile(128, 256, 64, 8, 5)

    def with_an_error(number: int) -> None:
        stub.refuse(number)
        try:
            forward(right)
        finally:
            stub.refuse(0)

    def without_memory_for_the_kernel(tile: Tile) -> None:
        stub.refuse_modules(2)
        try:
            forward(tile)
        finally:
            stub.refuse_modules(0)

    def built_only(tile: Tile) -> None:
        """Compile and load kernels without launching them, as build_step does."""
        forward_module.launch = launch.build
        try:
            forward(tile)
        finally:
            forward_module.launch = launch.launch

    def with_an_option_that_ptxas_does_not_know() -> None:
        options = launch.COMPILE_OPTIONS
        launch.COMPILE_OPTIONS = options | {"ptx_options": "--no-such-option"}
        try:
            forward(Tile(64, 64, 32, 4, 2))
        finally:
            launch.COMPILE_OPTIONS = options

    def add_up(*grid: int, **given: Any) -> Any:
        sums, out = torch.zeros(2, 8), torch.zeros(8)
        return _add_up_kernel[grid]((sums,), (out,), (5,), (8,), BLOCK_P=8, BLOCK=256, num_warps=4, **given)

    def with_much_shared_memory() -> None:
        """Launch with more shared memory than the driver has been asked to allow."""
        compiled = add_up(1)
        warps, programs, _ = compiled.packed_metadata
        compiled.packed_metadata = warps, programs, 49153
        add_up(1)

    calls: dict[str, Callable[[], Any]] = {
        "launch fails": lambda: with_an_error(719),
        "no memory": lambda: with_an_error(2),
        "no memory for the kernel": lambda: without_memory_for_the_kernel(Tile(32, 32, 32, 4, 2)),
        "the same kernel again": lambda: forward(Tile(32, 32, 32, 4, 2)),
        "built only": lambda: built_only(too_large),
        "built once more": lambda: built_only(too_large),
        "shared memory": lambda: forward(too_large),
        "source does not compile": lambda: forward(Tile(48, 64, 32, 4, 2)),
        "ptxas fails": with_an_option_that_ptxas_does_not_know,
        "grid": lambda: add_up(1, 65536),
        "shared memory of a launch": with_much_shared_memory,
        "cooperative grid": lambda: add_up(10**6, launch_cooperative_grid=True),
        "dependent launch": lambda: add_up(1, launch_pdl=True),
        "module": lambda: triton.runtime.driver.active.utils.load_binary("name", b"no cubin" * 100, 0, 0),
    }
    for what, call in calls.items():
        at_first = len(stub.launches())
        error = raised_by(call)
        cause = error.__cause__ or error
        classes = [cls.__name__ for cls in type(cause).__mro__[:-2]]  # without BaseException and object
        before = len(stub.launches())
        forward(right)
        after = len(stub.launches()) - before
        yield {
            "refused": what,
            "raised": type(error).__name__,
            "cause": classes,
            "says": str(cause),
            "launches": before - at_first,
            "launches after": after,
        }


def raised_by(call: Callable[[], Any]) -> Exception:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints ptxas's report to stdout
            call()
    except Exception as error:
        return error
    return AssertionError("nothing was raised")


def main() -> None:
    what, arch = {"record": record, "refusals": refusals}[sys.argv[1]], int(sys.argv[2])
    for line in what(arch, pretend(arch)):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
